"""The part of a file that holds the state, where a training program wrote more."""

import argparse
import pathlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx, serialization
from flax.training import train_state
from flax.traverse_util import flatten_dict
from safetensors.flax import save_file
from typer.testing import CliRunner

import compare
from compare import CheckpointError
from compare.cli import app

PARAMS = {"fc": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.arange(3.0)}}
TEMPLATE = {"params": jax.tree.map(jnp.zeros_like, PARAMS)}


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, " ".join(done.output.split())


def trained() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return module, optimizer


def train_state_of(params: Any) -> train_state.TrainState:
    return train_state.TrainState.create(apply_fn=lambda x: x, params=params, tx=optax.adam(1e-3))


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    ("name", "select", "wrap"),
    [
        ("last.ckpt", "state_dict", lambda state: {"epoch": 3, "state_dict": state, "lr": None}),
        ("best.pth.tar", "ema/module", lambda state: {"ema": {"module": state, "decay": 0.9}}),
        ("all.pt", "model", lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)}),
    ],
)
def test_a_state_dict_inside(
    name: str, select: str, wrap: Any, is_zip: bool, tmp_path: Path
) -> None:
    module, optimizer = trained()
    content = {**wrap(module.state_dict()), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    target = torch.nn.Linear(2, 3)
    with pytest.raises(CheckpointError) as refused:
        compare.load_checkpoint(tmp_path / name, target)
    assert refused.value.mend == f"pass select={select!r} (--select {select})"
    with pytest.warns(compare.UnverifiedCheckpoint):
        compare.load_checkpoint(tmp_path / name, target, select=select)
    assert torch.equal(target.weight, module.weight)
    with pytest.warns(compare.UnverifiedCheckpoint):
        state = compare.read_checkpoint(tmp_path / name, select=select)
    assert torch.equal(state["bias"], module.bias)
    with compare.open_checkpoint(tmp_path / name, select=select) as stored:
        others = {"last.ckpt": {"epoch", "lr"}, "best.pth.tar": {"ema/decay"}, "all.pt": {"args"}}
        assert {*stored.left_out} == others[name] | {"optimizer"}


def test_the_command_line_names_what_is_left_out(tmp_path: Path) -> None:
    module, optimizer = trained()
    source, target = tmp_path / "last.ckpt", tmp_path / "state.safetensors"
    torch.save({"state_dict": module.state_dict(), "optimizer": optimizer.state_dict()}, source)
    code, output = run("convert", source, target)
    assert code == 1
    assert "--select state_dict" in " ".join(output.replace("│", " ").split())
    code, output = run("convert", source, target, "--select", "state_dict")
    assert code == 0
    assert "Left out: optimizer." in output
    assert run("verify", source, target, "--select", "state_dict")[0] == 0
    _, shown = run("inspect", source, "--select", "state_dict")
    assert "Left out: optimizer." in shown
    assert "weight" in shown


def test_nothing_of_what_is_left_out_is_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return pathlib.Path.touch, (tmp_path / "was_run",)

    module, _ = trained()
    torch.save({"state_dict": module.state_dict(), "callback": Runs()}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"its code was not run.*select='state_dict'"):
        compare.read_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(compare.UnverifiedCheckpoint):
        compare.read_checkpoint(tmp_path / "last.ckpt", select="state_dict")
    with pytest.raises(CheckpointError, match="its code was not run"):
        torch.save({"state_dict": {"a": torch.ones(1), "b": Runs()}}, tmp_path / "in.ckpt")
        compare.read_checkpoint(tmp_path / "in.ckpt", select="state_dict")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["checkpoint_3", "state.msgpack", "state.orbax"])
@pytest.mark.parametrize("has_collections", [True, False])
def test_a_train_state(name: str, has_collections: bool, tmp_path: Path) -> None:
    state = train_state_of({"params": PARAMS} if has_collections else PARAMS)
    if name.endswith("orbax"):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((tmp_path / name).absolute(), state)
    else:
        (tmp_path / name).write_bytes(serialization.to_bytes(state))
    with pytest.raises(CheckpointError, match=r"pass select='params' \(--select params\)"):
        compare.load_checkpoint(tmp_path / name, TEMPLATE)
    with pytest.warns(compare.UnverifiedCheckpoint):
        loaded = compare.load_checkpoint(tmp_path / name, TEMPLATE, select="params")
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, {"params": PARAMS}))
    with compare.open_checkpoint(tmp_path / name, select="params") as stored:
        assert set(stored.left_out) == {"step", "opt_state"}
    module = torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 3)})
    with pytest.warns(compare.UnverifiedCheckpoint):
        compare.load_checkpoint(tmp_path / name, module, select="params")
    np.testing.assert_array_equal(module["fc"].weight.detach().numpy().T, PARAMS["fc"]["kernel"])  # type: ignore[operator]


