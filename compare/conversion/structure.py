"""Propose which modules of two models are the same, from their shapes, their numbers and names.

A unit is a module that holds tensors itself. Units whose names differ only in numbers make a
series, such as the layers of a stack. Series are paired one after another, the surest first: those
that nothing else of their sizes can be, then those whose names and neighbors fit best.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import compress
from math import prod
from typing import Literal, NamedTuple

import numpy as np

Shape = tuple[int, ...]
Sizes = frozenset[tuple[str, int]]  # each leaf, as torch calls it, and its number of values
Why = Literal["shapes", "names", "order"]
Numbers = Callable[[str], tuple[str, list[int]]]

# How much better than any other pair the names of a series must fit.
MARGIN = 0.05
# With more series that may be the same, none is proposed: it would take minutes.
MOST = 200
# Names of the field for one thing. What is left out says nothing.
_WORDS = {
    "query": "query q wq qproj",
    "key": "key k wk",
    "value": "value v wv",
    "out": "out o output",
    "attention": "attention attn att mha selfattention",
    "cross": "cross encdec xattn crossattention",
    "norm": "norm ln layernorm rmsnorm layernorms bn batchnorm groupnorm gn",
    "embedding": "embedding embeddings embed embedder emb",
    "token": "token tokens tok wte word words shared vocab",
    "position": "position positions positional pos wpe",
    "mlp": "mlp ffn ff feedforward intermediate",
    "up": "up fc1 wi fc expand inner",
    "down": "down fc2 expanded outer",
    "gate": "gate gated",
    "head": "head classifier logits lmhead decoderhead",
    "final": "final f last",
    "first": "first before pre input",
    "second": "second after post",
    "convolution": "conv convolution conv1d conv2d",
    "encoder": "encoder enc",
    "decoder": "decoder dec",
    "weight": "weight kernel scale gamma",
    "bias": "bias beta",
    "skip": "skip downsample shortcut residual",
}
_WORD_OF = {name: word for word, names in _WORDS.items() for name in names.split()}
_ORDINALS = {"1": "first", "2": "second"}
_SILENT = frozenset(
    (
        *("proj", "projection", "linear", "dense", "layer", "layers", "block", "blocks"),
        *("module", "model", "w", "c", "to", "self"),
    )
)


class Unit(NamedTuple):
    """A module that holds tensors itself: its steps, and its leaves as torch calls them."""

    steps: tuple[str, ...]
    sizes: Sizes


class Series(NamedTuple):
    """Units whose names differ only in numbers, by these numbers, in order."""

    steps: tuple[str, ...]
    units: dict[tuple[int, ...], Unit]


class Pair(NamedTuple):
    """A series of torch and a series of Flax that are the same, and what says so."""

    torch: Series
    flax: Series
    why: Why

    def units(self) -> Iterator[tuple[Unit, Unit]]:
        """Yield the units of torch and of Flax, number by number, or in order."""
        if self.torch.units.keys() == self.flax.units.keys():
            yield from ((unit, self.flax.units[key]) for key, unit in self.torch.units.items())
        else:
            yield from zip(self.torch.units.values(), self.flax.units.values(), strict=True)


def units_of(entries: Mapping[str, Shape]) -> list[Unit]:
    """Return the units of the dotted names of entries, in order; leaves are as torch calls them.

    A name with a star is in none: a rule cannot say it.
    """
    leaves: dict[str, list[tuple[str, int]]] = {}
    for name, shape in entries.items():
        prefix, _, leaf = name.rpartition(".")
        leaves.setdefault(prefix, []).append((leaf, prod(shape)))
    return [
        Unit(tuple(prefix.split(".")) if prefix else (), frozenset(items))
        for prefix, items in leaves.items()
        if "*" not in prefix
    ]


def pair_units(torch: Sequence[Unit], flax: Sequence[Unit]) -> list[Pair]:
    """Return the pairs of series that are the same, the surest first."""
    pairs = exact_pairs(torch, flax)
    for find in (_surest, _in_order):
        for numbers in (_step_numbers, _all_numbers, _no_numbers):
            paired = {id(unit) for pair in pairs for units in pair.units() for unit in units}
            own, others = (
                _series([unit for unit in side if id(unit) not in paired], numbers)
                for side in (torch, flax)
            )
            while new := _surest(own, others, pairs) or find(own, others, pairs):
                pairs += new
                done = {id(series) for pair in new for series in (pair.torch, pair.flax)}
                own, others = (
                    [series for series in side if id(series) not in done] for side in (own, others)
                )
    return pairs


def _step_numbers(step: str) -> tuple[str, list[int]]:
    """Return the step with a star for what numbers it: "3", and "layers_3" in Flax."""
    fit = re.fullmatch(r"(.*_)?(\d+)", step)
    return (f"{fit[1] or ''}*", [int(fit[2])]) if fit else (step, [])


def _all_numbers(step: str) -> tuple[str, list[int]]:
    return re.sub(r"\d+", "*", step), [int(number) for number in re.findall(r"\d+", step)]


def _no_numbers(step: str) -> tuple[str, list[int]]:
    return step, []


def _series(units: Iterable[Unit], numbers: Numbers) -> list[Series]:
    """Return the series of units of the same sizes, in the order of their first units.

    A number that all units of a series share stays in their name.
    """
    found: dict[tuple[tuple[str, ...], Sizes], dict[tuple[int, ...], Unit]] = {}
    for unit in units:
        starred = [numbers(step) for step in unit.steps]
        name = tuple(step for step, _ in starred)
        number = tuple(number for _, those in starred for number in those)
        found.setdefault((name, unit.sizes), {})[number] = unit
    return [_with_shared_numbers(name, those) for (name, _), those in found.items()]


def _with_shared_numbers(steps: tuple[str, ...], units: Mapping[tuple[int, ...], Unit]) -> Series:
    """Return the series, with the numbers in its name that do not tell its units apart."""
    columns = list(zip(*units, strict=True))
    varies = [len({*column}) > 1 for column in columns]
    marks = iter(
        "*" if changes else str(column[0]) for changes, column in zip(varies, columns, strict=True)
    )
    name = tuple(re.sub(r"\*", lambda _: next(marks), step) for step in steps)
    keys = {tuple(compress(number, varies)): unit for number, unit in units.items()}
    return Series(name, dict(sorted(keys.items())))


def _groups(
    torch: Sequence[Series], flax: Sequence[Series]
) -> Iterator[tuple[list[Series], list[Series]]]:
    """Yield the series of torch and those of Flax that have as many units of the same sizes."""
    groups: dict[tuple[int, Sizes], tuple[list[Series], list[Series]]] = {}
    for index, side in enumerate((torch, flax)):
        for series in side:
            key = len(series.units), next(iter(series.units.values())).sizes
            groups.setdefault(key, ([], []))[index].append(series)
    yield from (group for group in groups.values() if all(group) and max(map(len, group)) <= MOST)


def _surest(torch: Sequence[Series], flax: Sequence[Series], pairs: Sequence[Pair]) -> list[Pair]:
    """Return pairs of series that are the only ones possible, or whose names fit best by far."""
    found = []
    for own, others in _groups(torch, flax):
        if len(own) == len(others) == 1:
            found.append(Pair(own[0], others[0], "shapes"))
            continue
        scores = likeness(own, others, pairs)
        for index, (one, row) in enumerate(zip(own, scores, strict=True)):
            best = int(row.argmax())
            rivals = np.append(np.delete(row, best), np.delete(scores[:, best], index))
            if row[best] - rivals.max() > MARGIN:
                found.append(Pair(one, others[best], "names"))
    return found


def _in_order(
    torch: Sequence[Series], flax: Sequence[Series], _pairs: Sequence[Pair]
) -> list[Pair]:
    """Return the pairs, in order, of the first series that as many of Flax can be."""
    for own, others in _groups(torch, flax):
        if len(own) == len(others):
            ordered = sorted(others, key=lambda series: list(map(_natural, series.steps)))
            return [Pair(*both, "order") for both in zip(own, ordered, strict=True)]
    return []


def _natural(step: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts "layers_10" after "layers_9"."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in re.split(r"(\d+)", step)
    ]


def likeness(torch: Sequence[Series], flax: Sequence[Series], pairs: Sequence[Pair]) -> np.ndarray:
    """Return how well each series of torch fits each of Flax, from 0 to 3, (torch, Flax).

    The words of the last step, those of all steps, and the neighbors, near and far, count alike.
    """
    scores = _beside(torch, flax, pairs)
    for words in (_last_words, _all_words):
        own, others = list(map(words, torch)), list(map(words, flax))
        scores = scores + np.array([[_overlap(one, other) for other in others] for one in own])
    return scores


def _all_words(series: Series) -> set[str]:
    return _words(series.steps)


def _last_words(series: Series) -> set[str]:
    """Return the words of the last step. "norm1" is the first norm, but "Dense_1" the second."""
    fit = re.fullmatch(r"[a-z_]+([12])", "".join(series.steps[-1:]))
    return _words(series.steps[-1:]) | ({_ORDINALS[fit[1]]} if fit else set())


def _words(steps: Iterable[str]) -> set[str]:
    """Return the words of the steps; each of the field's names for one thing is one word."""
    joined = "_".join(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", step) for step in steps).lower()
    found = set()
    for name in re.split(r"[^a-z0-9]+", joined):
        for part in (name,) if name in _WORD_OF else re.findall(r"[a-z]+", name):
            if part not in _SILENT:
                found.add(_WORD_OF.get(part, part))
    return found


def _overlap(one: set[str], other: set[str]) -> float:
    return 2 * len(one & other) / (len(one) + len(other)) if one or other else 0.0


def _beside(torch: Sequence[Series], flax: Sequence[Series], pairs: Sequence[Pair]) -> np.ndarray:
    """Return the share of the neighbors of both series that are neighbors of both, by pair."""
    near = [
        np.array([[_shared(series.steps, other.steps) for other in others] for series in side])
        for side, others in (
            (torch, [pair.torch for pair in pairs]),
            (flax, [pair.flax for pair in pairs]),
        )
    ]
    own, other = near[0][:, None], near[1][None]
    weight = np.maximum(own, other).sum(axis=-1)
    return np.minimum(own, other).sum(axis=-1) / np.where(weight == 0.0, 1.0, weight)


def _shared(one: Sequence[str], other: Sequence[str]) -> float:
    """Return the share of the modules above one that are above the other too."""
    above = one[:-1]
    same = 0
    for step, twin in zip(above, other[:-1], strict=False):
        if step != twin:
            break
        same += 1
    return same / len(above) if above else 0.0


def exact_pairs(torch: Sequence[Unit], flax: Sequence[Unit]) -> list[Pair]:
    """Return the pairs of units that have the same name and sizes."""
    by_name = {unit.steps: unit for unit in flax}
    return [
        Pair(Series(unit.steps, {(): unit}), Series(unit.steps, {(): by_name[unit.steps]}), "names")
        for unit in torch
        if unit.steps in by_name and by_name[unit.steps].sizes == unit.sizes
    ]
