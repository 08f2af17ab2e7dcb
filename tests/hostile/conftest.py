"""A folder with one small checkpoint in every format, and the command line inside it."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import compare
from compare.cli import app
from torch_impl import CausalAttentionWithBuffer

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    module = CausalAttentionWithBuffer(3, 5, 6, 0.1)
    for suffix in ("pth", "safetensors", "msgpack", "orbax"):
        compare.save_checkpoint(folder / f"a.{suffix}", module)
    return folder


@pytest.fixture
def here(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own copy of the checkpoints, as the current folder."""
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(here: Path) -> Command:
    """Run the command line in this process: the exit code, and what was printed, in one line."""

    def run(*arguments: Any) -> tuple[int, str]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, " ".join(done.output.replace("│", " ").split())

    return run
