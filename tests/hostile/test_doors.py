"""What is written never touches what is read, and removes nothing that is not ours."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import compare
from compare.checkpoint.convert import convert_checkpoint
from compare.checkpoint.formats import open_checkpoint, safetensors
from compare.checkpoint.formats.shards import INDEX

from .conftest import Command


def content(path: Path) -> Any:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(file.name, file.read_bytes()) for file in files]


@pytest.fixture
def shards(here: Path) -> Path:
    source = compare.save_checkpoint(
        here / "four.safetensors", {f"w{i}": torch.ones(4) for i in range(4)}
    )
    convert_checkpoint(source, here / "shards", shard_bytes=16)
    return here / "shards"


@pytest.mark.parametrize(
    "target",
    [
        "shards/model-00001-of-00004.safetensors",
        "shards/other.safetensors",
        "link.safetensors",
        "linked/new.safetensors",
    ],
)
def test_a_shard_of_the_source_is_never_written_over(
    target: str, shards: Path, command: Command
) -> None:
    shutil.copy("a.safetensors", "old.safetensors")
    Path("link.safetensors").symlink_to(shards / "model-00002-of-00004.safetensors")
    Path("linked").symlink_to(shards)
    before = content(shards)
    for arguments in ((), ("--no-verify",)):
        code, printed = command("convert", "shards", target, *arguments)
        assert code == 2
        assert "lies in what is read, shards: write to another place" in printed
    assert content(shards) == before


def test_a_shard_is_an_input_where_the_index_is_named(shards: Path, command: Command) -> None:
    index, shard = shards / f"model{INDEX}", shards / "model-00001-of-00004.safetensors"
    before = content(shards)
    assert command("convert", index, shard)[0] == 2
    assert command("inspect", index, "--json", shard)[0] == 2
    assert command("inspect", index, "--html", index)[0] == 2
    assert content(shards) == before
    assert command("convert", index, shards / "merged.safetensors")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "a.safetensors", "--json", "a.safetensors"),
        ("convert", "a.pth", "b.safetensors", "--html", "a.pth"),
        ("convert", "a.pth", "b.safetensors", "--json", "b.safetensors"),
        ("convert", "a.pth", "a.orbax", "--json", "a.orbax/report.json"),
        ("convert", "a.pth", "b.msgpack", "--map", "map.json", "--json", "map.json"),
        ("convert", "a.pth", "a.msgpack", "--like", "a.msgpack"),
        ("verify", "a.pth", "a.msgpack", "--json", "a.msgpack"),
        ("inspect", "a.orbax", "--json", "a.orbax/_METADATA"),
        ("inspect", "a.pth", "--json", "r", "--html", "r"),
        ("inspect", "a.pth", "--json", "r.x", "--html", "R.X"),
        ("inspect", "a.pth", "--json", "hard.pth"),
    ],
)
def test_no_report_or_target_replaces_an_input(
    arguments: tuple[str, ...], here: Path, command: Command
) -> None:
    compare.match({"w": torch.ones(1)}, {"params": {"w": torch.ones(1).numpy()}}).save("map.json")
    os.link("a.pth", "hard.pth")
    before = content(here)
    code, printed = command(*arguments)
    assert code == 2, printed
    assert any(words in printed for words in ("what is read", "written already", "in each other"))
    assert content(here) == before


def test_a_mapping_and_shards_of_a_template_are_inputs(here: Path, command: Command) -> None:
    mapping = compare.match({"w": torch.ones(1)}, {"params": {"w": torch.ones(1).numpy()}})
    mapping.save("map.msgpack")
    assert command("convert", "a.pth", "map.msgpack", "--map", "map.msgpack")[0] == 2
    assert compare.StateMapping.load("map.msgpack") == mapping
    convert_checkpoint("a.safetensors", "like", shard_bytes=60)
    shard = "like/model-00001-of-00004.safetensors"
    before = content(here / "like")
    arguments = ("a.msgpack", shard, "--layout", "torch", "--like", f"like/model{INDEX}")
    assert command("convert", *arguments)[0] == 2
    with pytest.raises(compare.CheckpointError, match="is what is read"):
        convert_checkpoint("a.msgpack", shard, like=f"like/model{INDEX}", layout="torch")
    assert content(here / "like") == before


def test_a_link_stays_a_link(command: Command) -> None:
    Path("real.json").write_text("old")
    Path("link.json").symlink_to("real.json")
    assert command("inspect", "a.pth", "--json", "link.json")[0] == 0
    assert Path("link.json").is_symlink()
    assert json.loads(Path("real.json").read_text())["held"] is None


@pytest.mark.again
def test_a_report_to_the_output_itself_arrives_there(here: Path) -> None:
    Path("out").symlink_to("/proc/self/fd/1")
    line = [sys.executable, "-m", "compare", "inspect", "a.safetensors", "--json", "out"]
    root = str(Path(__file__).parents[2])
    with Path("x.txt").open("wb") as stream:
        done = subprocess.run(line, stdout=stream, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0
    assert Path("out").is_symlink()
    text = Path("x.txt").read_text()
    assert "mask: nonzero blocks" in text and '"held": null' in text


def test_one_file_under_two_names_is_one_file(here: Path) -> None:
    script = "mkdir b && mount --bind . b && exec python -m compare convert"
    script += " a.safetensors b/a.safetensors --dtype float16"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    before = content(here / "a.safetensors")
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], env=env, capture_output=True)
    assert done.returncode == 2
    assert b"what is read" in done.stderr
    assert content(here / "a.safetensors") == before


@pytest.mark.parametrize("name", [".out.safetensors.0123456789ab.tmp", "map.json"])
def test_a_pipe_does_not_make_it_wait(name: str, here: Path, command: Command) -> None:
    os.mkfifo(name)
    if name == "map.json":
        code, printed = command("convert", "a.pth", "o.msgpack", "--map", name)
        assert (code, "is not a regular file" in printed) == (2, True)
    else:
        assert command("convert", "a.pth", "out.safetensors")[0] == 0
        assert Path(name).is_fifo()


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/tty", "pipe", "folder"])
@pytest.mark.parametrize("option", ["--map", "--like", "source", "index"])
def test_only_regular_files_are_read(name: str, option: str, here: Path, command: Command) -> None:
    os.mkfifo("pipe")
    Path("folder").mkdir()
    if option == "index":
        Path("bad").mkdir()
        Path("bad", f"model{INDEX}").symlink_to(here / name)
        arguments = ["inspect", "bad"]
    elif option == "source":
        Path("s.msgpack").symlink_to(here / name)
        arguments = ["inspect", "s.msgpack"]
    else:
        arguments = ["convert", "a.pth", "o.msgpack", option, name]
    is_unsound = option == "index" or (option, name) == ("--like", "folder")
    assert command(*arguments)[0] == (1 if is_unsound else 2)


def test_a_folder_with_a_name_like_ours_stays(here: Path, command: Command) -> None:
    foreign = here / ".out.safetensors.0123456789ab.tmp"
    foreign.mkdir()
    (foreign / "precious").touch()
    (foreign / "owner").symlink_to("precious")
    assert command("convert", "a.pth", "out.safetensors")[0] == 0
    assert (foreign / "precious").exists()


@pytest.mark.parametrize("as_folder", [True, False])
def test_an_index_does_not_decide_what_is_removed(
    as_folder: bool, shards: Path, command: Command
) -> None:
    precious = shards / "data"
    precious.mkdir() if as_folder else precious.touch()
    index = shards / f"model{INDEX}"
    changed = json.loads(index.read_text())
    changed["weight_map"]["z"] = "data"
    index.write_text(json.dumps(changed))
    code, printed = command("convert", "four.safetensors", "shards", "--shard-size", "1")
    assert code == 2
    assert "holds data; it was not changed" in printed
    assert precious.exists()


def test_shards_of_another_program_are_not_replaced(here: Path, command: Command) -> None:
    Path("theirs").mkdir()
    name = "model-00001-of-00001.safetensors"
    save_file({"w": torch.ones(2)}, f"theirs/{name}")
    Path(f"theirs/model{INDEX}").write_text(json.dumps({"weight_map": {"w": name}}))
    assert command("convert", "a.safetensors", "theirs", "--shard-size", "1")[0] == 2
    assert Path("theirs", name).exists()


@pytest.mark.parametrize("name", ["x.safetensors", "d/precious", "ocdbt.process_0/x"])
def test_an_orbax_folder_with_more_inside_stays(name: str, here: Path, command: Command) -> None:
    (here / "a.orbax" / name).write_bytes(b"mine")
    code, printed = command("convert", "a.pth", "a.orbax")
    assert code == 2
    assert f"holds {name} beside an Orbax checkpoint; it was not changed" in printed
    assert (here / "a.orbax" / name).read_bytes() == b"mine"


def test_names_that_say_something_else(here: Path, command: Command) -> None:
    code, printed = command("convert", "a.msgpack", "newdir/")
    assert (code, "ends with a slash" in printed) == (2, True)
    code, printed = command("convert", "a.safetensors", f"model{INDEX}", "--shard-size", "1")
    assert (code, "is named like an index" in printed) == (2, True)
    assert not Path("newdir").exists() and not Path(f"model{INDEX}").exists()


@pytest.mark.again
def test_more_shards_than_may_be_open(here: Path) -> None:
    script = """
