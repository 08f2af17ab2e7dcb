"""Remember the results of a pure function of NumPy arrays: what is exact does not depend on who is judged by it."""

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")

MAX_RESULTS = 64


def remembered(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Return the function, which looks up the last `MAX_RESULTS` results by the content of its arguments.

    The arguments are NumPy arrays and other values that pickle alike when they are alike. Results
    are shared: do not write to them.
    """
    results: OrderedDict[bytes, Result] = OrderedDict()

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        key = hashlib.blake2b(pickle.dumps((args, sorted(kwargs.items())), protocol=5)).digest()
        if key not in results:
            results[key] = function(*args, **kwargs)
        results.move_to_end(key)
        if len(results) > MAX_RESULTS:
            results.popitem(last=False)
        return results[key]

    return call
