"""Convert drawn pairs of layers: each must be refused, or compute the same, forward and backward.

The two layers of a pair have the same arguments, or differ in one. They are converted by one of the
public entry points, and back. In float64 the outputs and the gradients of all parameters must then
agree within rounding; everything else must be an error of the project's own.
"""

import copy
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from ..checkpoint import load_checkpoint, save_checkpoint
from ..checkpoint.convert import convert_checkpoint
from ..checkpoint.errors import CheckpointError
from ..conversion.convert import linen_to_torch, nnx_to_torch, torch_to_linen, torch_to_nnx
from ..conversion.errors import ConversionError, TrainingDifference
from ..conversion.match import match
from ..files.printable import shown
from ..report.model import Cell, Check, Section, Table
from ..subprocesses import ON_CPU, ChildError, child_environment
from .layer_pairs import FAMILIES, Draw, Pair

_CHUNK = 500
_PROCESSES = 2
# How often torch's own rounding is measured, each time with numbers that are rounded otherwise.
_RUNS = 3
# LAPACK's tests call an error above 30 roundings a bug (TESTING/dtest.in).
_THRESHOLD = 30.0
_U32, _U64 = np.finfo(np.float32).eps / 2, np.finfo(np.float64).eps / 2
_MAX_SHOWN = 5


class Verdict(NamedTuple):
    """What became of one pair.

    Attributes:
        outcome: `refused`, `equal`, `warned` (equal, but trained in another way), `ended` (the
            process ended within a library), or what is bad.
        entry: the entry point.
        name: both layers.
    """

    outcome: str
    entry: str
    name: str


_GOOD = ("refused", "equal", "warned", "ended")


@dataclass
class Counts:
    """The pairs of one family, and the bad ones by number."""

    outcomes: Counter[str] = field(default_factory=Counter)
    bad: dict[int, str] = field(default_factory=dict)


def sections(pairs: int, seed: int = 0) -> Iterator[Section | str]:
    """Yield the progress, then one section with a row for each family of layers."""
    counts = {family: Counts() for family in FAMILIES}
    done, first = 0, seed * 10**9
    with ThreadPoolExecutor(_PROCESSES) as pool:
        futures = [
            pool.submit(judged, begin, min(_CHUNK, first + pairs - begin))
            for begin in range(first, first + pairs, _CHUNK)
        ]
        for future in as_completed(futures):
            for number, verdict in future.result():
                done += 1
                family, is_bad = _family(number), verdict.outcome not in _GOOD
                counts[family].outcomes["bad" if is_bad else verdict.outcome] += 1
                if is_bad:
                    text = f"{verdict.entry}: {verdict.name}: {verdict.outcome}"
                    counts[family].bad[number] = text
            bad = sum(len(one.bad) for one in counts.values())
            yield f"{done:,} of {pairs:,} pairs, {bad} bad"
    yield _section(pairs, seed, counts)


def _family(number: int) -> str:
    return list(FAMILIES)[number % len(FAMILIES)]


def _section(pairs: int, seed: int, counts: dict[str, Counts]) -> Section:
    columns = ["layers", "pairs", *_GOOD, "bad"]
    rows: list[list[Cell]] = [
        [
            family,
            f"{one.outcomes.total():,}",
            *(f"{one.outcomes[name]:,}" for name in _GOOD),
            len(one.bad),
        ]
        for family, one in counts.items()
    ]
    bad = {number: text for one in counts.values() for number, text in one.bad.items()}
    section = Section(
        f"{pairs:,} pairs of layers",
        [
            f"Seed {seed}. In a third of the pairs one argument differs. Equal: converted, and the "
            "same in float64, outputs and gradients, there and back. Warned: the same but for "
            "gradients, which TrainingDifference says. Ended: a library ended the process. Bad: "
            "anything else that was not refused.",
            Table(columns, rows),
            *(f"Pair {number}: {shown(bad[number])}" for number in sorted(bad)[:_MAX_SHOWN]),
        ],
    )
    section.checks.append(
        Check("no silent difference", "all", not bad, f"{len(bad)} bad of {pairs:,}", "none")
    )
    return section


