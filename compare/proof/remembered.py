"""Cache the results of pure functions of NumPy arrays, such as the exact reference values.

All implementations are compared with the same reference, so it is computed only once.
"""

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

MAX_RESULTS = 64


def remembered(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return the function with a cache of the `MAX_RESULTS` results that were used last.

    Results are looked up by the content of the arguments: NumPy arrays, and other values whose
    pickles are equal if the values are equal. Results are shared, so do not write to them.
    """
    results: OrderedDict[bytes, Result] = OrderedDict()

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        key = hashlib.blake2b(pickle.dumps((args, sorted(kwargs.items())), protocol=5)).digest()
        if key not in results:
            results[key] = function(*args, **kwargs)
        results.move_to_end(key)
        if len(results) > MAX_RESULTS:
            results.popitem(last=False)
        return results[key]

    return call
