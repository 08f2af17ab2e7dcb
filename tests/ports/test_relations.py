"""How values that do not match are related, and which orders of entries are orders of axes."""

import numpy as np
import pytest

from compare.ports.fingerprints import close, is_order_of_axes, order_between, same_value, typical
from compare.ports.relations import related

VALUES = np.random.default_rng(0).standard_normal((4, 6, 5))


@pytest.mark.parametrize(
    ("other", "hint"),
    [
        (VALUES * np.sqrt(6), "= √6"),
        (VALUES / 5, "= 1/5"),
        (VALUES * np.log(2), "= log 2"),
        (VALUES * 8 / 7, "n/(n-1) for n = 8"),
        (-VALUES, "negative"),
        (VALUES + 0.25, "plus 0.25"),
        (np.roll(VALUES, 2, axis=1), "rolled by 2 along axis 1"),
        (VALUES[:, ::-1], "flipped along axis 1"),
        (np.roll(VALUES, 3, axis=1), "halves are exchanged along axis 1"),
        (VALUES[:, [1, 0, 3, 2, 5, 4]], "permuted along axis 1"),
        (VALUES.astype(np.float32).astype(np.float64), "rounded to float32"),
        (VALUES * (1 + 1e-3 * np.sin(VALUES)), "another variant"),
        (np.where(np.arange(5) < 3, VALUES, 2 * VALUES + 1), "60% of the entries are equal"),
        (VALUES * np.arange(1.0, 6.0)[None, None], "the same along axis 0"),
    ],
)
def test_the_hint(other: np.ndarray, hint: str) -> None:
    found = related(VALUES, other)
    assert found is not None
    assert hint in found.hint, found.hint


def test_masks_are_compared_as_masks() -> None:
    lower = np.tril(np.ones((5, 5), bool))
    opposite = related(lower, ~lower)
    assert opposite is not None
    assert "the opposite" in opposite.hint
    shifted = related(lower, np.tril(np.ones((5, 5), bool), 1))
    assert shifted is not None
    assert "entries differ: shifted by" in shifted.hint
    assert related(lower, VALUES[0, :5]) is None


@pytest.mark.parametrize(
    ("other", "is_axes"),
    [
        (VALUES.transpose(2, 0, 1), True),
        (VALUES.reshape(4, 2, 3, 5).transpose(0, 2, 1, 3).reshape(4, 30), True),
        (np.roll(VALUES, 1, axis=0), False),
        (VALUES[::-1], False),
        (np.random.default_rng(1).permutation(VALUES.ravel()).reshape(VALUES.shape), False),
    ],
)
def test_an_order_of_axes_is_told_from_others(other: np.ndarray, is_axes: bool) -> None:
    order = order_between(VALUES, other)
    assert order is not None
    assert is_order_of_axes(order) is is_axes
    if other.ndim == 3:
        assert same_value(VALUES, other, is_few=False) is is_axes


def test_scores_behind_a_mask_do_not_count() -> None:
    scores = np.where(np.tril(np.ones((6, 5), bool)), VALUES, -1e30)
    assert typical(scores) < 10
    changed = np.where(scores > -1e29, scores * (1 + 1e-6), scores)
    assert not close(changed, scores).all()


def test_few_numbers_match_only_in_their_places() -> None:
    index = np.array([[0, 1, 2], [2, 0, 1]])
    assert same_value(index, index.T, is_few=True)
    assert same_value(index[0], np.repeat(index[:1], 4, axis=0), is_few=True)
    assert not same_value(index, index[:, ::-1], is_few=True)
    assert not same_value(index[0], index[1], is_few=True)
