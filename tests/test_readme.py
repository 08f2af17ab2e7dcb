"""What the README says is so: its snippets run, its tables are the code's, its commands are CI's."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flax import nnx

from compare.conversion.mapping import ROWS
from compare.mutants import MUTANTS

from .support import linen_variables, nnx_model, torch_module

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    "snippet", SNIPPETS, ids=["torch", "linen", "nnx", "fused", "carry", "match"]
)
def test_snippets_run(snippet: str, tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{snippet}"
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_mapping_is_the_converters() -> None:
    for row in ROWS:
        linen, nnx_path = "/".join(row.linen_path), "/".join(row.nnx_path)
        assert (
            f"| `{row.torch_key}` | `{linen}` | `{nnx_path}` | {row.layout} | {row.kind} |"
            in README
        )


def test_commands_start_from_a_bare_clone() -> None:
    commands = re.findall(r"```sh\n(.*?)\n```", README)
    assert [command.split(" && ")[-1] for command in commands] == [
        *(".venv/bin/python -m compare", ".venv/bin/python -m pytest")
    ]
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)


def test_the_state_table() -> None:
    """Moved, saved, trained: what each framework says of the weights, the buffer and the plain mask."""
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


def test_the_bound_table_is_the_records() -> None:
    record = json.loads((ROOT / "compare/records/bound-cpu.json").read_text(encoding="utf-8"))
    campaign, slips = (
        block for block in record["sections"][0]["blocks"] if isinstance(block, dict)
    )
    assert record["command"] == "compare bound --cases 10000 --seed 0"
    at_five_tokens = slips["rows"][1]
    assert at_five_tokens[:2] == [5, 11]
    for (dtype, cases, outside, *worst), slip in zip(
        campaign["rows"], at_five_tokens[2:], strict=True
    ):
        cells = [dtype, str(cases), str(outside), *(f"{value:.2g}" for value in (*worst, slip))]
        assert f"| {' | '.join(cells)} |" in README


def test_the_table_of_planted_bugs_is_the_records() -> None:
    record = json.loads((ROOT / "compare/records/mutants-cpu.json").read_text(encoding="utf-8"))
    honest, planted = record["sections"]
    ratios = [row[1] for row in honest["blocks"][1]["rows"]]
    words = next(
        block
        for block in planted["blocks"]
        if isinstance(block, str) and "smallest of any" in block
    )
    grid = next(
        block
        for block in planted["blocks"]
        if isinstance(block, dict) and isinstance(block["rows"], dict)
    )
    worst = [max(float(value or 0.0) for value in row) for row in grid["rows"].values()]
    smallest = min(
        value for value in worst if value > 1.0
    )  # the others were seen by an error alone
    bugs = planted["title"].split()[0]
    held, tried = (
        sum(int(check["count"].split("/")[i]) for check in planted["checks"]) for i in (0, 1)
    )
    compared = honest["blocks"][0].split("drawn; ")[1].split()[0]
    row = f"| {bugs} | {tried} | {held} | {smallest:.2g} | 0 of {compared} | {max(ratios):.2g} |"
    assert row in README
    assert f"is {max(ratios):.2g}. The smallest of any planted bug is {smallest:.3g} " in words
    assert [check["held"] for check in honest["checks"]] == [True]
    current = {f"{mutant.name} ({mutant.implementation})" for mutant in MUTANTS}
    assert set(grid["rows"]) == current, (
        "the record is of other planted bugs; run `python -m compare mutants --json`"
    )


def state_rows() -> list[str]:
    """The rows that the records of the campaigns and benchmarks on state make in the README."""

    def record(name: str) -> tuple[dict[str, Any], list[list[Any]]]:
        content = json.loads(
            (ROOT / f"compare/records/{name}-cpu.json").read_text(encoding="utf-8")
        )
        (section,) = content["sections"]
        return content, next(block for block in section["blocks"] if isinstance(block, dict))[
            "rows"
        ]

    killed, rows = record("kill")
    tries, reads, lost = (sum(row[column] for row in rows) for column in (1, 4, 5))
    what = f"`kill -9` while saving, another process reading {reads:,} times"
    lines = [f"| {what} | {tries:,} | {lost} | `{killed['command']}` |"]
    fuzzed, rows = record("fuzz")
    inputs = sum(int(row[1].replace(",", "")) for row in rows)
    lines.append(
        f"| mutated files read | {inputs:,} | {sum(row[-1] for row in rows)} | `{fuzzed['command']}` |"
    )
    streamed, rows = record("stream")
    allowed = streamed["sections"][0]["checks"][0]["expected"].split()[2]
    lines += [
        f"| `{source}` | `{target}` | {peak} | {allowed} |" for source, target, peak, *_ in rows
    ]
    _, rows = record("state")
    for job, suffix, plain, ours, ratio in rows:
        formats = " to ".join(f"`{word}`" for word in suffix.split(" to "))
        lines.append(f"| {job} | {formats} | {plain} | {ours} | {ratio} |")
    return lines


def test_the_tables_of_state_are_the_records() -> None:
    for row in state_rows():
        assert row in README


def attention_rows() -> Iterator[str]:
    """The rows of the README's tables of attention: times under a causal mask in float32, ratios, memory."""
    record = json.loads((ROOT / "compare/records/attention-cpu.json").read_text(encoding="utf-8"))
    for section in record["sections"]:
        if section["title"].startswith(("causal, float32", "Ratios", "Working memory")):
            table = next(block for block in section["blocks"] if "rows" in block)
            yield from ("| " + " | ".join(row) + " |" for row in table["rows"])


def test_the_tables_of_attention_are_the_records() -> None:
    for row in attention_rows():
        assert row in README


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
        assert f"{ours:.2g} at most in {dtype} (the formula: {formula:.2g})" in " ".join(
            README.split()
        )


NAMES = (("Flax", "ours"), ("JAX", "formula"))
