"""Short runs of the fuzz and kill campaigns, and the bad files that long runs once found."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from orbax.checkpoint import StandardCheckpointer

import compare
from compare.checkpoint.errors import CheckpointError, UnverifiedCheckpoint
from compare.checkpoint.formats import open_checkpoint, orbax
from compare.files import writing
from compare.files.errors import FileError
from compare.stress import fuzz, kill
from compare.stress.corrupt import FORMATS, seeds, state
from compare.stress.fuzz_worker import Input, WrongTensorsError, outcome

from ..support import sections_of, torch_module

RECORDS = Path(compare.__file__).parent / "records"
CASES = Path(__file__).parents[1] / "fuzz_cases"
SUFFIXES = (".pth", ".safetensors", ".msgpack", ".orbax")


@pytest.mark.parametrize("path", sorted(CASES.iterdir()), ids=lambda path: path.name)
def test_what_the_fuzzer_found_stays_mended(path: Path) -> None:
    assert outcome(path) == "refused"


@pytest.mark.parametrize(
    ("kind", "inputs"), [("safetensors", 1500), ("msgpack", 1500), ("torch", 600), ("sharded", 300)]
)
@pytest.mark.slow
def test_some_mutated_checkpoints(kind: str, inputs: int, tmp_path: Path) -> None:
    made = Input(kind, "suite", tmp_path)
    outcomes = {outcome(made.make(number)) for number in range(inputs)}
    assert "refused" in outcomes
    assert outcomes <= {"refused", "the same", "unverified"}


def test_the_fuzzer_sees_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It catches a reader that returns other values, and one that raises another exception."""
    made = Input("safetensors", "suite", tmp_path)
    monkeypatch.setattr(
        "compare.checkpoint.reader.Reader.check", lambda self, path, array, *_: array
    )
    with pytest.raises(WrongTensorsError, match="although its checksum matches"):
        for number in range(1500):
            outcome(made.make(number))
    monkeypatch.setattr(
        "compare.checkpoint.reader.Reader.check", lambda self, path, array, *_: array[None][1]
    )
    with pytest.raises(IndexError):
        for number in range(500):
            outcome(made.make(number))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_fuzzer_asks_for_every_tensor(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reports a tensor that the file lost, and one that nobody saved."""
    path = seeds(tmp_path, kind)[0]
    assert outcome(path) == "the same"
    for other in ({**state(), "W_out.weight": torch.ones(3, 3)}, {"mask": state()["mask"]}):
        monkeypatch.setattr("compare.stress.fuzz_worker.state", lambda other=other: other)
        with pytest.raises(
            WrongTensorsError, match=r"W_.*: saved but not loaded, or loaded but never saved"
        ):
            outcome(path)


@pytest.mark.slow
@pytest.mark.again
def test_a_short_fuzz_in_processes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SHARES", {**dict.fromkeys(FORMATS, 0.0), "msgpack": 1.0})
    monkeypatch.setattr(fuzz, "FORMATS", ("msgpack",))
    (section,) = sections_of(fuzz.sections(3, keep=tmp_path / "cases"))
    assert [check.held for check in section.checks] == [True], section.checks
    assert not (tmp_path / "cases").exists()


@pytest.mark.slow
def test_the_fuzzers_clock_starts_when_its_readers_are_ready(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tally = fuzz.FormatCounts()
    for _ in fuzz._campaign("msgpack", 0, 0.0, tally, tmp_path):
        pass
    assert tally.inputs >= 100, "a campaign of 0 seconds did not wait for the first report"
    assert not tally.bad
    monkeypatch.setattr(fuzz, "FORMATS", ("msgpack",))
    monkeypatch.setattr(fuzz, "_campaign", lambda *_: iter(()))
    (section,) = sections_of(fuzz.sections(1, keep=tmp_path / "cases"))
    assert [check.held for check in section.checks] == [None], "a run without inputs has a verdict"


@pytest.mark.slow
@pytest.mark.again
def test_a_short_kill_campaign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill, "SUFFIXES", (".orbax",))
    (section,) = sections_of(kill.sections(5))
    assert [check.held for check in section.checks] == [True], section.checks


def test_the_kill_campaign_sees_a_writer_that_overwrites(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A plain `torch.save` that is killed leaves a truncated file."""
    path = compare.save_checkpoint(tmp_path / "state.pth", kill.state(3))
    tally = kill.FormatCounts()
    assert kill._read(path, tally, 3) == 3
    assert kill._read(path, tally, 4) == -1
    path.write_bytes(path.read_bytes()[:-1000])
    assert kill._read(path, tally, 0) == -1
    assert len(tally.complaints) == 2


def test_the_records_are_long_ones_without_a_loss() -> None:
    killed = json.loads((RECORDS / "kill-cpu.json").read_text(encoding="utf-8"))
    rows = next(block for block in killed["sections"][0]["blocks"] if isinstance(block, dict))[
        "rows"
    ]
    assert killed["held"] is True
    assert [(row[0], row[1] >= 200, row[-1]) for row in rows] == [
        (suffix, True, 0) for suffix in SUFFIXES
    ]
    fuzzed = json.loads((RECORDS / "fuzz-cpu.json").read_text(encoding="utf-8"))
    rows = next(block for block in fuzzed["sections"][0]["blocks"] if isinstance(block, dict))[
        "rows"
    ]
    assert fuzzed["held"] is True
    assert sum(int(row[1].replace(",", "")) for row in rows) >= 1_000_000
    assert {row[-1] for row in rows} == {0}


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_a_failed_read_waits_for_the_others(
    kind: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise TensorStore calls a closed event loop and prints the error on the terminal."""
    path = tmp_path / "state.orbax"
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(
            path, {f"array_{number}": kind(np.ones((2000, 500))) for number in range(12)}
        )
    content = json.loads((path / "_METADATA").read_text(encoding="utf-8"))
    entries = content["tree_metadata"]
    entry = next(name for name in entries if "array_3'" in name)
    entries[entry.replace("array_3", "gone")] = json.loads(
        json.dumps(entries[entry]).replace("array_3", "gone")
    )
    (path / "_METADATA").write_text(json.dumps(content), encoding="utf-8")
    too_late = []
    call_soon_threadsafe = asyncio.BaseEventLoop.call_soon_threadsafe

    def recording(loop: asyncio.BaseEventLoop, *args: Any, **kwargs: Any) -> Any:
        if loop.is_closed():
            too_late.append(args)
        return call_soon_threadsafe(loop, *args, **kwargs)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", recording)
    names = [(f"array_{number}",) for number in range(12)]
    for _ in range(5):
        with pytest.raises(CheckpointError, match="an array in it cannot be opened"):
            compare.read_checkpoint(path)
        with pytest.raises(CheckpointError, match="not a whole Orbax checkpoint"):
            orbax._restore(path, None, [("gone",), *names])
    assert len(orbax._restore(path, None, names)) == 12
    assert not too_late


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_a_killed_writer_left_is_swept_by_the_next(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"state{suffix}"
    left, empty, begun, other_path, foreign = (
        tmp_path / f".{path.name}.0123456789ab.tmp",
        tmp_path / f".{path.name}.0123456789ac.tmp",
        tmp_path / f".{path.name}.0123456789ae.tmp",
        tmp_path / ".other.pth.0123456789ab.tmp",
        tmp_path / f".{path.name}.0123456789ad.tmp",
    )
    for folder in (left, empty, begun, other_path, foreign):
        folder.mkdir()
    for folder in (left, other_path, foreign):
        (folder / "new").write_bytes(b"half")
    (begun / "owner").touch()
    for folder in (left, other_path):
        (folder / "owner").write_text("attention-parity 0123456789ab\n")
    (foreign / "owner").write_text("attention-parity 0123456789ab\n")  # the token of another
    compare.save_checkpoint(path, torch_module())
    kept = {path.name, other_path.name, foreign.name}
    assert {entry.name for entry in tmp_path.iterdir()} == kept


def test_a_writer_at_work_is_not_swept(tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    with writing.atomic_file(path) as stream:
        stream.write(b"mine")
        writing.sweep(path)
        assert len(list(tmp_path.iterdir())) == 1
    assert path.read_bytes() == b"mine"
    with writing.atomic_folder(tmp_path / "folder") as folder:
        (folder / "x").write_bytes(b"mine")
        writing.sweep(tmp_path / "folder")
    assert (tmp_path / "folder" / "x").read_bytes() == b"mine"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_writers_and_a_reader(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"state{suffix}"
    compare.save_checkpoint(path, kill.state(0))
    failed: list[BaseException] = []

    def save(value: int) -> None:
        try:
            for _ in range(4):
                compare.save_checkpoint(path, kill.state(value))
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=save, args=(value,)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        tensors = compare.read_checkpoint(path).values()
        extremes = [value for tensor in tensors for value in (tensor.min(), tensor.max())]
        assert len({float(value) for value in extremes}) == 1
    for writer in writers:
        writer.join()
    assert not failed
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_goes_while_it_is_looked_at_is_not_refused(tmp_path: Path) -> None:
    """Its files are removed one by one by the writer that has exchanged it."""
    path, looked = tmp_path / "folder", list[Path]()
    path.mkdir()

    def require_own(folder: Path) -> None:
        looked.append(folder)
        if len(looked) == 1:
            path.rename(tmp_path / "old")
            path.mkdir()
            raise FileError(folder, "holds what is gone", expected="", found="", mend="")

    with writing.atomic_folder(path, writing.Rules(require_own=require_own)) as folder:
        (folder / "mine").touch()
    assert (path / "mine").exists()
    assert looked[:2] == [path, path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_target_that_may_not_be_written(suffix: str, tmp_path: Path) -> None:
    """Nobody can make a file in /proc, so it stands for a read-only file system, even for root."""
    with pytest.raises(CheckpointError, match=r"/proc/state.*(could not be written|No such)"):
        compare.save_checkpoint(f"/proc/state{suffix}", torch_module())


@pytest.mark.filterwarnings("ignore::compare.checkpoint.errors.UnverifiedCheckpoint")
def test_a_folder_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that began with the old folder starts again and never mixes the two."""
    path = compare.save_checkpoint(tmp_path / "state.orbax", kill.state(1))
    opened: list[str] = []

    def replaced(where: str, memory: int | None, **more: Any) -> object:
        reader = open_checkpoint(where, memory, **more)
        if len(opened) < 3:
            compare.save_checkpoint(path, kill.state(2 + len(opened)))
        opened.append(where)
        return reader

    monkeypatch.setattr("compare.checkpoint.load.open_checkpoint", replaced)
    tensors = compare.read_checkpoint(path)
    assert {float(tensor.max()) for tensor in tensors.values()} == {4.0}
    assert len(opened) == 4
    torch.save({"x": torch.ones(1)}, tmp_path / "plain.pth")
    with pytest.warns(UnverifiedCheckpoint):
        compare.read_checkpoint(tmp_path / "plain.pth")
