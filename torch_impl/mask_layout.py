"""Which pairs a stored mask blocks: analysed once, and cached until the mask changes."""

import weakref
from bisect import bisect
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
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
MIN_EXAMINED_TOKENS = 1024  # a growing prompt is examined once up to here, then at each doubling
MAX_CACHED_LENGTHS = 8  # numbers of tokens for which the layout of a mask is cached
MAX_COMPARED = 8  # masks seen before that a new one is compared with


class Strip(NamedTuple):
    """Queries `start` to `stop`, and ranges of keys. Keys outside the ranges are all blocked."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]


class MaskLayout(NamedTuple):
    """Which pairs of a query and a key a mask blocks.

    "causal" blocks all keys after the query, and "open" blocks nothing. Otherwise the strips cover
    all unblocked pairs: "strips" if they cover less than half of all pairs, else "wide". Wide
    strips have more queries and a single range of keys. `blocked` and `closed` are copies: a later
    edit of the mask does not change them.
    """

    kind: Literal["causal", "open", "strips", "wide"]
    strips: tuple[Strip, ...] = ()
    blocked: Bool[Tensor, "tokens tokens"] | None = None  # None if causal or open
    closed: Bool[Tensor, "tokens 1"] | None = None  # the rows that block every key, if there are


@dataclass(eq=False)
class Examined:
    """The first rows and columns of a mask, as they were when they were examined.

    Attributes:
        size: how many rows and columns were examined.
        packed: which pairs are blocked, as `pack` returns it.
        causal_until: with up to this many tokens, the mask is causal.
        open_until: with up to this many tokens, the mask blocks nothing.
        blocked: which pairs are blocked, or None if the mask is causal or open throughout.
    """

    size: int
    packed: Int64[Tensor, "groups words"]
    causal_until: int
    open_until: int
    blocked: Bool[Tensor, "size size"] | None
    layouts: dict[int, MaskLayout] = field(default_factory=dict)

    def layout(self, num_tokens: int) -> MaskLayout:
        """Return the layout of the first `num_tokens` rows and columns."""
        layout = self.layouts.pop(num_tokens, None)
        if layout is None:
            with torch.inference_mode(False):
                layout = self._layout(num_tokens)
        self.layouts[num_tokens] = layout  # the most recently used is last
        if len(self.layouts) > MAX_CACHED_LENGTHS:
            self.layouts.pop(next(iter(self.layouts)), None)
        return layout

    def _layout(self, num_tokens: int) -> MaskLayout:
        if num_tokens <= self.causal_until:
            return MaskLayout("causal")
        if num_tokens <= self.open_until or self.blocked is None:
            return MaskLayout("open")
        blocked = self.blocked[:num_tokens, :num_tokens]
        is_closed = self._first_open[:num_tokens, None] >= num_tokens
        closed = is_closed if is_closed.any() else None
        strips = tuple(
            Strip(strip.start, min(strip.stop, num_tokens), _first_keys(strip.keys, num_tokens))
            for strip in self._strips
            if strip.start < num_tokens
        )
        num_pairs = sum(
            (strip.stop - strip.start) * (stop - start)
            for strip in strips
            for start, stop in strip.keys
        )
        if 2 * num_pairs < num_tokens**2:
            return MaskLayout("strips", strips, blocked, closed)
        wide_strips = tuple(
            _joined(strips[first : first + STRIPS_IN_WIDE])
            for first in range(0, len(strips), STRIPS_IN_WIDE)
        )
        return MaskLayout("wide", wide_strips, blocked, closed)

    @cached_property
    def _strips(self) -> tuple[Strip, ...]:
        assert self.blocked is not None
        return tuple(
            Strip(start, start + len(rows), _ranges(~rows.all(dim=0)))
            for start, rows in zip(
                range(0, len(self.blocked), STRIP_QUERIES),
                self.blocked.split(STRIP_QUERIES),
                strict=True,
            )
        )

    @cached_property
    def _first_open(self) -> Int64[Tensor, " size"]:
        """The first key that each row does not block; `size` if it blocks all of them.

        It is 0 for a row that does not block its own token.
        """
        assert self.blocked is not None
        first = torch.zeros(len(self.blocked), dtype=torch.int64, device=self.blocked.device)
        # A row that does not block its own token is not closed, however many tokens are used.
        rows = self.blocked.diagonal().nonzero().flatten()
        blocked = self.blocked[rows]
        first_open = blocked.logical_not().byte().argmax(dim=1)
        first[rows] = first_open.masked_fill(blocked.all(dim=1), len(self.blocked))
        return first


# What is known of each mask: on a CPU, and on other devices with the version of the mask.
_cache = WeakIdKeyDictionary()
_versions = WeakIdKeyDictionary()
# The last masks examined on a CPU.
_recent: deque[weakref.ref[Examined]] = deque(maxlen=MAX_COMPARED)


def mask_layout(
    mask: Shaped[Tensor, "context_length context_length"], num_tokens: int
) -> MaskLayout:
    """Return the layout of the mask's first `num_tokens` rows and columns.

    The layout is cached. On the CPU it is used again only if exactly the same pairs are blocked:
    all of the mask is looked at in each call, whatever was written to it, and how. On other devices
    it is used again until the tensor's version changes, so writes through `.data` or DLPack go
    unnoticed there.
    """
    examined = _examined_by_values if _is_on_cpu(mask) else _examined_by_version
    return examined(mask, num_tokens).layout(num_tokens)


def _is_on_cpu(mask: Tensor) -> bool:
    """Return whether all of the mask is looked at in each call."""
    return mask.device.type == "cpu"


def _rows_to_examine(mask: Tensor, num_tokens: int) -> Tensor:
    """Return more than the tokens need, so that a growing prompt is not examined at each length."""
    size = max(MIN_EXAMINED_TOKENS, 1 << (num_tokens - 1).bit_length())
    return mask.detach()[:size, :size]


def _examined_by_values(mask: Tensor, num_tokens: int) -> Examined:
    """Return what is known of this mask, or of another one that blocks the same pairs."""
    cached = _cache.get(mask)
    packed = pack(mask.detach()[:num_tokens, :num_tokens])
    if cached is not None and _is_of(cached, packed, num_tokens):
        return cached
    rows = _rows_to_examine(mask, num_tokens)
    packed = pack(rows)
    for reference in _recent:
        examined = reference()
        if examined is not None and _is_of(examined, packed, len(rows)):
            break
    else:
        examined = examine(rows, packed)
        _recent.append(weakref.ref(examined))
    _cache[mask] = examined
    return examined


def _is_of(examined: Examined, packed: Int64[Tensor, "groups words"], num_tokens: int) -> bool:
    """Return whether `packed`, of `num_tokens` rows and columns, is what was examined."""
    return num_tokens <= examined.size and torch.equal(
        first_packed(examined.packed, num_tokens), packed
    )


def _examined_by_version(mask: Tensor, num_tokens: int) -> Examined:
    """Return what is known of this version of the mask."""
    if mask.is_inference():  # an inference tensor has no version
        return examine(mask.detach()[:num_tokens, :num_tokens])
    stamp = (mask._version, mask.data_ptr(), mask.shape, mask.stride())
    cached_stamp, cached = _versions.get(mask, (None, None))
    if cached is not None and cached_stamp == stamp and num_tokens <= cached.size:
        return cached
    examined = examine(_rows_to_examine(mask, num_tokens))
    _versions[mask] = stamp, examined
    return examined


def examine(mask: Shaped[Tensor, "size size"], packed: Tensor | None = None) -> Examined:
    """Return what is known of a mask. What is kept is a copy, 1 byte for each pair."""
    with torch.inference_mode(False):  # a tensor of inference mode is of no use in training
        packed = pack(mask) if packed is None else packed
        size = len(mask)
        causal_until = _tokens_without(packed ^ _causal(packed), size)
        open_until = _tokens_without(packed, size)
        is_plain = max(causal_until, open_until) == size
        blocked = None if is_plain else mask.to(torch.bool, copy=True)
        return Examined(size, packed, causal_until, open_until, blocked)


def _tokens_without(packed: Int64[Tensor, "groups words"], size: int) -> int:
    """Return how many of the mask's tokens, from the first on, have none of these pairs."""
    numbers = range(1, size + 1)
    return bisect(numbers, False, key=lambda number: bool(first_packed(packed, number).any()))


