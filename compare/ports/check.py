"""Check that a Flax module is the same function as a torch module."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

from ..conversion.mapping import StateMapping, require_mapping
from ..conversion.match import pair
from ..files.reading import as_path
from ..frameworks import nn, torch
from .calls import calls_of
from .errors import PortDiffers, PortError
from .flax_side import Adapters, port_of
from .live import LiveReference, known_dtypes
from .recorded import RecordedReference
from .report import PortReport
from .torch_side import TorchSide
from .verdict import report_of


def check_port(
    torch_module: nn.Module | str | PathLike[str],
    flax_module: Any,
    inputs: Any = None,
    *,
    flax_inputs: Callable[..., Any] | None = None,
    outputs: Callable[[Any], Any] | Sequence[Callable[[Any], Any] | None] | None = None,
    method: str | None = None,
    train: Mapping[str, Any] | None = None,
    dtypes: Sequence[str] = ("float32",),
    adequacy: bool = False,
    mapping: StateMapping | None = None,
    **rules: Any,
) -> PortReport:
    """Check that a Flax module computes the same as a torch module, and is trained the same.

    The state of the torch module is converted, and both are run in float64 on the same inputs: with
    the weights as they are, and with weights drawn again. Outputs, the gradients by each parameter
    and each floating input, and the state after the call are compared. The limit is fifty times the
    farthest that torch's own values move if each of its results moves by one unit in the last
    place. Then both are run in the working dtypes. Neither module is changed.

    Args:
        torch_module: the module that was ported; or the path of what `compare.record` wrote of it,
            where torch is not installed.
        flax_module: a Linen module, or an NNX model, whose own weights do not matter.
        inputs: one call, as torch takes it: an array, a tuple of arguments, or a dict of keywords;
            or a list of calls. A record has its own.
        flax_inputs: a function from torch's arguments to those of Flax (one, a tuple, or a dict of
            keywords), for other layouts: `lambda images: images.transpose(0, 2, 3, 1)`. It is
            given JAX arrays that may be traced.
        outputs: a function from what the Flax module returns to what the torch module returns. A
            pair has one for torch and one for Flax.
        method: the method to call in place of the module itself.
        train: the keywords that make the Flax module train: `{"train": True}`. By default they are
            found by their usual names. An NNX model is also told by `model.train()`.
        dtypes: the working dtypes: "float32", "bfloat16", "float16".
        adequacy: whether to change the Flax module in one place after another, if it holds, and to
            say which changes these inputs would not have noticed.
        mapping: how the state pairs, from `compare.match`. By default it is paired here; if names
            differ and there is no `rename`, as `compare.suggest` proposes, and the report says so.
        rules: `rename`, `layouts`, `policy` and the other rules of `compare.match`.

    Returns:
        The report: whether the port holds, each comparison, and what the pass is worth.

    Raises:
        PortError: the modules cannot be compared.
        ConversionError: the state does not pair.
    """
    require_mapping(mapping)
    dtypes = known_dtypes(dtypes)
    ours, theirs = _of_both(outputs)
    known = inspect.signature(pair).parameters
    if unknown := [name for name in rules if name not in known]:
        raise PortError(f"there is no argument {unknown[0]}; rules are those of compare.match")
    adapters = Adapters(flax_inputs, theirs, method, train)
    if isinstance(torch_module, str | PathLike):
        _require_usable(adapters, flax_module)
        if inputs is not None or ours is not None:
            raise PortError("a record has its own inputs and outputs: give them to compare.record")
        recorded = RecordedReference(as_path(torch_module))
        port = port_of(flax_module, adapters)
        return report_of(recorded, port, mapping, rules, dtypes, adequacy=adequacy)
    if not isinstance(torch_module, nn.Module):
        raise PortError(
            f"torch_module is of type {type(torch_module).__name__}; expected a torch module, or "
            "the path of a record"
        )
    _require_usable(adapters, torch_module, flax_module)
    reference = LiveReference(TorchSide(torch_module, ours, method), calls_of(inputs))
    port = port_of(flax_module, adapters)
    with torch.inference_mode(False), torch.enable_grad():
        return report_of(reference, port, mapping, rules, dtypes, adequacy=adequacy)


def _require_usable(adapters: Adapters, *modules: Any) -> None:
    """Raise PortError for what says how the modules are called, but cannot."""
    inputs, method, train = adapters.inputs, adapters.method, adapters.train
    for module in modules:
        if method is not None and not callable(getattr(module, str(method), None)):
            raise PortError(f"{type(module).__name__} has no method {method!r}")
    if inputs is not None and not callable(inputs):
        raise PortError(f"flax_inputs is {inputs!r}; expected a function of torch's arguments")
    if train is not None and not isinstance(train, Mapping):
        raise PortError(f"train is {train!r}; expected keywords, such as {{'train': True}}")


def _of_both(outputs: Any) -> tuple[Any, Any]:
    """Return the functions of the outputs of torch and of Flax; one alone is that of Flax."""
    pair = outputs if isinstance(outputs, list | tuple) else (None, outputs)
    if len(pair) != 2 or not all(one is None or callable(one) for one in pair):
        raise PortError(
            f"outputs is {outputs!r}; expected a function of what Flax returns, or two functions, "
            "for torch and for Flax"
        )
    return pair[0], pair[1]


def assert_port(
    torch_module: nn.Module | str | PathLike[str],
    flax_module: Any,
    inputs: Any = None,
    **options: Any,
) -> None:
    """Raise PortDiffers with the report's text unless the port holds; see `check_port`.

    Raises:
        PortDiffers: something differs. It is an AssertionError.
    """
    report = check_port(torch_module, flax_module, inputs, **options)
    if not report.held:
        raise PortDiffers(str(report))
