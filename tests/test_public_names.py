"""`import compare` offers every public name; any other name raises AttributeError."""

import pytest

import compare
from compare import cli


@pytest.mark.parametrize("name", compare.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(compare, name) is not None
    assert name in dir(compare)


def test_what_it_does_not_have() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        compare.nonsense  # noqa: B018


def test_the_old_name_of_the_mapping() -> None:
    assert compare.Mapping is compare.StateMapping


def test_the_version_is_one() -> None:
    assert compare.__version__.count(".") == 2
    assert cli.__version__ == compare.__version__
