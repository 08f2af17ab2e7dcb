"""Check transformers' own ports: models that it has in both frameworks, right and with a bug."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..conversion.errors import ConversionError
from ..report.model import Cell, Check, Section, Table
from .check import check_port
from .errors import PortError
from .report import PortReport
from .wrong_ports import place_of

_TOKENS, _SIZE = 7, 32
_TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


class LibraryPort(NamedTuple):
    """A model of transformers, and a bug to plant into its Flax code.

    Attributes:
        name: the architecture: the folder of its code.
        model: the name of the torch class, and with Flax before it that of the Flax class.
        config: the arguments of its configuration.
        inputs: makes the inputs.
        outputs: the fields of what both return that are compared.
        bug: a part of the Flax code, and what is written in its place.
        repairs: other changes, without which the code does not run with today's JAX.
    """

    name: str
    model: str
    config: dict[str, Any]
    inputs: Callable[[], Any]
    outputs: tuple[str, ...]
    bug: tuple[str, str]
    repairs: tuple[tuple[str, str], ...] = ()


def _ids(*shape: int, high: int = 99) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape)


def _words() -> dict[str, np.ndarray]:
    """Return tokens of which the last of one row are padding."""
    mask = np.ones((2, _TOKENS), np.int64)
    mask[1, 5:] = 0
    places = np.tile(np.arange(_TOKENS), (2, 1))
    return {"input_ids": _ids(2, _TOKENS), "attention_mask": mask, "position_ids": places}


def _pairs() -> dict[str, np.ndarray]:
    return _words() | {"token_type_ids": _ids(2, _TOKENS, high=2)}


def _both() -> dict[str, np.ndarray]:
    words = _words()
    return {
        "input_ids": words["input_ids"],
        "attention_mask": words["attention_mask"],
        "decoder_input_ids": _ids(2, 5),
        "decoder_attention_mask": np.ones((2, 5), np.int64),
    }


def _images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, _SIZE, _SIZE)).astype(np.float32)


PORTS = (
    LibraryPort(
        "bert",
        "BertModel",
        _TRANSFORMER | {"vocab_size": 99, "max_position_embeddings": 16},
        _pairs,
        ("last_hidden_state", "pooler_output"),
        ("self.LayerNorm(hidden_states + input_tensor)", "self.LayerNorm(hidden_states)"),
    ),
    LibraryPort(
        "gpt2",
        "GPT2Model",
        {"vocab_size": 99, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4},
        _words,
        ("last_hidden_state",),
        (
            "hidden_states = self.act(hidden_states)",
            "hidden_states = nn.gelu(hidden_states, False)",
        ),
    ),
    LibraryPort(
        "vit",
        "ViTModel",
        _TRANSFORMER | {"image_size": _SIZE, "patch_size": 8},
        _images,
        ("last_hidden_state", "pooler_output"),
        ("self.layernorm_after(attention_output)", "self.layernorm_after(hidden_states)"),
    ),
    LibraryPort(
        "t5",
        "T5Model",
        {
            **{"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2},
            **{"num_heads": 4, "decoder_start_token_id": 0},
        },
        _both,
        ("last_hidden_state",),
        (".mean(axis=-1, keepdims=True)", ".var(axis=-1, keepdims=True)"),
        (
            ("jnp.clip(relative_position, a_max=", "jnp.minimum(relative_position, "),
            (
                "jnp.clip(relative_position_if_large, a_max=",
                "jnp.minimum(relative_position_if_large, ",
            ),
        ),
    ),
    LibraryPort(
        "resnet",
        "ResNetModel",
        {
            **{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]},
            **{"layer_type": "basic", "stage_names": ["stem", "stage1", "stage2"]},
        },
        _images,
        ("last_hidden_state", "pooler_output"),
        ("hidden_state += residual", "hidden_state += 2 * residual"),
    ),
)


class _Judged(NamedTuple):
    port: LibraryPort
    right: PortReport | str
    wrong: PortReport | str
    line: int  # of the bug


def sections() -> Iterator[Section | str]:
    """Yield progress messages, and a section with the verdicts."""
    found = []
    for port in PORTS:
        yield f"libraries: the port of {port.name}"
        original = import_module(f"transformers.models.{port.name}.modeling_flax_{port.name}")
        with planted(original, *port.repairs) as (right, _):
            judged = _judged(port, right)
        with planted(original, *port.repairs, port.bug) as (wrong, line):
            found.append(_Judged(port, judged, _judged(port, wrong), line))
    yield _section(found)


@contextmanager
def planted(original: Any, *changes: tuple[str, str]) -> Iterator[tuple[Any, int]]:
    """Import a copy of a module in which texts are replaced where each stands first.

    Yields:
        The module, and the number of the line of the last change.
    """
    source, number = Path(original.__file__).read_text(encoding="utf-8"), 0
    for old, new in changes:
        before, _, after = source.partition(old)
        if before == source:
            raise ValueError(f"{original.__file__} has no {old!r}: this version is another one")
        source, number = f"{before}{new}{after}", before.count("\n") + 1
    name = f"{original.__name__}_planted"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(original.__file__).name
        file.write_text(source, encoding="utf-8")
        spec = spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
            yield module, number
        finally:
            del sys.modules[name]


def _judged(port: LibraryPort, code: Any) -> PortReport | str:
    """Return the report on the torch class and the Flax class of a module; or the error."""
    transformers = import_module("transformers")
    torch_class = getattr(transformers, port.model)
    config = torch_class.config_class(**port.config)
    outputs = _Fields(port.outputs)
    options: dict[str, Any] = {"outputs": (outputs, outputs)}
    if port.inputs is _images:
        options["flax_inputs"] = _channels_last
    try:
        torch.manual_seed(0)
        flax_module = getattr(code, f"Flax{port.model}")(config, _do_init=False).module
        return check_port(torch_class(config).eval(), flax_module, port.inputs(), **options)
    except (PortError, ConversionError) as error:
        return str(error)


class _Fields:
    """Takes some fields of what a model of transformers returns."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, raw: Any) -> tuple[Any, ...]:
        return tuple(getattr(raw, name) for name in self.names)


