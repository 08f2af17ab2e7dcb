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
from typing import Any

import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

import compare
from compare.checkpoint import convert, save
from compare.checkpoint.convert import convert_checkpoint
from compare.files import writing
from compare.subprocesses import ROOT

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


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "msgpack"])
def test_what_came_while_the_source_was_read_stays(suffix: str, here: Path) -> None:
    source = compare.save_checkpoint(
        here / "s.safetensors", {f"w{i}": torch.ones(9) for i in range(3)}
    )
    target = here / f"new.{suffix}"

    def meanwhile(done: int, total: int) -> None:
        if done == total:
            target.write_bytes(b"mine")

    wrapped = {"params": {f"w{i}": torch.ones(9).numpy() for i in range(3)}}
    if suffix == "msgpack":
        source = compare.save_checkpoint(here / "s.safetensors", wrapped)
    with pytest.raises(compare.CheckpointError, match="that version stays"):
        convert_checkpoint(source, target, progress=meanwhile)
    assert target.read_bytes() == b"mine"


class _Parts(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.parts = torch.nn.ParameterList(
            torch.nn.Parameter(torch.full((9,), value)) for _ in range(50)
        )


@pytest.mark.parametrize("raises", [KeyboardInterrupt, TimeoutError])
def test_a_signal_leaves_no_half_loaded_module(
    raises: type[BaseException], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes at the 20th of 50 tensors: the handler runs when the last is there."""
    path = compare.save_checkpoint(here / "p.safetensors", _Parts(1.0))
    module = _Parts(0.0)

    def handler(_number: int, _frame: object) -> None:
        raise raises

    before = signal.signal(signal.SIGALRM, handler)
    calls = iter(range(1000))
    true = torch.Tensor.copy_

    def copy_(*arguments: object) -> torch.Tensor:
        if next(calls) == 20:
            signal.raise_signal(signal.SIGALRM)
        return true(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.Parameter, "copy_", copy_, raising=False)
    try:
        with pytest.raises(raises):
            compare.load_checkpoint(path, module)
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.signal(signal.SIGALRM, before)
    assert next(calls) > 20
    assert all(bool((part == 1.0).all()) for part in module.parts)


def test_a_signal_leaves_no_half_loaded_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compare.save_checkpoint(here / "n.msgpack", nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(1))
    true = nnx.update

    def update(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)
        true(*arguments)

    monkeypatch.setattr(nnx, "update", update)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            compare.load_checkpoint(path, model)
    finally:
        signal.signal(signal.SIGINT, before)
    expected = nnx.Linear(2, 2, rngs=nnx.Rngs(0)).kernel[...]
    assert model.kernel[...].tolist() == expected.tolist()


def test_a_hook_that_replaces_a_layer_and_raises(here: Path) -> None:
    module: Any = torch.nn.Sequential(torch.nn.Linear(2, 2))
    path = compare.save_checkpoint(here / "h.pth", module)
    layer = module[0]

    def hook(module: Any, _keys: object) -> None:
        module[0] = torch.nn.Linear(2, 2)
        module.note = "half done"
        raise RuntimeError("as planned")

    module.register_load_state_dict_post_hook(hook)
    with pytest.raises(compare.CheckpointError, match="as planned"):
        compare.load_checkpoint(path, module)
    assert module[0] is layer and not hasattr(module, "note")


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


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.again),
        pytest.param(signal.SIGHUP, marks=pytest.mark.again),
    ],
)
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


def test_ctrl_c_within_a_callback_is_not_lost() -> None:
    """Python prints and ignores what is raised while the garbage collector calls back."""
    script = """
import gc, os, signal
import compare.cli as cli

def swallow(phase, info):
    gc.callbacks.remove(swallow)
    os.kill(os.getpid(), signal.SIGINT)

def work(**options):
    gc.callbacks.append(swallow)
    gc.collect()
    return 0

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
cli.app = work
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "Exception ignored" in done.stderr
