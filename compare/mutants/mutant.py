"""A planted bug, and what builds the same one in several frameworks."""

from typing import Literal, NamedTuple

from ..proof.cases import FRAMEWORKS, Framework

Change = tuple[str, str]

ATTENTION = {
    "torch": "torch_impl.attention",
    "linen": "flax_impl.attention",
    "nnx": "flax_impl.attention",
}
MODULES = {
    "torch": "torch_impl.causal_attention",
    "linen": "flax_impl.linen.causal_attention",
    "nnx": "flax_impl.nnx.causal_attention",
}
HEADS = {
    "torch": "torch_impl.multi_head_attention",
    "linen": "flax_impl.linen.multi_head_attention",
    "nnx": "flax_impl.nnx.multi_head_attention",
}
DISPATCH = {
    "torch": "torch_impl.dispatch",
    "linen": "flax_impl.dispatch",
    "nnx": "flax_impl.dispatch",
}
CALL_MASKS = {
    "torch": "torch_impl.call_masks",
    "linen": "flax_impl.call_masks",
    "nnx": "flax_impl.call_masks",
}


class Mutant(NamedTuple):
    """A bug planted in one implementation.

    Attributes:
        name: what is wrong.
        implementation: the framework whose checks must see it.
        module: the module whose source is changed.
        changes: the changes.
        by: who thought it up: the authors of the checks, or a reader who had not seen the catalog.
    """

    name: str
    implementation: Framework
    module: str
    changes: tuple[Change, ...]
    by: Literal["ours", "reader"] = "ours"


def attention(name: str, *changes: Change, only: Framework | None = None) -> list[Mutant]:
    """Return the mutants with these changes in `attention.py`, for all frameworks or only one."""
    return [
        Mutant(name, framework, ATTENTION[framework], changes)
        for framework in FRAMEWORKS
        if only in (None, framework)
    ]


def per_framework(
    name: str, modules: dict[str, str], **changes: Change | tuple[Change, ...]
) -> list[Mutant]:
    """Return the mutants with a framework's own changes, for the frameworks that have any."""
    mutants = []
    for framework in FRAMEWORKS:
        if change := changes.get(framework):
            as_tuple = change if isinstance(change[0], tuple) else (change,)
            mutants.append(Mutant(name, framework, modules[framework], as_tuple))
    return mutants


def classes(name: str, *changes: Change) -> list[Mutant]:
    """Return the mutants with the same changes in the three `causal_attention.py`."""
    return [Mutant(name, framework, MODULES[framework], changes) for framework in FRAMEWORKS]


def heads(name: str, *changes: Change, only: tuple[Framework, ...] = FRAMEWORKS) -> list[Mutant]:
    """Return the mutants with the same changes in the three `multi_head_attention.py`."""
    return [Mutant(name, framework, HEADS[framework], changes) for framework in only]


def dispatch(name: str, *changes: Change) -> list[Mutant]:
    """Return the mutants with the same changes in the `dispatch.py` of each framework."""
    return [Mutant(name, framework, DISPATCH[framework], changes) for framework in FRAMEWORKS]


def flax(name: str, module: str, *changes: Change) -> list[Mutant]:
    """Return the mutants with these changes in a module that both Linen and NNX use."""
    return [Mutant(name, framework, module, changes) for framework in ("linen", "nnx")]


def training(name: str, torch: Change | None, flax: Change | None) -> list[Mutant]:
    """Return the mutants with these changes in the training loops."""
    changes: dict[Framework, Change | None] = {"torch": torch, "linen": flax, "nnx": flax}
    return [
        Mutant(name, framework, "compare.runners.train", (change,))
        for framework, change in changes.items()
        if change
    ]
