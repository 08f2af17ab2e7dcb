"""What a stored mask closes: looked at once, and remembered until the mask changes."""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

STRIP = 64  # queries that share the ranges of keys that they look at
WIDE = 8  # strips that make a wide one
RUN = 32  # words of 8 bytes
LENGTHS = 8  # of inputs, for which what was seen is kept


class Strip(NamedTuple):
    """Queries `start` to `stop`, and the ranges of keys outside of which all are closed to all of them."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]


class MaskLayout(NamedTuple):
    """What a mask closes: what a causal one does, nothing, or all that is outside of the strips' keys.

    `wide` are strips of more queries, each with one range of keys, where these are half of all
    pairs or more.
    """

    kind: Literal["causal", "open", "strips", "wide"]
    strips: tuple[Strip, ...] = ()
    closed_rows: bool = False  # whether some row is blocked everywhere


class _Seen(NamedTuple):
    stamp: tuple[object, ...]
    of_tokens: dict[int, tuple[Tensor, MaskLayout]]  # sums and layout, by how many tokens


_seen = WeakIdKeyDictionary()


def mask_layout(
    mask: Shaped[Tensor, "context_length context_length"], num_tokens: int
) -> MaskLayout:
    """Return what the mask closes in its first `num_tokens` rows and columns.

    A tensor is looked at again when its version says that it was written to. Writes through
    `.data`, NumPy or DLPack leave the version alone, so on the CPU sums over runs of its bits are
    compared too: only entries that change places within `RUN` words of one row would go unseen.
    Elsewhere such writes do.
    """
    square = mask[:num_tokens, :num_tokens]
    sums = _sums(square)
    if mask.is_inference() or sums is None:  # has no version, or no sums
        return examine(square)
    stamp = (mask._version, mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, mask.device)
    seen: _Seen | None = _seen.get(mask)
    if seen is None or seen.stamp != stamp:
        seen = _seen[mask] = _Seen(stamp, {})
    known = seen.of_tokens.pop(num_tokens, None)
    if known is None or not torch.equal(known[0], sums):
        known = sums, examine(square)
    seen.of_tokens[num_tokens] = known  # the last used comes last
    if len(seen.of_tokens) > LENGTHS:
        seen.of_tokens.pop(next(iter(seen.of_tokens)), None)
    return known[1]


def examine(mask: Shaped[Tensor, "tokens tokens"]) -> MaskLayout:
    """Return what the mask closes; of a large one, only a strip at a time is in memory."""
    columns = torch.arange(mask.shape[0], device=mask.device)
    if all(torch.equal(blocked, columns > columns[at, None]) for at, blocked in _rows(mask)):
        return MaskLayout("causal")
    if not any(blocked.any() for _, blocked in _rows(mask)):
        return MaskLayout("open")
    found = [
        (at, _ranges(~blocked.all(dim=0)), bool(blocked.all(dim=1).any()))
        for at, blocked in _rows(mask)
    ]
    strips = tuple(Strip(at.start, at.stop, keys) for at, keys, _ in found)
    closed_rows = any(has_closed for _, _, has_closed in found)
    pairs = sum(
        (strip.stop - strip.start) * (stop - start)
        for strip in strips
        for start, stop in strip.keys
    )
    if 2 * pairs < mask.numel():
        return MaskLayout("strips", strips, closed_rows)
    return MaskLayout(
        "wide",
        tuple(_joined(strips[at : at + WIDE]) for at in range(0, len(strips), WIDE)),
        closed_rows,
    )


def _joined(strips: tuple[Strip, ...]) -> Strip:
    """Return them as one, with all keys from the first to the last."""
    ranges = [keys for strip in strips for keys in strip.keys]
    around = (
        ((min(start for start, _ in ranges), max(stop for _, stop in ranges)),) if ranges else ()
    )
    return Strip(strips[0].start, strips[-1].stop, around)


def _rows(
    mask: Shaped[Tensor, "tokens tokens"],
) -> Iterator[tuple[slice, Bool[Tensor, "strip tokens"]]]:
    num_tokens = mask.shape[0]
    for start in range(0, num_tokens, STRIP):
        at = slice(start, min(start + STRIP, num_tokens))
        yield at, mask[at].bool()


def _ranges(is_open: Bool[Tensor, " tokens"]) -> tuple[tuple[int, int], ...]:
    """Return where the open keys lie; a gap no longer than a strip is not worth a range of its own."""
    keys = is_open.nonzero().flatten()
    gaps = (keys.diff() > STRIP).nonzero().flatten().tolist()
    starts, stops = [0, *(gap + 1 for gap in gaps)], [*gaps, len(keys) - 1]
    return tuple(
        (int(keys[i]), int(keys[j]) + 1) for i, j in zip(starts, stops, strict=True) if len(keys)
    )


def _sums(mask: Shaped[Tensor, "tokens tokens"]) -> Tensor | None:
    """Return sums over runs of a mask's bits, none on a GPU, None where 8 bytes straddle two rows."""
    if mask.device.type != "cpu":
        return torch.empty(0)
    if mask.stride(1) != 1 or any(
        size * mask.element_size() % 8 for size in (mask.shape[1], mask.stride(0))
    ):
        return None
    bits = mask.view(torch.int64)
    return bits.unflatten(1, (-1, math.gcd(bits.shape[1], RUN))).sum(dim=2)
