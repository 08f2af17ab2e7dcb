"""The READMEs are true: snippets run, tables equal the records, links and commands work."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flax import nnx

from compare.mutants import MUTANTS, READERS

from .record_tables import BLOCK, READMES, TABLES, filled, record
from .support import linen_variables, nnx_model, torch_module

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = {
    f"{path.parent.relative_to(ROOT)}-{number}": snippet
    for path in READMES
    for number, snippet in enumerate(
        re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    )
}


@pytest.mark.parametrize("snippet", SNIPPETS.values(), ids=SNIPPETS)
@pytest.mark.slow
def test_snippets_run(snippet: str, tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{snippet}"
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_first_screen() -> None:
    """The README begins with one sentence, two commands, and code that does a user's job."""
    assert len(README.splitlines()) <= 170
    first = README.partition("## ")[0]
    assert first.count("```sh") == 2
    assert all(f"compare.{name}(" in first for name in ("match", "torch_to_nnx", "save_checkpoint"))


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_the_tables_are_the_records(path: Path) -> None:
    """Each table is compared whole, so an extra row and a missing row both fail."""
    text = path.read_text(encoding="utf-8")
    assert text == filled(text), "run `python -m tests.record_tables`"


def test_every_table_is_shown_once() -> None:
    shown = [block[1] for path in READMES for block in BLOCK.findall(path.read_text("utf-8"))]
    assert sorted(shown) == sorted(TABLES)


def test_a_wrong_table_is_seen() -> None:
    text = (ROOT / "compare/proof/README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines(keepends=True) if line.startswith("| float32"))
    assert filled(text.replace(row, row * 2)) != text.replace(row, row * 2)
    assert filled(text.replace(row, "")) != text.replace(row, "")


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_commands_start_from_a_bare_clone() -> None:
    commands = re.findall(r"```sh\n(.*?)\n```", README)
    assert [command.split(" && ")[-1] for command in commands] == [
        *(".venv/bin/python -m compare", ".venv/bin/python -m pytest")
    ]
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)


def test_the_state_table() -> None:
    """What each framework moves, saves and trains: weights, buffer and plain mask."""
    for buffer in (True, False):
        module = torch_module(buffer=buffer).to("meta")
        assert module.W_key.weight.is_meta
        assert module.mask.is_meta is buffer
        assert ("mask" in module.state_dict()) is buffer
        assert "mask" not in dict(module.named_parameters())
        assert ("buffers" in linen_variables(buffer=buffer)) is buffer
        state = nnx.state(nnx_model(buffer=buffer))
        assert isinstance(state["mask"], nnx.Variable) is buffer
        assert not isinstance(state["mask"], nnx.Param)
    assert isinstance(torch_module().W_key.weight, torch.nn.Parameter)


def test_the_records_are_of_the_code() -> None:
    assert record("bound")["command"] == "compare bound --cases 10000 --seed 0"
    honest, planted = record("mutants")["sections"]
    grid = next(
        block
        for block in planted["blocks"]
        if isinstance(block, dict) and isinstance(block["rows"], dict)
    )
    current = {f"{mutant.name} ({mutant.implementation})" for mutant in (*MUTANTS, *READERS)}
    assert set(grid["rows"]) == current, (
        "the record has different planted bugs; run `compare mutants --json`"
    )
    assert [check["held"] for check in honest["checks"]] == [True]
    page = README.replace("\n", " ")
    assert f" {len(MUTANTS)} planted bugs " in page
    assert f"thought up {len(READERS)} more" in page


def test_the_errors_of_fused_attention_are_the_records() -> None:
    record = json.loads((ROOT / "compare/records/attention-cpu.json").read_text(encoding="utf-8"))
    for dtype in ("float32", "bfloat16"):
        ratios: dict[str, list[float]] = {}
        for section in record["sections"]:
            if f", {dtype}, forward: " in section["title"]:
                table = next(
                    block
                    for block in section["blocks"]
                    if "rows" in block and block["columns"][0] == "ratio"
                )
                for name, *cells in table["rows"]:
                    ratios.setdefault(name, []).extend(float(cell) for cell in cells if cell)
        ours, formula = (
            max(*ratios[f"torch {name}"], *ratios[f"{flax} {name}"]) for flax, name in NAMES
        )
        text = " ".join((ROOT / "compare/bench/README.md").read_text(encoding="utf-8").split())
        assert f"{ours:.2g} at most in {dtype} (the formula: {formula:.2g})" in text


def test_the_missed_targets_are_counted() -> None:
    """Of the ratios in the record, as the text below the table has it."""
    sections = record("attention")["sections"]
    (ratios,) = (section for section in sections if section["title"].startswith("Ratios"))
    missed = [check for check in ratios["checks"] if not check["held"]]
    text = " ".join((ROOT / "compare/bench/README.md").read_text(encoding="utf-8").split())
    assert f"{('No', 'One', 'Two', 'Three', 'Four')[len(missed)]} targets were missed." in text
    times = []
    for direction in ("forward:", "forward + backward"):
        title = f"causal, float32, {direction}"
        (section,) = (one for one in sections if one["title"].startswith(title))
        rows = {name: cells for name, *cells in section["blocks"][0]["rows"]}
        at = section["blocks"][0]["columns"].index("1024") - 1
        times.append(float(rows["jax.nn"][at]) / float(rows["torch SDPA is_causal"][at]))
    forward, backward = times
    says = (
        f"{forward:.1f} times as long as SDPA at 1024 tokens ({backward:.1f} times with gradients)"
    )
    assert says in text


NAMES = (("Flax", "ours"), ("JAX", "formula"))
