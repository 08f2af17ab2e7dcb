"""Show what moves with a module to another device, and what happens to a mask left behind."""

from collections.abc import Iterator
from typing import Any

import torch

from ..proof.cases import NOTEBOOK, TITLES
from ..report.model import Check, Section, Table
from ..runners.notebook_figures import figures, inputs
from ..runners.run import TorchAttention, build_torch
from ..subprocesses import ON_CPU, run_module

TWO_HOST_DEVICES = {**ON_CPU, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

# The name of each case, and how the result of the call must begin.
JAX_CASES = {
    "moved": ("mask moved along", "works"),
    "committed": ("mask left committed", "ValueError: Received incompatible devices"),
    "uncommitted": ("mask not committed", "works"),
}


def sections() -> Iterator[Section]:
    """Yield a section on PyTorch's `.to`, then one on JAX's `device_put`."""
    yield _torch_section()
    yield _jax_section(run_module("compare.commands.jax_devices", environment=TWO_HOST_DEVICES))


def mismatch_check() -> Check:
    """Run the notebook's cell 6: the module is on CUDA, its plain mask still on the CPU."""
    name, implementation = "cell 6: mask left on CPU", TITLES["torch"]
    expected = "a RuntimeError that names both devices"
    if not torch.cuda.is_available():
        return Check(name, implementation, None, "torch sees no CUDA device", expected)
    module = build_torch(NOTEBOOK, buffer=False).to("cuda")
    try:
        module(torch.from_numpy(inputs()).cuda())
    except RuntimeError as error:
        message = str(error)
        return Check(
            name,
            implementation,
            "cpu" in message and "cuda" in message,
            f"RuntimeError: {message}",
            expected,
        )
    return Check(name, implementation, False, "no error", expected)


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
    note = "" if target == "cuda" else " The meta device shows what moves without a CUDA device."
    section = Section(
        "Devices in PyTorch: what `.to()` moves",
        [
            f"The module is moved by `module.to({target!r})`.{note}",
            Table(["class", "tensor", "kind", "before", "after"], rows),
            f"Cell 6 of the notebook, which ran on CUDA: {figures()['error_cell_6']}",
        ],
    )
    for buffer, name in ((True, "registered mask moves"), (False, "plain mask stays")):
        held = moved[buffer, "mask"] is buffer and all(
            moved[buffer, f"{layer}.weight"] for layer in ("W_query", "W_key", "W_value")
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
    section.blocks.append(cell_6_outcome(section.checks[-1]))
    return section


def cell_6_outcome(check: Check) -> str:
    """Say what the notebook's cell 6 did on this machine."""
    return f"On this machine: {'not run, ' if check.held is None else ''}{check.measured}."


def _tensors(module: TorchAttention) -> list[tuple[str, torch.Tensor, str]]:
    """Return the name, the tensor and the kind of every parameter and of the mask."""
    tensors = [(name, tensor, "parameter") for name, tensor in module.named_parameters()]
    kind = "buffer" if "mask" in module.state_dict() else "plain tensor"
    return [*tensors, ("mask", module.mask, kind)]


def _jax_section(observations: dict[str, Any]) -> Section:
    """Tabulate what `jax_devices.py` observed, and check it."""
    home, other = observations["devices"]
    section = Section("Devices in JAX: what `device_put` moves, and what it leaves")
    rows: list[list[Any]] = []
    for case, (name, expected) in JAX_CASES.items():
        for flax in ("linen", "nnx"):
            observed = observations[flax][case]
            result, mask = observed["result"], observed["mask"]
            rows.append([name, TITLES[flax], mask, result.split(" for jitted")[0]])
            held = result.startswith(expected) and mask == (other if case == "moved" else home)
            section.checks.append(
                Check(f"JAX: {name}", TITLES[flax], held, f"{result}, mask on {mask}", expected)
            )
    for flax in ("linen", "nnx"):
        captured, as_argument = observations[flax]["closed_over"].values()
        held = as_argument and not captured
        measured = f"edit seen: captured {_yes(captured)}, as an argument {_yes(as_argument)}"
        expected = "edit seen: captured no, as an argument yes"
        rows.append(["mask captured by jit", TITLES[flax], None, f"edit seen: {_yes(captured)}"])
        rows.append(
            ["mask an argument of jit", TITLES[flax], None, f"edit seen: {_yes(as_argument)}"]
        )
        section.checks.append(
            Check("JAX: mask captured by jit", TITLES[flax], held, measured, expected)
        )
    section.blocks = [
        "A separate process has two host devices. The weights and inputs are on "
        f"{other}. Moving the variables moves the mask with them. A mask committed to another "
        "device is an error; an uncommitted mask is silently copied at every call. A mask captured "
        "by `jit` is a constant of the program, so pass the mask as an argument.",
        Table(["case", "module", "mask on", "result"], rows),
    ]
    return section


def _yes(value: bool) -> str:
    return "yes" if value else "no"
