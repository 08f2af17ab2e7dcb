"""Time our attention in other people's programs, beside what runs there otherwise.

Each number is a ratio of medians of the same run: the contestants take turns.
"""

from collections.abc import Iterator
from typing import Any

from ..report.model import Check, Section, Table
from ..subprocesses import ON_CPU, run_module

MAX_RATIO = 1.1  # to the library's kernel, in torch
MAX_COMPILE_RATIO = 2.0  # to the formula, in JAX
HOST_DEVICES = (1, 2, 8)


def sections(tokens: int, rounds: int) -> Iterator[Section | str]:
    """Yield the progress, then a section for each framework."""
    yield "torch"
    arguments = [str(tokens), str(rounds)]
    yield _torch(run_module("compare.bench.contexts_torch_worker", arguments, ON_CPU), tokens)
    meshes = []
    for devices in HOST_DEVICES:
        yield f"JAX on {devices} host devices"
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = {**ON_CPU, "XLA_FLAGS": flags}
        meshes.append(run_module("compare.bench.contexts_jax_worker", arguments, environment))
    yield _jax(meshes, tokens)


def _torch(contexts: dict[str, list[float]], tokens: int) -> Section:
    section = Section(f"torch: attention with {tokens} tokens, 12 heads of 64, in float32")
    rows = []
    for name, (ours, theirs) in contexts.items():
        ratio = ours / theirs
        rows.append([name, f"{ours:.1f}", f"{theirs:.1f}", f"{ratio:.2f}"])
        section.checks.append(_ratio_check(name, "torch", ratio, MAX_RATIO))
    section.blocks = [
        "A module with our attention, and the same module with scaled_dot_product_attention, which "
        "takes the mask for causal. Both are in the same context. Times are in ms.",
        Table(["context", "ours", "library's kernel", "ratio"], rows),
    ]
    return section


def _jax(meshes: list[dict[str, Any]], tokens: int) -> Section:
    section = Section(f"JAX: attention with {tokens} tokens on a mesh, and its compilation")
    scaling, single = [], meshes[0]
    for mesh in meshes:
        for name, (ours, formula) in mesh["times"].items():
            alone, formula_alone = single["times"][name]
            shares = [ours / alone, formula / formula_alone]
            row = [name, str(mesh["devices"]), f"{ours:.0f}", f"{formula:.0f}"]
            scaling.append([*row, *(f"{share:.2f}" for share in shares)])
            if mesh["devices"] > 1:
                title = f"{name}, {mesh['devices']} devices"
                gathers = mesh["gathers"][name]
                section.checks += [
                    _ratio_check(f"{title}, to the formula", "Flax", ours / formula, 1.0),
                    Check(f"{title}: all-gathers", "Flax", not gathers, str(gathers), "none"),
                ]
    compiling = []
    for name, (ours, formula) in single["compile"].items():
        ratio = ours / formula
        compiling.append([name, f"{ours:.2f}", f"{formula:.2f}", f"{ratio:.1f}"])
        section.checks.append(
            _ratio_check(f"compiling the {name}", "Flax", ratio, MAX_COMPILE_RATIO)
        )
    section.blocks = [
        "A batch of 16 with 4 heads of 16. Times are in ms; the shares are of the time on one "
        "device. The devices share this machine's cores.",
        Table(["program", "devices", "ours", "formula", "our share", "formula's share"], scaling),
        "Compiling the module, in seconds: tracing, lowering and XLA.",
        Table(["program", "ours", "formula", "ratio"], compiling),
    ]
    return section


def _ratio_check(name: str, implementation: str, ratio: float, largest: float) -> Check:
    return Check(name, implementation, ratio <= largest, f"{ratio:.2f}", f"at most {largest}")