import resource, sys, torch, compare
from compare.checkpoint.convert import convert_checkpoint
resource.setrlimit(resource.RLIMIT_NOFILE, (230, 230))
compare.save_checkpoint("m.safetensors", {f"l{i}": torch.full((4,), float(i)) for i in range(250)})
convert_checkpoint("m.safetensors", "many", shard_bytes=16)
state = compare.read_checkpoint("many")
assert all(float(state[f"l{i}"][0]) == i for i in range(250))
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("suffix", "state"),
    [
        (".safetensors", {f"l{i}": torch.ones(1) for i in range(101)}),
        (".msgpack", {"params": {None: torch.ones(1).numpy()}}),
        (".msgpack", {"params": {1.5: torch.ones(1).numpy()}}),
        (".orbax", {"params": {True: torch.ones(1).numpy()}}),
        (".safetensors", {"params": {1.5: torch.ones(1).numpy()}}),
    ],
    ids=["too many", "None", "1.5", "True", "1.5 in safetensors"],
)
def test_what_the_reader_would_refuse_replaces_nothing(
    suffix: str, state: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 100)
    before = content(here / f"a{suffix}")
    with pytest.raises(compare.CheckpointError):
        compare.save_checkpoint(here / f"a{suffix}", state)
    assert content(here / f"a{suffix}") == before


@pytest.mark.again
def test_twenty_thousand_names_of_one_tensor_are_read_again(here: Path) -> None:
    weight = torch.ones(2)
    state = {f"tied.layer.{i}.weight": weight for i in range(20_000)}
    path = compare.save_checkpoint(here / "tied.safetensors", state)
    with open_checkpoint(path) as stored:
        assert len(stored.aliases) == 19_999
