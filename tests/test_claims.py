"""Each claim of the pages names the tests that try it."""

import ast
from pathlib import Path

import pytest

from .claims import PAGES, ROOT, TABLE, WIDE, claims, listed, sentences


def named_tests() -> set[str]:
    """Return the tests of the suite: file and name."""
    return {
        f"{path.relative_to(ROOT)}::{node.name}"
        for path in Path(__file__).parent.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_claim_is_tried(page: str) -> None:
    known = {claim["says"]: claim for claim in claims() if claim["page"] == page}
    written = sentences(page)
    assert len(written) > 5
    assert not [text for text in written if text not in known], "add these to tests/claims.toml"
    assert not known.keys() - {*written}, "take these out of tests/claims.toml"
    tests = named_tests()
    for text, claim in known.items():
        assert ("tests" in claim) != ("is" in claim), text
        assert not {*claim.get("tests", [])} - tests, text
        if WIDE.search(text):
            assert claim.get("over"), f"over which set was this tried: {text}"


def test_the_list_is_the_table() -> None:
    assert TABLE.read_text(encoding="utf-8") == listed(), "run `python -m tests.claims`"


def test_a_claim_without_a_test_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = "tests/README.md"
    (tmp_path / "tests").mkdir()
    text = (ROOT / page).read_text(encoding="utf-8")
    (tmp_path / page).write_text(text + "\nThis is fast in every case.\n", encoding="utf-8")
    monkeypatch.setattr("tests.claims.ROOT", tmp_path)
    with pytest.raises(AssertionError, match="add these"):
        test_every_claim_is_tried(page)
