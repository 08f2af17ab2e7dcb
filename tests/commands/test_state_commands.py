"""`inspect`, `convert`, `verify` and `bench checkpoints`: output, files and exit codes."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import compare
from compare.checkpoint import convert
from compare.cli import app
from compare.conversion.mapping import LINEN
from compare.conversion.state_kinds import entries
from compare.report.model import Check, Section

from ..support import linen_variables, nnx_model, torch_module


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, " ".join(done.output.replace("│", " ").split())


class Everything(torch.nn.Module):
    """One entry of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.tied = self.norm
        self.register_buffer("mask", torch.triu(torch.ones(3, 3), 1))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.plain = torch.full((2,), torch.inf)


def everything() -> torch.nn.Module:
    return Everything()


def test_inspect_names_every_kind(tmp_path: Path) -> None:
    code, printed = run(
        "inspect",
        "--module",
        "tests.commands.test_state_commands:everything",
        "--json",
        str(tmp_path / "report.json"),
    )
    assert code == 0, printed
    assert "0 1 1 0 0 1 0 0 0" in printed
    (section,) = json.loads((tmp_path / "report.json").read_text())["sections"]
    rows = {row[0]: row[1:] for row in section["blocks"][0]["rows"]}
    assert rows["norm.weight"] == ["parameter", "3", "float32", "12", 1.0, 1.0, 1.0, ""]
    assert rows["norm.running_mean"][0] == "statistics"
    assert rows["tied.weight"][0] == "alias of norm.weight"
    assert rows["mask"] == ["buffer", "3x3", "float32", "36", 0.0, pytest.approx(1 / 3), 1.0, ""]
    assert rows["cache"][0] == "not saved"
    assert rows["plain"] == [
        "plain: will be left behind",
        "2",
        "float32",
        "8",
        None,
        None,
        None,
        "2 inf",
    ]


def test_the_kinds_of_each_framework() -> None:
    assert {entry.kind for entry in entries(Everything())} == {
        *("parameter", "statistics", "alias", "buffer", "not saved", "left behind")
    }
    assert {entry.name: entry.kind for entry in entries(linen_variables())}[
        "buffers/mask"
    ] == "buffer"
    kinds = {entry.name: entry.kind for entry in entries(nnx_model())}
    assert (kinds["mask"], kinds["W_key/kernel"], kinds["dropout/rngs/count"]) == (
        "buffer",
        "parameter",
        "stream",
    )
    assert {entry.name: entry.kind for entry in entries(nnx_model(buffer=False))}[
        "mask"
    ] == "left behind"
    with pytest.raises(TypeError, match="expected a torch or NNX module, or Linen variables"):
        entries([1])


def test_inspect_a_file_and_two(tmp_path: Path) -> None:
    module = torch_module()
    one = compare.save_checkpoint(tmp_path / "one.safetensors", module)
    module.mask[module.mask == 1] = 2
    two = compare.save_checkpoint(tmp_path / "two.pth", module)
    page = tmp_path / "page.html"
    code, printed = run(
        "inspect", str(one), "--json", str(tmp_path / "report.json"), "--html", str(page)
    )
    assert code == 0
    assert "held" not in page.read_text().split("</style>")[1], "the page has a verdict"
    assert json.loads((tmp_path / "report.json").read_text())["held"] is None
    assert "every value is as it was saved (checksums)" in printed
    assert (
        json.loads((tmp_path / "report.json").read_text())["sections"][0]["blocks"][0]["rows"][0][0]
        == "mask"
    )
    flax = compare.save_checkpoint(tmp_path / "flax.msgpack", module)
    assert "buffers/mask: nonzero blocks" in run("inspect", str(flax))[1]
    code, printed = run("inspect", str(one), str(two))
    assert code == 1
    assert "mask 21 of 49 values, by up to 1" in printed
    code, printed = run("inspect", str(one), str(one))
    assert code == 0
    assert "Everything held" in printed
    torch.save(
        {"big": torch.ones(40, 40), "x.mask": torch.triu(torch.ones(40, 40), 1)},
        tmp_path / "plain.pth",
    )
    code, printed = run("inspect", str(tmp_path / "plain.pth"))
    assert "no manifest, so it is not known" in printed
    assert "blocked share of each square, in ninths" in printed


def test_convert_shows_the_table_and_compares(tmp_path: Path) -> None:
    source = compare.save_checkpoint(tmp_path / "state.safetensors", torch_module())
    target = tmp_path / "state.orbax"
    code, printed = run("convert", str(source), str(target), "--dry-run")
    assert code == 0
    assert "would become" in printed
    assert not target.exists()
    code, printed = run(
        "convert", str(source), str(target), "--json", str(tmp_path / "report.json")
    )
    assert code == 0, printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert [
        "W_key.weight",
        "params/W_key/kernel",
        "parameter",
        "13x11",
        "float32",
        "transposed",
    ] in (report["sections"][0]["blocks"][0]["rows"])
    assert [check["held"] for check in report["sections"][0]["checks"]] == [True, True]
    assert run("verify", str(source), str(target))[0] == 0
    code, printed = run(
        "convert", str(source), str(tmp_path / "half.msgpack"), "--dtype", "bfloat16"
    )
    assert code == 0, printed
    code, printed = run("verify", str(source), str(tmp_path / "half.msgpack"))
    assert code == 1
    assert "is float32 (13, 11) in the source, bfloat16 (13, 11) in the target" in printed
    code, printed = run("convert", str(source), str(tmp_path / "shards"), "--shard-size", "1")
    assert code == 0, printed
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    code, printed = run(
        "convert", str(tmp_path / "shards"), str(tmp_path / "flax.safetensors"), "--layout", "flax"
    )
    assert code == 0, printed