def _channels_last(images: Any) -> Any:
    return images.transpose(0, 2, 3, 1)


def _section(found: list[_Judged]) -> Section:
    rows: list[list[Cell]] = []
    held = named = 0
    for one in found:
        right, wrong = one.right, one.wrong
        is_held = isinstance(right, PortReport) and right.held
        place = _place(wrong, one)
        held, named = held + is_held, named + bool(place)
        slip = f"{right.slip:.0e}" if isinstance(right, PortReport) else right[:60]
        rows.append([one.port.model, "held" if is_held else "differs", slip, place])
    columns = ["model", "as it is", "slip seen from", "the bug's line is the"]
    bugs = ["{}: {} becomes {}".format(one.port.model, *one.port.bug) for one in found]
    section = Section(
        "Ports of transformers",
        [
            "Small models with drawn weights. Nothing is passed but which fields are compared, and "
            "for images the order of the axes.",
            Table(columns, rows),
            "The bugs:",
            *bugs,
        ],
    )
    for name, count in (("right ports hold", held), ("the line of the bug is named", named)):
        measured = f"{count} of {len(found)}"
        section.checks.append(Check(name, "all", count == len(found), measured, "every model"))
    return section


def _place(report: PortReport | str, judged: _Judged) -> str:
    """Return at which place the line of the bug is named, or nothing."""
    if isinstance(report, str) or report.divergence is None:
        return ""
    file = f"modeling_flax_{judged.port.name}.py"
    lines = report.divergence.flax_source
    numbers = [line.line if line.file.endswith(file) else 0 for line in lines]
    place = place_of(judged.line, numbers)
    return "" if place is None else ("first", "second", "third")[place]
