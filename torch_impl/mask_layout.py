"""Which pairs a stored mask blocks: analysed once, and cached until the mask changes."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

STRIP_QUERIES = 64  # the queries of a strip share the same ranges of keys
STRIPS_IN_WIDE = 8  # a wide strip has 512 queries
ROWS_AT_ONCE = 512  # rows of a mask that are packed at a time
_SHIFTS = torch.arange(8, device="cpu")[:, None]
MAX_CACHED_LENGTHS = 8  # numbers of tokens for which the layout of a mask is cached


class Strip(NamedTuple):
    """Queries `start` to `stop`, and ranges of keys. Keys outside the ranges are all blocked."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]


class MaskLayout(NamedTuple):
    """Which pairs of a query and a key a mask blocks.

    "causal" blocks all keys after the query, and "open" blocks nothing. Otherwise the strips cover
    all unblocked pairs: "strips" if they cover less than half of all pairs, else "wide". Wide
    strips have more queries and a single range of keys.
    """

    kind: Literal["causal", "open", "strips", "wide"]
    strips: tuple[Strip, ...] = ()
    closed_rows: bool = False  # whether some row blocks every key


class _Cached(NamedTuple):
    packed: Tensor
    layout: MaskLayout


# For each mask, by its stamp and its number of tokens.
_cache = WeakIdKeyDictionary()


def mask_layout(
    mask: Shaped[Tensor, "context_length context_length"], num_tokens: int
) -> MaskLayout:
    """Return the layout of the mask's first `num_tokens` rows and columns.

    The layout is cached. On the CPU it is used again only if exactly the same pairs are blocked:
    all of the mask is looked at in each call, whatever was written to it, and how. On other devices
    it is used again until the tensor's version changes, so writes through `.data` or DLPack go
    unnoticed there.
    """
    used_mask = mask.detach()
    if mask.shape != (num_tokens, num_tokens):
        used_mask = used_mask[:num_tokens, :num_tokens]
    is_on_cpu = mask.device.type == "cpu"
    if mask.is_inference() and not is_on_cpu:  # an inference tensor has no version
        return examine(used_mask)
    stamp = None if is_on_cpu else (mask._version, mask.data_ptr(), mask.shape, mask.stride())
    packed = pack(used_mask) if is_on_cpu else torch.empty(0)
    layouts: dict[object, _Cached] = _cache.setdefault(mask, {})
    cached = layouts.pop((num_tokens, stamp), None)
    if cached is None or not torch.equal(cached.packed, packed):
        cached = _Cached(packed, examine(used_mask))
    layouts[num_tokens, stamp] = cached  # the most recently used is last
    if len(layouts) > MAX_CACHED_LENGTHS:
        layouts.pop(next(iter(layouts)), None)
    return cached.layout


def examine(mask: Shaped[Tensor, "tokens tokens"]) -> MaskLayout:
    """Return the layout of a mask. Only one strip is converted to bool at a time."""
    columns = torch.arange(mask.shape[0], device=mask.device)
    if all(torch.equal(blocked, columns > columns[rows, None]) for rows, blocked in _strips(mask)):
        return MaskLayout("causal")
    if not any(blocked.any() for _, blocked in _strips(mask)):
        return MaskLayout("open")
    examined = [
        (Strip(rows.start, rows.stop, _ranges(~blocked.all(dim=0))), bool(blocked.all(dim=1).any()))
        for rows, blocked in _strips(mask)
    ]
    strips = tuple(strip for strip, _ in examined)
    closed_rows = any(has_closed for _, has_closed in examined)
    num_pairs = sum(
        (strip.stop - strip.start) * (stop - start)
        for strip in strips
        for start, stop in strip.keys
    )
    if 2 * num_pairs < mask.numel():
        return MaskLayout("strips", strips, closed_rows)
    wide_strips = tuple(
        _joined(strips[first : first + STRIPS_IN_WIDE])
        for first in range(0, len(strips), STRIPS_IN_WIDE)
    )
    return MaskLayout("wide", wide_strips, closed_rows)


def _joined(strips: tuple[Strip, ...]) -> Strip:
    """Return the strips as one, whose single range goes from the first key to the last."""
    ranges = [keys for strip in strips for keys in strip.keys]
    joined_ranges = (
        ((min(start for start, _ in ranges), max(stop for _, stop in ranges)),) if ranges else ()
    )
    return Strip(strips[0].start, strips[-1].stop, joined_ranges)


def _strips(
    mask: Shaped[Tensor, "tokens tokens"],
) -> Iterator[tuple[slice, Bool[Tensor, "strip tokens"]]]:
    """Yield the rows of each strip, and which of their pairs are blocked."""
    num_tokens = mask.shape[0]
    for start in range(0, num_tokens, STRIP_QUERIES):
        rows = slice(start, min(start + STRIP_QUERIES, num_tokens))
        yield rows, mask[rows].bool()


def _ranges(is_open: Bool[Tensor, " tokens"]) -> tuple[tuple[int, int], ...]:
    """Return the ranges of open keys. A gap of fewer than `STRIP_QUERIES` keys is not cut out."""
    keys = is_open.nonzero().flatten()
    gaps = (keys.diff() > STRIP_QUERIES).nonzero().flatten().tolist()
    starts, stops = [0, *(gap + 1 for gap in gaps)], [*gaps, len(keys) - 1]
    return tuple(
        (int(keys[i]), int(keys[j]) + 1) for i, j in zip(starts, stops, strict=True) if len(keys)
    )


def pack(mask: Shaped[Tensor, "tokens tokens"]) -> Int64[Tensor, " words"]:
    """Return which pairs are blocked, with 64 pairs in a word. Two masks are the same if these are.

    Each word is the sum of 8 words of 8 bools, one byte each, shifted by 0 to 7 bits.
    """
    packed = []
    for rows in mask.split(ROWS_AT_ONCE):
        # Any nonzero entry becomes True.
        blocked = rows.to(torch.bool, copy=True, memory_format=torch.contiguous_format)
        columns, height = -blocked.shape[1] % 8, -blocked.shape[0] % 8
        if columns or height:
            blocked = F.pad(blocked, (0, columns, 0, height))
        words = blocked.view(torch.int64).view(8, -1)
        packed.append(words.bitwise_left_shift_(_SHIFTS).sum(dim=0))
    return packed[0] if len(packed) == 1 else torch.cat(packed)