def _causal(packed: Int64[Tensor, "groups words"]) -> Int64[Tensor, "groups words"]:
    """Return a causal mask, packed in the same shape."""
    first = pack(torch.ones(8, 8, dtype=torch.bool, device=packed.device).triu(1))
    return torch.ones_like(packed).triu(1).neg() + torch.ones_like(packed).triu().tril() * first


def _first_keys(
    ranges: tuple[tuple[int, int], ...], num_tokens: int
) -> tuple[tuple[int, int], ...]:
    return tuple((start, min(stop, num_tokens)) for start, stop in ranges if start < num_tokens)


def _joined(strips: tuple[Strip, ...]) -> Strip:
    """Return the strips as one, whose single range goes from the first key to the last."""
    ranges = [keys for strip in strips for keys in strip.keys]
    joined_ranges = (
        ((min(start for start, _ in ranges), max(stop for _, stop in ranges)),) if ranges else ()
    )
    return Strip(strips[0].start, strips[-1].stop, joined_ranges)


def _ranges(is_open: Bool[Tensor, " tokens"]) -> tuple[tuple[int, int], ...]:
    """Return the ranges of open keys. A gap of fewer than `STRIP_QUERIES` keys is not cut out."""
    keys = is_open.nonzero().flatten()
    gaps = (keys.diff() > STRIP_QUERIES).nonzero().flatten().tolist()
    starts, stops = [0, *(gap + 1 for gap in gaps)], [*gaps, len(keys) - 1]
    return tuple(
        (int(keys[i]), int(keys[j]) + 1) for i, j in zip(starts, stops, strict=True) if len(keys)
    )