def test_convert_with_a_table_of_its_own(tmp_path: Path) -> None:
    LINEN.save(tmp_path / "map.json")
    source = compare.save_checkpoint(tmp_path / "state.safetensors", torch_module())
    code, printed = run(
        "convert", str(source), str(tmp_path / "a.msgpack"), "--map", str(tmp_path / "map.json")
    )
    assert code == 0, printed
    (tmp_path / "map.json").write_text("{}")
    for arguments, message, expected in (
        (["--map", str(tmp_path / "map.json")], "not a valid mapping: expected an object", 1),
        (["--map", str(tmp_path / "none.json")], "no such file or folder", 2),
        (["--like", str(tmp_path / "none.orbax")], "no such file or folder", 2),
        (["--dtype", "int8"], "cannot be cast to int8", 2),
    ):
        code, printed = run("convert", str(source), str(tmp_path / "b.msgpack"), *arguments)
        assert code == expected
        assert message in printed
    assert not (tmp_path / "b.msgpack").exists()


def test_what_is_no_module_ends_with_2(tmp_path: Path) -> None:
    for source, message in (
        ("none.safetensors", "no such file or folder"),
        ("no_such_package:name", "is not a module that can be inspected (ModuleNotFoundError"),
        ("torch_impl:nothing", "is not a module that can be inspected (AttributeError"),
        (
            "torch_impl:CausalAttentionWithBuffer",
            "is not a module that can be inspected (TypeError",
        ),
        ("tests.support:linen_variables", ""),
    ):
        arguments = ["--module", source] if ":" in source else [source]
        code, printed = run("inspect", *arguments)
        assert code == (2 if message else 0), printed
        assert message in printed


def test_a_conversion_that_went_wrong_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = compare.save_checkpoint(tmp_path / "state.pth", torch_module())
    true = convert.planned

    def wrong(*arguments: Any, **options: Any) -> Any:
        tensors, lines = true(*arguments, **options)

        def pieces(path: Any) -> Any:
            return [piece * (1 if path[-1] == "mask" else 0.5) for piece in tensors.pieces(path)]

        return replace(tensors, pieces=pieces), lines

    monkeypatch.setattr(convert, "planned", wrong)
    code, printed = run("convert", str(source), str(tmp_path / "state.msgpack"))
    assert code == 1
    assert "6 differ; params/W_query/kernel differs in" in printed


def test_the_record_has_the_whole_command(tmp_path: Path) -> None:
    """The recorded command includes its options: another dtype is another conversion."""
    source = compare.save_checkpoint(tmp_path / "a state.pth", torch_module())
    target, report = tmp_path / "state.msgpack", tmp_path / "report.json"
    for command in ("convert", "verify"):
        arguments = [command, str(source), str(target), "--dtype", "float64", "--json", str(report)]
        code, printed = run(*arguments)
        assert code == 0, printed
        assert json.loads(report.read_text())["command"] == shlex.join(["compare", *arguments])


def test_what_bench_misses_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Section(
        "State", checks=[Check("save .pth", "all", False, "ratio 0.10", "at least 0.80")]
    )
    monkeypatch.setattr(
        "compare.bench.checkpoints.sections", lambda megabytes, rounds: iter([slow])
    )
    code, printed = run("bench", "checkpoints", "--json", str(tmp_path / "report.json"))
    assert code == 1
    assert "FAILED save .pth (all): ratio 0.10; expected at least 0.80" in printed
    assert json.loads((tmp_path / "report.json").read_text())["held"] is False


@pytest.mark.slow
@pytest.mark.again
def test_bench_prints_ratios(tmp_path: Path) -> None:
    arguments = ["--megabytes", "1", "--rounds", "1", "--json", str(tmp_path / "report.json")]
    code, printed = run("bench", "checkpoints", *arguments)
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == (0 if report["held"] else 1), printed
    (section,) = report["sections"]
    assert len(section["blocks"][1]["rows"]) == 19


@pytest.mark.slow
@pytest.mark.again
def test_bench_times_other_programs(tmp_path: Path) -> None:
    arguments = ["--tokens", "128", "--rounds", "1", "--json", str(tmp_path / "report.json")]
    code, printed = run("bench", "contexts", *arguments)
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == (0 if report["held"] else 1), printed
    torch, jax = report["sections"]
    assert len(torch["blocks"][1]["rows"]) == len(torch["checks"]) == 8
    assert [len(jax["blocks"][index]["rows"]) for index in (1, 3)] == [6, 2]
    gathers = [check for check in jax["checks"] if "all-gathers" in check["name"]]
    assert len(gathers) == 4 and all(check["held"] for check in gathers)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["attention", "--plot", "times.gif"], "name a .png or .svg file"),
        (["attention", "--plot", "no/such/folder/times.png"], "does not exist; make it first"),
        (["checkpoints", "--quick"], "No such option"),
        (["speed"], "No such command 'speed'"),
    ],
)
def test_what_bench_refuses(arguments: list[str], said: str) -> None:
    code, printed = run("bench", *arguments)
    assert code == 2
    assert said in printed
