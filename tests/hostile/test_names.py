"""Names of any characters, printed on any terminal and in every report."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import compare
from compare.files.printable import MAX_LENGTH, readable, shown
from compare.report import html, terminal

from .conftest import Command

NAMES = [
    "\x1b[31mEVIL\x1b]0;title\x07",
    "[red]markup[/red] [link=file:///etc]x[/link]",
    '<script>alert(1)</script>"><img src=x onerror=alert(1)>',
    "line\nbreak\r\ttab",
    "nul\0",
    "\u202egnp.exe\u2066",
    "\x9b31mC1",
    "$^$ and $x$ and \\frac",
    "\ud800surrogate",
    "long" * 1250,
    "dots…and…ellipses ünïcödé 漢字",
]
FORBIDDEN = [chr(code) for code in (*range(10), *range(11, 32), *range(127, 160))]
FORBIDDEN += ["\u202e", "\u2066", "\ud800"]


def named(path: str, *names: str) -> Path:
    """Write a safetensors file with masks of these names; the library allows no surrogates."""
    entries = {
        name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * index, 4 * index + 4]}
        for index, name in enumerate(names)
    }
    raw = json.dumps(entries).encode()
    Path(path).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4 * len(names)))
    return Path(path)


def require_clean(text: str, *more: str) -> None:
    found = [character for character in (*FORBIDDEN, *more) if character in text]
    assert not found, [text[text.index(each) - 40 :][:80] for each in found]


def page(report: Path) -> str:
    return report.read_text(encoding="utf-8").split("</style>")[-1]


def test_every_command_prints_them_escaped(here: Path, command: Command) -> None:
    source = named("n.safetensors", *(f"{name}.mask" for name in NAMES), "x.mask")
    other = named("o.safetensors", *(f"{name}.bias" for name in NAMES))
    Path("map.json").write_text(json.dumps(dict.fromkeys(NAMES, 1)))
    reports = ("--json", "r.json", "--html", "r.html")
    for arguments in (
        ("inspect", source, *reports),
        ("inspect", source, other, *reports),
        ("convert", source, "t.safetensors", *reports),
        ("convert", source, "t.pth", *reports),
        ("convert", source, "t.msgpack", "--like", "a.msgpack"),
        ("convert", source, "t.msgpack", "--map", "map.json"),
        ("verify", source, other, *reports),
        ("verify", source, "a.msgpack"),
    ):
        for report in ("r.json", "r.html"):
            Path(report).unlink(missing_ok=True)
        _, printed = command(*arguments)
        require_clean(printed)
        if Path("r.json").exists():
            require_clean(page(Path("r.json")))
            require_clean(page(Path("r.html")), "<script", "<img")


@pytest.mark.parametrize("name", [name for name in NAMES if "\0" not in name and len(name) < 200])
def test_paths_too(name: str, here: Path, command: Command) -> None:
    path = Path(os.fsdecode(name.replace("/", "_").encode(errors="replace")) + ".safetensors")
    path.write_bytes(Path("a.safetensors").read_bytes())
    for arguments in (
        ("inspect", path, "--html", "r.html", "--json", "r.json"),
        ("inspect", path, "a.pth"),
        ("convert", path, f"t{path}"),
        ("verify", path, "a.msgpack"),
        ("inspect", f"no{path}"),
        ("inspect", "a.pth", "--json", f"no/{path}"),
        ("inspect", "a.pth", "--json", path, "--html", path),
    ):
        _, printed = command(*arguments)
        require_clean(printed)
    require_clean(page(Path("r.html")), "<script", "<img")


def test_a_path_too_long_for_the_system(here: Path, command: Command) -> None:
    assert command("inspect", "a" * 300 + ".pth")[0] == 2
    assert command("convert", "a.pth", "a" * 249 + ".pth")[0] == 1
    assert command("inspect", "a.pth", "--json", "a" * 300)[0] == 1


@pytest.mark.again
@pytest.mark.parametrize("encoding", ["ascii"])
def test_a_terminal_of_any_encoding(encoding: str, here: Path) -> None:
    save_file({"ü漢.mask": torch.ones(2, 2)}, "n.safetensors")
    env = {
        **os.environ,
        "PYTHONIOENCODING": encoding,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    line = [sys.executable, "-m", "compare", "convert", "n.safetensors", "t.safetensors"]
    done = subprocess.run(line, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and b"Warning" not in done.stderr
    assert "ü漢".encode(encoding, errors="backslashreplace") in done.stdout


def test_long_tables_are_cut_and_many_pictures_too(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert terminal.MAX_ROWS == html.MAX_ROWS == 1000
    for module in (terminal, html):
        monkeypatch.setattr(module, "MAX_ROWS", 10)
    save_file({f"n{i:04d}": torch.ones(1) for i in range(13)}, "many.safetensors")
    printed = command("inspect", "many.safetensors", "--json", "r.json", "--html", "r.html")[1]
    assert "… 3 more (--all)" in printed and "n0012" not in printed
    assert "… 3 more (--all)" in Path("r.html").read_text(encoding="utf-8")
    rows = json.loads(Path("r.json").read_text())["sections"][0]["blocks"][0]["rows"]
    assert len(rows) == 13
    assert "n0012" in command("inspect", "many.safetensors", "--all")[1]
    save_file({f"m{i}.mask": torch.ones(3, 3) for i in range(14)}, "masks.safetensors")
    printed = command("inspect", "masks.safetensors", "--html", "r.html")[1]
    assert "the pictures of 2 more masks" in printed


def test_numbers_near_the_largest_have_a_mean(here: Path, command: Command) -> None:
    save_file({"w": torch.full((3,), 1.7e308, dtype=torch.float64)}, "w.safetensors")
    assert "1.7e+308 1.7e+308 1.7e+308" in command("inspect", "w.safetensors")[1]


def test_one_function_makes_text_printable() -> None:
    for name in NAMES:
        require_clean(shown(name))
        assert len(shown(name)) <= 4 * MAX_LENGTH
        assert "\n" not in shown(name)
    assert readable("two\nlines \x1b[0m") == "two\nlines \\x1b[0m"


def test_errors_of_the_library_escape_names(here: Path) -> None:
    path = named("n.safetensors", *NAMES)
    with pytest.warns(compare.UnverifiedCheckpoint):
        state = compare.read_checkpoint(path)
    assert set(state) == set(NAMES)
    with pytest.raises(compare.CheckpointError) as caught:
        compare.load_checkpoint(path, torch.nn.Linear(2, 2))
    require_clean(str(caught.value))
    with pytest.raises(compare.ConversionError) as refused:
        compare.match({NAMES[0]: torch.ones(1)}, {"params": {NAMES[5]: np.ones(1)}})
    require_clean(str(refused.value))