def pack(mask: Shaped[Tensor, "tokens tokens"]) -> Int64[Tensor, "groups words"]:
    """Return which pairs are blocked, with 64 pairs in a word. Two masks are the same if these are.

    A word holds 8 rows of 8 columns: bit r of byte c is the pair of row r and column c.
    """
    return torch.cat([_packed_rows(rows) for rows in mask.split(ROWS_AT_ONCE)])


def _packed_rows(rows: Shaped[Tensor, "rows tokens"]) -> Int64[Tensor, "groups words"]:
    # Any nonzero entry becomes True.
    blocked = rows.to(torch.bool, copy=True, memory_format=torch.contiguous_format)
    columns, height = -blocked.shape[1] % 8, -blocked.shape[0] % 8
    if columns or height:
        blocked = F.pad(blocked, (0, columns, 0, height))
    words = blocked.view(torch.int64).view(len(blocked) // 8, 8, -1)
    return words.bitwise_left_shift_(_SHIFTS.to(words.device)).sum(dim=1)


def first_packed(
    packed: Int64[Tensor, "groups words"], num_tokens: int
) -> Int64[Tensor, "first_groups first_words"]:
    """Return what `pack` returns of the first `num_tokens` rows and columns of the mask."""
    size = -(-num_tokens // 8)
    packed = packed[:size, :size]
    if num_tokens % 8 and packed.numel():
        packed = packed.clone()
        rows_and_columns = packed.view(torch.uint8)
        rows_and_columns[:, num_tokens:] = 0
        rows_and_columns[-1] &= 2 ** (num_tokens % 8) - 1
    return packed


def unpack(packed: Int64[Tensor, "groups words"], num_tokens: int) -> Bool[Tensor, "tokens tokens"]:
    """Return which pairs are blocked: the inverse of `pack`."""
    bits = packed.view(torch.uint8)[:, None] >> _SHIFTS.to(packed.device, torch.uint8) & 1
    return bits.view(torch.bool).flatten(0, 1)[:num_tokens, :num_tokens]
