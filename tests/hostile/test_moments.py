"""What happens while a command works: files that change, appear or shrink, and signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import compare
from compare.checkpoint import convert, save
from compare.checkpoint.convert import convert_checkpoint
from compare.files import writing

pytestmark = pytest.mark.filterwarnings("ignore::compare.checkpoint.errors.UnverifiedCheckpoint")


@contextmanager
def touched(path: str) -> Iterator[None]:
    done = threading.Event()

    def touch() -> None:
        while not done.wait(0.002):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_target_is_not_replaced_by_a_mixture(here: Path) -> None:
    save_file({f"l{i}": torch.zeros(256, 1024) for i in range(8)}, "s.safetensors")
    save_file({"keep": torch.ones(4)}, "t.safetensors")
    before = Path("t.safetensors").read_bytes()
    with touched("s.safetensors"):  # noqa: SIM117
        with pytest.raises(compare.CheckpointError, match="was replaced 20 times"):
            convert_checkpoint("s.safetensors", "t.safetensors")
    assert Path("t.safetensors").read_bytes() == before


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "msgpack"])
def test_a_source_that_is_cut_ends_in_an_error(
    suffix: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read, not mapped: a mapped file that is cut ends the process."""
    state = {f"w{i}": torch.ones(1 << 19) for i in range(4)}
    wrapped = {"params": {key: value.numpy() for key, value in state.items()}}
    source = compare.save_checkpoint(
        here / f"big.{suffix}", wrapped if suffix == "msgpack" else state
    )
    true = convert.watched

    def cutting(tensors: object, progress: object) -> object:
        os.truncate(source, 1 << 21)
        return true(tensors, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "watched", cutting)
    target = here / f"old.{'msgpack' if suffix == 'msgpack' else 'safetensors'}"
    target.write_bytes(b"old")
    with pytest.raises(compare.CheckpointError, match=r"not whole|cut|replaced"):
        convert_checkpoint(source, target)
    assert target.read_bytes() == b"old"
    assert not list(here.glob(".*.tmp"))


@pytest.mark.parametrize("was_there", [True, False])
@pytest.mark.parametrize("suffix", ["pth", "safetensors", "msgpack", "orbax"])
def test_what_came_meanwhile_stays(
    was_there: bool, suffix: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = here / f"a.{suffix}" if was_there else here / f"new.{suffix}"
    true = save._require_readable

    def meanwhile(path: Path, *others: object) -> None:
        true(path, *others)  # type: ignore[arg-type]
        if suffix == "orbax":
            if was_there:
                target.rename(here / "away")
            target.mkdir()
            (target / "mine").touch()
        else:
            (here / "x").write_bytes(b"mine")
            (here / "x").replace(target)

    monkeypatch.setattr(save, "_require_readable", meanwhile)
    with pytest.raises(compare.CheckpointError, match="by another program meanwhile; that version"):
        compare.save_checkpoint(target, compare.read_checkpoint("a.pth"))
    if suffix == "orbax":
        assert (target / "mine").exists()
    else:
        assert target.read_bytes() == b"mine"
    assert not list(here.glob(".*.tmp"))


def test_a_report_that_came_meanwhile_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = writing._install

    def meanwhile(*arguments: object) -> None:
        Path("r.json").write_text("mine")
        true(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "_install", meanwhile)
    with pytest.raises(writing.FileError, match="that version stays"):
        writing.write_text(Path("r.json"), "ours")
    assert Path("r.json").read_text() == "mine"


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
from compare.checkpoint import convert
from compare.cli import main
true = convert.watched
def slow(tensors, progress):
    def told(done, total):
        print("writing", flush=True)
        time.sleep(30)
    return true(tensors, told)
convert.watched = slow
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(number: signal.Signals, here: Path) -> None:
    before = Path("a.msgpack").read_bytes()
    line = [sys.executable, "-c", SLOW, "convert", "a.pth", "a.msgpack"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        while b"writing" not in child.stdout.readline():
            assert child.poll() is None
        time.sleep(0.1)
        child.send_signal(number)
        code = child.wait(timeout=30)
    assert code == (130 if number == signal.SIGINT else -number)
    assert Path("a.msgpack").read_bytes() == before
    assert not list(here.glob(".*.tmp"))
