"""What moves with the module to another device, and what happens to a mask that does not."""

from collections.abc import Iterator
from typing import Any

import torch

from ..proof.cases import NOTEBOOK, TITLES
from ..report.model import Check, Section, Table
from ..runners.notebook_figures import figures, inputs
from ..runners.run import TorchAttention, build_torch
from ..subprocesses import ON_CPU, run_module

TWO_HOST_DEVICES = {**ON_CPU, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

# What JAX does in each case; the error is matched by its beginning.
JAX_CASES = {
    "moved": ("mask moved along", "works"),
    "committed": ("mask left committed", "ValueError: Received incompatible devices"),
    "uncommitted": ("mask not committed", "works"),
}


def sections() -> Iterator[Section]:
    """Yield what PyTorch's `.to` moves, then what JAX's `device_put` moves."""
    yield _torch_section()
    yield _jax_section(run_module("compare.commands.jax_devices", environment=TWO_HOST_DEVICES))


def mismatch_check() -> Check:
    """Run the notebook's cell 6: the module on CUDA, its plain mask still on the CPU."""
    name, place = "cell 6: mask left on the CPU", TITLES["torch"]
    expected = "a RuntimeError that names both devices"
    if not torch.cuda.is_available():
        return Check(name, place, None, "torch sees no CUDA device", expected)
    module = build_torch(NOTEBOOK, buffer=False).to("cuda")
    try:
        module(torch.from_numpy(inputs()).cuda())
    except RuntimeError as error:
        message = str(error)
        return Check(
            name,
            place,
            "cpu" in message and "cuda" in message,
            f"RuntimeError: {message}",
            expected,
        )
    return Check(name, place, False, "no error", expected)


def _torch_section() -> Section:
    target = "cuda" if torch.cuda.is_available() else "meta"
    rows, moved = [], {}
    for buffer in (False, True):
        module = build_torch(NOTEBOOK, buffer=buffer).to(target)
        for name, tensor, kind in _tensors(module):
            rows.append(
                [
                    "with buffer" if buffer else "without buffers",
                    name,
                    kind,
                    "cpu",
                    str(tensor.device),
                ]
            )
            moved[buffer, name] = tensor.device.type == target
    section = Section(
        "Devices in PyTorch: what `.to()` moves",
        [
            f"`module.to({target!r})`: "
            + (
                ""
                if target == "cuda"
                else "the meta device shows what moves, without any CUDA device."
            ),
            Table(["class", "tensor", "kind", "before", "after"], rows),
            f"Cell 6 of the notebook, on CUDA: {figures()['error_cell_6']}",
        ],
    )
    for buffer, name in ((True, "registered mask moves"), (False, "plain mask stays")):
        held = moved[buffer, "mask"] is buffer and all(
            moved[buffer, f"W_{w}.weight"] for w in ("query", "key", "value")
        )
        section.checks.append(
            Check(
                name,
                TITLES["torch"],
                held,
                f"mask {'moved' if moved[buffer, 'mask'] else 'stayed'}",
                "the weights move, the mask " + ("too" if buffer else "does not"),
            )
        )
    section.checks.append(mismatch_check())
    section.blocks.append(here(section.checks[-1]))
    return section


def here(check: Check) -> str:
    """Say what came of the notebook's cell 6 on this machine."""
    return f"Here: {'not run, ' if check.held is None else ''}{check.measured}."


def _tensors(module: TorchAttention) -> list[tuple[str, torch.Tensor, str]]:
    named = [(name, tensor, "parameter") for name, tensor in module.named_parameters()]
    return [
        *named,
        ("mask", module.mask, "buffer" if "mask" in module.state_dict() else "plain tensor"),
    ]


def _jax_section(found: dict[str, Any]) -> Section:
    here, there = found["devices"]
    section = Section("Devices in JAX: what `device_put` moves, and what it leaves")
    rows: list[list[Any]] = []
    for case, (name, expected) in JAX_CASES.items():
        for flax in ("linen", "nnx"):
            result, mask = found[flax][case]["result"], found[flax][case]["mask"]
            rows.append([name, TITLES[flax], mask, result.split(" for jitted")[0]])
            held = result.startswith(expected) and mask == (there if case == "moved" else here)
            section.checks.append(
                Check(f"JAX: {name}", TITLES[flax], held, f"{result}, mask on {mask}", expected)
            )
    for flax in ("linen", "nnx"):
        seen, as_argument = found[flax]["closed_over"].values()
        held = as_argument and not seen
        measured = f"edit seen: captured {_yes(seen)}, as an argument {_yes(as_argument)}"
        expected = "edit seen: captured no, as an argument yes"
        rows.append(["mask captured by jit", TITLES[flax], None, f"edit seen: {_yes(seen)}"])
        rows.append(
            ["mask an argument of jit", TITLES[flax], None, f"edit seen: {_yes(as_argument)}"]
        )
        section.checks.append(
            Check("JAX: mask captured by jit", TITLES[flax], held, measured, expected)
        )
    section.blocks = [
        f"Two host devices in a process of its own, the weights and inputs on {there}. Moving the variables moves the "
        "mask with them. A mask committed to another device is an error; one committed nowhere is quietly copied at "
        "every call. A mask captured by `jit` is a constant of the program: pass it as an argument.",
        Table(["case", "module", "mask on", "result"], rows),
    ]
    return section


def _yes(value: bool) -> str:
    return "yes" if value else "no"