def test_several_collections(tmp_path: Path) -> None:
    stats = {"norm": {"mean": jnp.ones(3)}}
    content = {"params": PARAMS, "batch_stats": stats, "step": 3}
    (tmp_path / "state.msgpack").write_bytes(serialization.to_bytes(content))
    template = {**TEMPLATE, "batch_stats": jax.tree.map(jnp.zeros_like, stats)}
    with pytest.raises(CheckpointError, match=r"pass select=\['params', 'batch_stats'\]"):
        compare.load_checkpoint(tmp_path / "state.msgpack", template)
    with pytest.warns(compare.UnverifiedCheckpoint):
        loaded = compare.load_checkpoint(
            tmp_path / "state.msgpack", template, select=["params", "batch_stats"]
        )
    expected = {"params": PARAMS, "batch_stats": stats}
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, expected))


def test_lists_and_none_in_an_orbax_folder(tmp_path: Path) -> None:
    layers = [{"kernel": jnp.full((2, 2), float(index)), "bias": None} for index in range(3)]
    content = {"params": {"layers": layers}, "opt_state": (jnp.ones(2), None)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "state").absolute(), content)
    template = jax.tree.map(jnp.zeros_like, {"params": {"layers": layers}})
    with pytest.warns(compare.UnverifiedCheckpoint):
        loaded = compare.load_checkpoint(tmp_path / "state", template, select="params")
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, {"params": {"layers": layers}}))
    with compare.open_checkpoint(tmp_path / "state", select="params") as stored:
        ((_, middle),) = stored.read([("params", "layers", "1", "kernel")])
    np.testing.assert_array_equal(middle, layers[1]["kernel"])


def test_random_streams_are_no_state(tmp_path: Path) -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)])

    source, target = Model(nnx.Rngs(0)), Model(nnx.Rngs(1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "state").absolute(), nnx.state(source))
    with pytest.warns(compare.UnverifiedCheckpoint):
        compare.load_checkpoint(tmp_path / "state", target)
    kernels = [nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in (source, target)]
    assert jax.tree.all(jax.tree.map(np.array_equal, *kernels))
    with compare.open_checkpoint(tmp_path / "state") as stored:
        assert stored.left_out == ("layers/1/rngs (a random stream)",)


@pytest.mark.parametrize("joint", ["/", "."])
@pytest.mark.parametrize("has_collections", [True, False])
def test_safetensors_that_flax_wrote(joint: str, has_collections: bool, tmp_path: Path) -> None:
    variables = {"params": PARAMS} if has_collections else PARAMS
    flat = {joint.join(path): leaf for path, leaf in flatten_dict(variables).items()}
    path = tmp_path / "model.safetensors"
    save_file(flat, path, metadata={"format": "flax"})
    module = torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 3)})
    for target in (module, TEMPLATE, {"params": PARAMS}):
        with pytest.warns(compare.UnverifiedCheckpoint):
            loaded = compare.load_checkpoint(path, target)
        made = loaded if isinstance(loaded, dict) else compare.torch_to_linen(module, TEMPLATE)
        assert jax.tree.all(jax.tree.map(np.array_equal, made, {"params": PARAMS}))


def test_params_alone_are_not_saved_as_collections(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'fc/kernel is in no collection.*{"params": params}'):
        compare.save_checkpoint(tmp_path / "bare.msgpack", PARAMS)
    own = {"my_state": {"fc": {"table": jnp.ones(3)}}}
    saved = compare.save_checkpoint(tmp_path / "own.msgpack", own)
    loaded = compare.load_checkpoint(saved, own)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, own))


def test_what_cannot_be_selected_is_named(tmp_path: Path) -> None:
    module, optimizer = trained()
    content = {"state_dict": module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "last.ckpt")
    for select, message in (
        ("model", "has no part model: select one of state_dict, optimizer"),
        ("state_dict/weight/x", "has no part x: leave select out"),
        (["state_dict", "optimizer"], "a torch module has one state dict: select one part"),
        ("optimizer", "state is a dict; expected a tensor: pass select='state_dict'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            compare.read_checkpoint(tmp_path / "last.ckpt", select=select)
    for name in ("own.pth", "own.safetensors", "own.msgpack", "own.orbax"):
        mapping = compare.match(torch.nn.ModuleDict({"fc": module}), TEMPLATE)
        source = TEMPLATE if name.endswith(("msgpack", "orbax")) else module
        saved = compare.save_checkpoint(tmp_path / name, source)
        with pytest.raises(CheckpointError, match="select has no effect"):
            compare.read_checkpoint(saved, select="params", mapping=mapping)
