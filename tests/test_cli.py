"""The commands: their output, the files that they write, and their exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from markupsafe import escape
from typer.testing import CliRunner

import compare
import torch_impl.causal_attention
from compare.checks import CHECKS
from compare.cli import CHECKS as NAMED
from compare.cli import app
from compare.commands.jobs import Job
from compare.report.html import html
from compare.report.model import Check, Panels, Report, Section
from compare.runners.run import missing_cuda
from compare.subprocesses import ChildError, run_module
from torch_impl import masked_attention

from .support import torch_module

ROOT = Path(__file__).parent.parent
README = ROOT / "compare/README.md"


def compare_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m compare` in a process and capture its output through pipes."""
    command = [sys.executable, "-m", "compare", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, timeout=280, env={**os.environ, **environment}
    )


@pytest.mark.slow
def test_the_main_job(tmp_path: Path) -> None:
    done = compare_command(
        "--json", str(tmp_path / "report.json"), "--html", str(tmp_path / "report.html")
    )
    printed = done.stdout.decode()
    assert done.returncode == 0, printed + done.stderr.decode()
    assert max(map(len, printed.splitlines())) <= 80
    assert "\x1b" not in printed, "the output has colors although it goes into a pipe"
    assert "Reproduced: PyTorch 36/36, Flax Linen 36/36, Flax NNX 36/36." in printed
    assert "Everything held" in printed
    summary = re.search(
        r"```text\n( check .*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert summary
    shown = {" ".join(line.split()) for line in printed.splitlines()}
    if missing_cuda():
        assert {" ".join(line.split()) for line in summary[1].splitlines()} <= shown, (
            "the README shows a different summary"
        )
    if missing_cuda():
        assert f"Not yet run on a GPU: {missing_cuda()}." in printed

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["held"] is True
    titles = [section["title"] for section in report["sections"]]
    assert sum(title.startswith("Cell ") for title in titles) == 9
    for section in report["sections"]:
        assert section["title"] in printed
    rows = next(section for section in report["sections"] if section["title"].startswith("Cell 3"))[
        "blocks"
    ][0]["rows"]
    assert len(rows) == 12
    assert set(report["versions"]) >= {"python", "torch", "jax", "flax"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    _is_whole((tmp_path / "report.html").read_text(encoding="utf-8"), titles)


def _is_whole(page: str, titles: list[str]) -> None:
    """Check that the page is well-formed, loads nothing from elsewhere and has no script."""
    assert page.index("Everything held") < page.index("<table>")
    assert all(str(escape(title)) in page for title in titles)
    assert page.count("<svg") >= 10
    assert not re.findall(r"<script|<link|<img|@import|url\((?!#)|(?:src|href)=\"(?!#|data:)", page)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    ids = re.findall(r' id="([^"]+)"', page)
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', page))
    assert used <= set(ids)
    assert all(ids.count(name) == 1 for name in used)


@pytest.mark.slow
def test_a_closed_pipe_is_no_failed_check(tmp_path: Path) -> None:
    """`notebook --json FILE | head -1` writes the file and ends by SIGPIPE."""
    command = [sys.executable, "-m", "compare", "notebook", "--json", str(tmp_path / "report.json")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"python ")
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read().strip() == b""
    assert process.returncode == -signal.SIGPIPE
    assert json.loads((tmp_path / "report.json").read_text())["held"] is True


@pytest.mark.slow
@pytest.mark.again
def test_a_name_is_never_broken(tmp_path: Path) -> None:
    name = ".".join(["encoder", *(f"layer_{number}" for number in range(20)), "in_proj_weight"])
    path = compare.save_checkpoint(tmp_path / "state.safetensors", {name: torch.ones(2)})
    environments: list[dict[str, str]] = [{}, {"COLUMNS": "80"}]
    for environment in environments:
        assert name in compare_command("inspect", str(path), **environment).stdout.decode()


def test_the_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"attention-parity {compare.__version__}\n")


@pytest.mark.slow
@pytest.mark.again
def test_output_without_unicode(tmp_path: Path) -> None:
    for name in ("state", "a long name " * 10):
        path = compare.save_checkpoint(tmp_path / f"{name}.safetensors", torch_module())
        done = compare_command("inspect", str(path), PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.isascii()
        assert name.strip() in " ".join(done.stdout.decode().split())


@pytest.mark.parametrize("part", ["outputs", "devices"])
@pytest.mark.slow
def test_each_part_is_a_command(part: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [part, "--json", str(tmp_path / "report.json")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["command"] == f"compare {part} --json {tmp_path / 'report.json'}"
    assert all(
        check["held"] is not False for section in report["sections"] for check in section["checks"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["outputs", "--speed"], "No such option"),
        (["outputs", "--json", "no/such/folder/report.json"], "does not exist"),
        (["outputs", "--html", "no/such/folder/report.html"], "does not exist"),
        (["--json", "report.json", "outputs"], "write it after the command"),
        (["--html", "report.html", "outputs"], "write it after the command"),
        (["--device", "cpu", "outputs"], "write it after the command"),
        (["checks", "speed"], "there is no check 'speed'; there are fresh, state"),
        (["outputs", "--device", "tpu"], "is not one of"),
        (["mutants", "--recorded", "--first"], "have no effect beside --recorded"),
        (["convert", "a", "b", "--dry-run", "--no-verify"], "no such file"),
        (["fuzz", "--layers", "2", "--seconds", "500"], "--seconds has no effect beside --layers"),
        (["fuzz", "--layers", "2", "--keep", "kept"], "--keep has no effect beside --layers"),
        (["fuzz", "--libraries", "--seed", "1"], "--seed has no effect beside --libraries"),
        (["fuzz", "--libraries", "--layers", "2"], "--layers has no effect beside --libraries"),
        (["mutants", "--recorded", "--configurations", "1000"], "have no effect beside --recorded"),
    ],
)
def test_bad_usage_ends_with_2(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_a_link_that_leads_to_itself_is_no_target(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "state.safetensors", torch_module())
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    for arguments in (("convert", path, "loop.pth"), ("inspect", path, "--json", "loop.pth")):
        names = [str(tmp_path / one) if one == "loop.pth" else str(one) for one in arguments]
        done = CliRunner().invoke(app, names)
        assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit)
        said = " ".join(done.output.replace("│", " ").split())
        assert "a link that leads to itself" in said or "could not be written" in said


@pytest.mark.slow
def test_a_report_goes_into_a_pipe_and_not_in_its_place(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "state.safetensors", torch_module())
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        done = compare_command("inspect", str(path), "--json", str(tmp_path / "pipe"))
        assert done.returncode == 0, done.stderr.decode()
        assert json.loads(reader.communicate(timeout=30)[0])["command"].startswith(
            f"compare inspect {path} "
        )
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("length", [320, 250])
def test_a_report_that_cannot_be_written_ends_with_1(
    length: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "compare.commands.run._sections", lambda *_: pytest.fail("the work had already begun")
    )
    done = CliRunner().invoke(app, ["devices", "--json", str(tmp_path / ("x" * length))])
    assert done.exit_code == 1
    assert "could not be written" in done.output


def test_the_main_job_on_one_device_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[list[Job]] = []
    monkeypatch.setattr("compare.cli.run_jobs", lambda jobs, *_, **__: runs.append(jobs))
    for arguments in ([], ["--device", "cpu"]):
        assert CliRunner().invoke(app, arguments).exit_code == (2 if arguments else 0)
    assert [job.part for job in runs[0]] == [job.part for job in runs[1]]
    devices = {job.options.get("device") for job in runs[1] if job.part in ("outputs", "checks")}
    assert devices == {"cpu"}


@pytest.mark.skipif(not missing_cuda(), reason="both frameworks see CUDA")
def test_a_device_that_is_not_there_ends_with_2() -> None:
    done = CliRunner().invoke(app, ["--device", "cuda"])
    assert done.exit_code == 2
    assert "no CUDA device is seen by" in " ".join(done.output.replace("│", " ").split())


@pytest.mark.slow
def test_a_check_is_a_command_with_findings(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["checks", "causality", "--device", "cpu", "--json", str(tmp_path / "report.json")]
    )
    assert done.exit_code == 0, done.output
    (section,) = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert len(section["findings"]) == 84
    fields = {"check", "implementation", "case", "agreement", "why", "error"}
    assert set(section["findings"][0]) == fields
    assert set(section["findings"][0]["agreement"]) >= {
        "found",
        "expected",
        "limit",
        "ratio",
        "index",
    }


def test_the_commands_and_the_checks_have_the_same_names() -> None:
    assert tuple(CHECKS) == NAMED


def test_a_missing_optional_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    done = CliRunner().invoke(app, ["checkpoints"])
    assert done.exit_code == 2
    message = " ".join(done.output.replace("│", " ").split())
    assert "the orbax format needs orbax.checkpoint, which is not installed" in message


@pytest.mark.slow
def test_what_does_not_hold_ends_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def without_scale(queries: Any, keys: Any, values: Any, mask: Any, *rest: Any) -> Any:
        return masked_attention(queries * queries.shape[-1] ** 0.5, keys, values, mask, *rest)

    monkeypatch.setattr(torch_impl.causal_attention, "masked_attention", without_scale)
    done = CliRunner().invoke(app, ["outputs", "--json", str(tmp_path / "report.json")])
    assert done.exit_code == 1
    assert "FAILED outputs on cpu (PyTorch)" in done.output
    assert "NOT everything held" in done.output
    assert json.loads((tmp_path / "report.json").read_text())["held"] is False


def test_a_report_in_which_nothing_ran_does_not_hold() -> None:
    skipped = Check("a", "torch", None, "no device", "a device")
    held, failed = Check("b", "torch", True, "1", "1"), Check("c", "torch", False, "1", "2")
    for checks, verdict in (
        ([], False),
        ([skipped], False),
        ([held, skipped], True),
        ([held, failed], False),
    ):
        report = Report("compare", "", {}, [Section("", checks=checks)])
        assert report.held is verdict
        assert report.as_json()["held"] is verdict
        assert "verything held" in html(report), "a page with claims must say whether they held"


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(ChildError, match=r"exited with 1:(.|\n)*No module named compare.nonsense"):
        run_module("compare.nonsense")


def test_names_in_a_page_are_text() -> None:
    hostile = "<script>alert(1)</script>"
    check = Check(hostile, hostile, False, hostile, hostile)
    panels = Panels(hostile, {hostile: [[1.0, float("nan")]]})
    page = html(Report(hostile, "", {}, [Section(hostile, [hostile, panels], [check])]))
    assert "<script" not in page
    assert "NOT everything held" in page


def test_help_in_a_closed_pipe_ends_by_sigpipe() -> None:
    command = [sys.executable, "-m", "compare", "--help"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE
