"""`match`: the names pair by rules of the command line, and the mapping serves `convert`."""

import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from typer.testing import CliRunner

import compare
from compare.cli import app


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, " ".join(done.output.replace("│", " ").split())


class Flax(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query, self.key = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    source = torch.nn.ModuleDict({"qk": torch.nn.Linear(4, 6), "head": torch.nn.Linear(3, 2)})
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state | {"steps": torch.ones(())}}, tmp_path / "last.ckpt")
    like = compare.save_checkpoint(tmp_path / "like.msgpack", Flax(nnx.Rngs(0)))
    return tmp_path / "last.ckpt", like


RULES = (
    *("--rename", "head=out", "--split", "qk=query,key", "--policy", "steps=ignore"),
    *("--prefix", "module.", "--select", "state_dict", "--layout-of", "*.weight=transposed"),
)


def test_a_saved_mapping_converts(files: tuple[Path, Path], tmp_path: Path) -> None:
    source, like = files
    code, printed = run("match", source, like, *RULES, "--save", tmp_path / "map.json")
    assert code == 0, printed
    assert "module.qk.weight[1/2] key/kernel parameter transposed" in printed
    assert "steps exists on one side only and is left out (ignore)." in printed
    target = tmp_path / "state.msgpack"
    code, printed = run(
        *("convert", source, target, "--map", tmp_path / "map.json", "--select", "state_dict")
    )
    assert code == 0, printed
    model = compare.load_checkpoint(target, Flax(nnx.Rngs(1)))
    with pytest.warns(compare.UnverifiedCheckpoint):
        state = compare.read_checkpoint(source, select="state_dict")
    assert jnp.array_equal(model.key.kernel[...], jnp.asarray(state["module.qk.weight"][3:].T))


def test_convert_and_verify_take_the_rules_themselves(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    source, like = files
    target = tmp_path / "state.msgpack"
    code, printed = run("convert", source, target, "--like", like, *RULES)
    assert code == 0, printed
    assert f"paired with those of {like}"[:20] in printed
    assert run("verify", source, target, *RULES)[0] == 0
    assert run("verify", source, target, "--like", like, *RULES)[0] == 0
    exchanged = ["qk=key,query" if rule == "qk=query,key" else rule for rule in RULES]
    code, printed = run("verify", source, target, *exchanged)
    assert code == 1 and "NOT everything held" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "last.ckpt", "b.msgpack", "--rename", "a=b"], "--rename needs --like"),
        (
            ["convert", "last.ckpt", "b.msgpack", "--tied", "a=b", "--map", "like.msgpack"],
            "--tied needs --like, with the names of the other framework, and no --map",
        ),
        (
            ["verify", "last.ckpt", "like.msgpack", "--prefix", "a.", "--map", "like.msgpack"],
            "--prefix has no effect beside --map: leave one out",
        ),
    ],
)
def test_rules_that_would_do_nothing(
    arguments: list[str],
    message: str,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files[0].parent)
    code, printed = run(*arguments)
    assert code == 2 and message in printed


def test_what_an_error_suggests_can_be_pasted(tmp_path: Path) -> None:
    stacked = {"layers": {"fc": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}}}
    like = compare.save_checkpoint(tmp_path / "like.msgpack", {"params": stacked})
    layers = torch.nn.ModuleList(
        torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 4)}) for _ in range(2)
    )
    source = compare.save_checkpoint(
        tmp_path / "state.pth", torch.nn.ModuleDict({"layers": layers})
    )
    code, printed = run("match", source, like)
    assert code == 1
    (suggested,) = re.findall(r"stack=({.*?})", printed)
    line = f"match {source} {like} --stack {shlex.quote(suggested)}"
    assert run(*shlex.split(line))[0] == 0


def test_a_module_of_ones_own(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_to_match.py").write_text(
        "from tests.commands.test_match import Flax\nfrom flax import nnx\n"
        "def make():\n    return Flax(nnx.Rngs(0))\n"
    )
    monkeypatch.chdir(tmp_path)
    code, printed = run("match", files[0], "mine_to_match:make", *RULES)
    assert code == 0, printed
    code, printed = run("match", files[0], "mine_to_match:other", *RULES)
    assert code == 2
    assert "is not a module that can be inspected" in printed


def test_a_module_that_is_read_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mine_to_keep"
    package.mkdir()
    code = "import torch\nlayer = torch.nn.Linear(2, 2)\n"
    inner, outer = package / "inner.py", package / "__init__.py"
    for file in (inner, outer):
        file.write_text(code)
    monkeypatch.chdir(tmp_path)
    compare.save_checkpoint("like.msgpack", nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    for arguments in (
        ("match", "mine_to_keep.inner:layer", "like.msgpack", "--save", inner),
        ("match", "like.msgpack", "mine_to_keep.inner:layer", "--json", outer),
        ("inspect", "--module", "mine_to_keep:layer", "--html", outer),
    ):
        status, printed = run(*arguments)
        assert status == 2, printed
        assert "is what is read" in printed
    assert inner.read_text() == outer.read_text() == code


def test_a_mapping_goes_into_a_pipe_and_not_in_its_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    layer = torch.nn.Linear(2, 2)
    mapping = compare.match(layer, nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        mapping.save(tmp_path / "pipe")
        assert '"flax": "nnx"' in read.result(60)
    assert (tmp_path / "pipe").is_fifo()
    path = compare.save_checkpoint(tmp_path / "a.pth", layer)
    status, printed = run("match", path, path, "--save", tmp_path / "none" / "a.json")
    assert status == 2
    assert "does not exist; make it first" in printed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["like.msgpack", "like.msgpack"], 2, "are two of Flax"),
        (["like.msgpack", "no.pth"], 2, "no such file"),
        (["last.ckpt", "like.msgpack"], 1, "select='state_dict'"),
        (["last.ckpt", "like.msgpack", "--select", "state_dict"], 1, "module."),
        (["like.msgpack", "last.ckpt", "--rename", "a"], 2, "--rename a: say OLD=NEW"),
        (["like.msgpack", "last.ckpt", "--rename", "{a"], 2, "--rename {a:"),
        (["like.msgpack", "last.ckpt", "--policy", "a=drop"], 2, "there are ignore, verify and"),
        (["like.msgpack", "last.ckpt", "--layout-of", "a=b"], 2, "there is no layout"),
    ],
)
def test_what_cannot_be_matched_is_named(
    arguments: list[str],
    code: int,
    message: str,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files[0].parent)
    found, printed = run("match", *arguments)
    assert (found, message in printed) == (code, True), printed


def test_a_split_that_is_none_is_wrong_usage(tmp_path: Path) -> None:
    for name in ("a.pth", "b.msgpack"):
        (tmp_path / name).write_bytes(b"")
    code, output = run("match", tmp_path / "a.pth", tmp_path / "b.msgpack", "--split", '{"w": 3}')
    assert code == 2
    assert "is no list of Flax names" in output
