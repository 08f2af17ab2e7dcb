"""The claims of the pages, each with the tests that try it; `python -m tests.claims` lists them.

A claim is a sentence of a page, an item of a list or a row of a table. `claims.toml` says for each
which tests try it, or what it is if there is nothing to try: an instruction, a definition, a figure
that a person reads off a record. Tables between markers are compared with records elsewhere.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    "compare/README.md",
    "compare/bench/README.md",
    "compare/checkpoint/README.md",
    "compare/conversion/README.md",
    "compare/ports/README.md",
    "compare/proof/README.md",
    "flax_impl/README.md",
    "tests/README.md",
    "torch_impl/README.md",
)
TABLE = Path(__file__).parent / "CLAIMS.md"
_SKIPPED = re.compile(r"```.*?```|<!-- table: .*?<!-- end -->|!\[[^\]]*\]\([^)]*\)", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`*\[])")
# Words that promise a whole set; a claim with one of them says over which set it was tried.
WIDE = re.compile(r"\b(every|any|always|never)\b", re.IGNORECASE)


def sentences(page: str) -> list[str]:
    """Return the sentences, list items and table rows of a page, each in one line."""
    found: list[str] = []
    text = _SKIPPED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
        if any(line.startswith("|") for line in lines):
            rows = [line.strip("| ") for line in lines if line.startswith("|")]
            found += [row for row in rows[2:] if row]
            lines = [line for line in lines if not line.startswith("|")]
        items = re.split(r"\n(?=(?:- |\d+\. ))", "\n".join(lines))
        for item in items:
            text = re.sub(r"^(- |\d+\. )", "", " ".join(item.split()))
            found += _SENTENCE_END.split(text)
    return [sentence for sentence in found if sentence]


def claims() -> list[dict[str, Any]]:
    """Return what `claims.toml` says of each sentence.

    The fields: `page`, `says`, and `tests`, or `is` if there is nothing to try. `over` says over
    which set a promise about every case was tried.
    """
    path = Path(__file__).parent / "claims.toml"
    return list(tomllib.loads(path.read_text(encoding="utf-8"))["claim"])


def listed() -> str:
    """Return the page that lists each claim with what tries it."""
    lines = [
        "# Claims",
        "",
        "Made by `python -m tests.claims`. What stands in brackets is no test.",
    ]
    for page in PAGES:
        lines += ["", f"## {page}", "", "| claim | tried by |", "| --- | --- |"]
        for claim in claims():
            if claim["page"] == page:
                tests = ", ".join(f"`{name}`" for name in claim.get("tests", []))
                over = f" (over {claim['over']})" if "over" in claim else ""
                says = claim["says"].replace(" | ", " / ")
                lines.append(f"| {says} | {tests or '(' + claim['is'] + ')'}{over} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(listed(), encoding="utf-8")