def judged(begin: int, count: int) -> list[tuple[int, Verdict]]:
    """Judge the pairs of these numbers in another process, which is replaced if it ends.

    Raises:
        ChildError: it ends before it judges any.
    """
    verdicts: list[tuple[int, Verdict]] = []
    while len(verdicts) < count:
        at = begin + len(verdicts)
        command = [sys.executable, "-P", "-m", __name__, str(at), str(count - len(verdicts))]
        done = subprocess.run(
            command, env=child_environment(ON_CPU), capture_output=True, text=True, check=False
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if not lines:
            raise ChildError(done.stderr[-2000:])
        verdicts += [(number, Verdict(*verdict)) for number, verdict in lines if verdict]
        if len(verdicts) < count:
            verdicts.append((begin + len(verdicts), Verdict("ended", "", "")))
    return verdicts


def main() -> None:
    """Judge as many pairs as the second argument says, from the number of the first on."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    begin, count = map(int, sys.argv[1:])
    print(json.dumps([begin, None]), flush=True)
    with jax.enable_x64(True), tempfile.TemporaryDirectory() as folder:
        for number in range(begin, begin + count):
            verdict = judge(number, _family(number), Path(folder))
            print(json.dumps([number, verdict]), flush=True)


def judge(number: int, family: str, folder: Path) -> Verdict:
    """Draw the pair of this number, convert it, and compare both layers."""
    draw = Draw(number)
    pair = FAMILIES[family](draw)
    _randomize(pair.layer, draw)
    entry = draw.one(*(_NNX if draw.is_nnx else _LINEN))
    try:
        made = _Made.of(pair, draw.is_nnx)
        pair.torch_outputs(torch.from_numpy(pair.inputs))
    except Exception:  # there is no such layer, or it cannot be called so
        return Verdict("refused", "the layer itself", pair.name)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pair.warned = lambda: any(each.category is TrainingDifference for each in caught)
            outcome = entry(pair, made, folder)
    except (ConversionError, CheckpointError):
        return Verdict("refused", entry.__name__, pair.name)
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return Verdict(outcome, entry.__name__, pair.name)


def _randomize(module: torch.nn.Module, draw: Draw) -> None:
    module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(draw.values(*parameter.shape)))


class _Holder(torch.nn.Module):
    """The torch layer under a name, as in a model."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer


class _NnxHolder(nnx.Module):
    def __init__(self, layer: nnx.Module) -> None:
        self.layer = layer


class _LinenHolder(linen.Module):
    call: Callable[[Any, Any], Any]
    make: linen.Module

    def setup(self) -> None:
        self.layer = self.make.copy()

    def __call__(self, inputs: Any) -> Any:
        return self.call(self.layer, inputs)


@dataclass
class _Made:
    """Both layers of a pair, each in a module that holds it."""

    torch: torch.nn.Module
    flax: Any
    template: Any

    @classmethod
    def of(cls, pair: Pair, is_nnx: bool) -> "_Made":
        """Build them. Whatever the Flax layer raises passes through."""
        source, inputs = _Holder(pair.layer), jnp.asarray(pair.inputs)
        if is_nnx:
            model = _NnxHolder(pair.flax())
            model.eval()
            jax.eval_shape(lambda: pair.call_flax(model.layer, inputs))
            return cls(source, model, model)
        module = _LinenHolder(pair.call_flax, pair.flax)
        return cls(source, module, jax.eval_shape(module.init, jax.random.key(0), inputs))


def by_mapping(pair: Pair, made: _Made, folder: Path) -> str:
    """Match, then convert with the mapping."""
    mapping = match(made.torch, made.flax, layouts=pair.layouts)
    return _compared_nnx(pair, made, torch_to_nnx(made.torch, made.flax, mapping=mapping), mapping)


def directly(pair: Pair, made: _Made, folder: Path) -> str:
    """Convert without a mapping of one's own."""
    model = torch_to_nnx(made.torch, made.flax, layouts=pair.layouts)
    return _compared_nnx(pair, made, model, match(made.torch, model, layouts=pair.layouts))


def through_a_file(pair: Pair, made: _Made, folder: Path) -> str:
    """Save the torch layer and load the file into the NNX model."""
    path = save_checkpoint(folder / "a.safetensors", made.torch)
    model = load_checkpoint(path, made.flax, layouts=pair.layouts)
    mapping = match(made.torch, model, layouts=pair.layouts)
    return _compared_nnx(pair, made, model, mapping, folder)


def through_a_converted_file(pair: Pair, made: _Made, folder: Path) -> str:
    """Save the torch layer, convert the file to Flax's format, and load that."""
    mapping = match(made.torch, made.flax, layouts=pair.layouts)
    path = save_checkpoint(folder / "b.safetensors", made.torch, mapping=mapping)
    convert_checkpoint(path, folder / "b.msgpack")
    model = load_checkpoint(folder / "b.msgpack", made.flax)
    return _compared_nnx(pair, made, model, mapping, folder)


def by_mapping_to_linen(pair: Pair, made: _Made, folder: Path) -> str:
    """Match with the Linen module at hand, then convert."""
    mapping = match(
        made.torch,
        made.template,
        module=made.flax,
        inputs=(jnp.asarray(pair.inputs),),
        layouts=pair.layouts,
    )
    variables = torch_to_linen(made.torch, made.template, mapping=mapping)
    return _compared_linen(pair, made, variables, mapping)


_NNX = (by_mapping, directly, through_a_file, through_a_converted_file)
_LINEN = (by_mapping_to_linen,)


def _compared_nnx(
    pair: Pair, made: _Made, model: Any, mapping: Any, folder: Path | None = None
) -> str:
    inputs = jnp.asarray(pair.inputs)

    def outputs_of(model: Any) -> jax.Array:
        return pair.call_flax(model.layer, inputs)

    def gradients_of(cotangent: np.ndarray) -> dict[str, torch.Tensor]:
        holder = nnx.clone(model)
        gradients = nnx.grad(lambda model: (outputs_of(model) * cotangent).sum())(model)
        nnx.update(holder, gradients)
        return nnx_to_torch(holder, mapping=mapping)

    if folder is None:
        state = nnx_to_torch(model, mapping=mapping)
    else:
        other = _Holder(_blank(pair.layer))
        path = save_checkpoint(folder / "c.msgpack", model, mapping=mapping)
        load_checkpoint(path, other)
        state = other.state_dict()
    return _compared(pair, made, np.asarray(outputs_of(model)), gradients_of, state)


def _blank(layer: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of the layer with other values."""
    blank = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.fill_(torch.nan)
    return blank


def _compared_linen(pair: Pair, made: _Made, variables: Any, mapping: Any) -> str:
    inputs = jnp.asarray(pair.inputs)

    def outputs_of(params: Any) -> jax.Array:
        outputs: jax.Array = made.flax.apply({**variables, "params": params}, inputs)
        return outputs

    params = variables.get("params", {})

    def gradients_of(cotangent: np.ndarray) -> dict[str, torch.Tensor]:
        gradients = jax.grad(lambda params: (outputs_of(params) * cotangent).sum())(params)
        return linen_to_torch({**variables, "params": gradients}, mapping=mapping)

    state = linen_to_torch(variables, mapping=mapping)
    return _compared(pair, made, np.asarray(outputs_of(params)), gradients_of, state)


def _compared(
    pair: Pair,
    made: _Made,
    outputs: np.ndarray,
    gradients_of: Callable[[np.ndarray], dict[str, torch.Tensor]],
    state: dict[str, torch.Tensor],
) -> str:
    """Return `equal`, or what differs."""
    for key, tensor in made.torch.state_dict().items():
        if key not in state and key.rpartition(".")[2] != "num_batches_tracked":
            return f"{key} did not come back"
        if key in state and not torch.equal(state[key], tensor):
            return f"{key} came back with other values"
    cotangent = np.random.default_rng(0).standard_normal(outputs.shape)
    exact = _torch_results(pair, cotangent, torch.float64)
    if exact["outputs"].size != outputs.size:
        return f"the outputs have the shape {outputs.shape}, in torch {exact['outputs'].shape}"
    singles = [
        _torch_results(pair, cotangent, torch.float32, np.random.default_rng(seed))
        for seed in range(_RUNS)
    ]
    found = {"outputs": outputs.reshape(exact["outputs"].shape)}
    found |= {
        key: tensor.detach().numpy()
        for key, tensor in gradients_of(cotangent).items()
        if key in exact
    }
    # torch's own rounding in float32, relative to the largest number of each array.
    roundings = [
        np.abs(single[name] - values).max(initial=0) / np.abs(values).max()
        for single in singles
        for name, values in exact.items()
        if values.any()
    ]
    relative = _THRESHOLD * max([_U64, *(rounding * (_U64 / _U32) for rounding in roundings)])
    for name, values in exact.items():
        limit = relative * max(np.abs(values).max(initial=0), np.finfo(np.float64).tiny)
        error = np.abs(found[name] - values).max(initial=0)
        if not error <= limit and name != "outputs" and pair.warned():
            return "warned"
        if not error <= limit:
            return f"{name} differs by {error:.2g}, more than the {limit:.2g} of rounding"
    return "equal"


def _torch_results(
    pair: Pair,
    cotangent: np.ndarray,
    dtype: torch.dtype,
    random: np.random.Generator | None = None,
) -> dict[str, np.ndarray]:
    """Return the outputs, and the gradients by the names of the held layer's parameters.

    With `random`, each number is one rounding larger or smaller.
    """
    saved = {key: tensor.clone() for key, tensor in pair.layer.state_dict().items()}
    pair.layer.to(dtype)
    inputs = torch.from_numpy(pair.inputs)
    inputs = inputs.to(dtype, copy=True) if inputs.is_floating_point() else inputs
    if random is not None:
        for values in (*pair.layer.parameters(), inputs):
            _round_otherwise(values, random)
    pair.layer.zero_grad()
    outputs = pair.torch_outputs(inputs)
    if outputs.numel() == cotangent.size and outputs.requires_grad:
        weights = torch.from_numpy(cotangent).reshape(outputs.shape).to(dtype)
        (outputs * weights).sum().backward()
    results = {"outputs": outputs.detach().double().numpy()}
    for key, parameter in pair.layer.named_parameters():
        if parameter.grad is not None:
            results[f"layer.{key}"] = parameter.grad.double().numpy().copy()
    pair.layer.to(torch.float64).load_state_dict(saved)
    return results


def _round_otherwise(values: torch.Tensor, random: np.random.Generator) -> None:
    if values.is_floating_point():
        signs = random.choice([-1.0, 1.0], tuple(values.shape))
        with torch.no_grad():
            values.mul_(
                1 + torch.finfo(values.dtype).eps * torch.from_numpy(signs).to(values.dtype)
            )


if __name__ == "__main__":
    main()
