"""Each implementation writes and reads every format, completely or not at all."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.torch
import torch
from flax import nnx, serialization

import compare
from compare.checkpoint.errors import CheckpointError
from compare.checkpoint.formats import orbax
from compare.commands import checkpoints
from compare.conversion.tensors import tensor_to_numpy
from compare.files import writing
from compare.proof.cases import FRAMEWORKS, PRIME, PRIME_BIAS, Config
from compare.runners.run import build_nnx, build_torch, linen_template

from ..support import (
    linen_variables,
    nnx_model,
    numpy_state_of,
    same_bits,
    sections_of,
    state_of,
    torch_module,
)

pytestmark = pytest.mark.filterwarnings("ignore::compare.checkpoint.errors.UnverifiedCheckpoint")

SUFFIXES = checkpoints.SUFFIXES
FILES = (".pth", ".safetensors", ".msgpack")


def sources(config: Config = PRIME_BIAS) -> dict[str, Any]:
    """The same state in each implementation, with every 1 of its mask changed to 2."""
    return checkpoints.edited_sources(config, numpy_state_of(config, "float32"), buffer=True)


def fresh(implementation: str, config: Config = PRIME_BIAS) -> Any:
    if implementation == "torch":
        return build_torch(config, buffer=True)
    return (
        build_nnx(config, buffer=True)
        if implementation == "nnx"
        else linen_template(config, buffer=True)
    )


def run_script(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_state(loaded: Any) -> dict[str, torch.Tensor]:
    if isinstance(loaded, torch.nn.Module):
        return dict(loaded.state_dict())
    return (
        compare.nnx_to_torch(loaded)
        if isinstance(loaded, nnx.Module)
        else compare.linen_to_torch(loaded)
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("writer", FRAMEWORKS)
def test_each_reads_what_each_wrote(writer: str, suffix: str, tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / f"state{suffix}", sources()[writer])
    expected = state_of(PRIME_BIAS, "float32")
    expected["mask"] = 2.0 * expected["mask"]
    for reader in FRAMEWORKS:
        state = as_state(compare.load_checkpoint(path, fresh(reader)))
        assert list(state) == list(expected)
        assert all(
            same_bits(tensor_to_numpy(state[key]), tensor_to_numpy(expected[key]))
            for key in expected
        )
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], (
        "a temporary file was left behind"
    )


@pytest.mark.slow
def test_the_edit_survives_into_new_processes_and_is_lost_without_the_buffer() -> None:
    """All formats, writers and readers at the notebook's size; each reader is a new process."""
    sections = sections_of(checkpoints.sections())
    checks = [check for section in sections for check in section.checks]
    assert len(checks) == 8
    assert all(check.held for check in checks), checks


@pytest.mark.parametrize("suffix", FILES)
def test_the_bytes_depend_on_the_values_alone(suffix: str, tmp_path: Path) -> None:
    written = set()
    for name, source in sources().items():
        for attempt in (1, 2):
            written.add(
                compare.save_checkpoint(tmp_path / f"{name}{attempt}{suffix}", source).read_bytes()
            )
    assert len(written) == 1


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_dtype_is_stored_without_x64(suffix: str, dtype: str, tmp_path: Path) -> None:
    mask = np.arange(49, dtype=np.int64).reshape(7, 7) + 2**40
    state = state_of(PRIME_BIAS, dtype, mask)
    back = compare.read_checkpoint(compare.save_checkpoint(tmp_path / f"state{suffix}", state))
    assert all(same_bits(tensor_to_numpy(back[key]), tensor_to_numpy(state[key])) for key in state)
    with pytest.raises(
        CheckpointError, match=r"mask: values from 1099511627776 to .* do not fit int32"
    ):
        compare.load_checkpoint(
            tmp_path / f"state{suffix}", linen_template(PRIME_BIAS, buffer=True)
        )


def test_the_plain_libraries_read_our_files(tmp_path: Path) -> None:
    variables = sources()["linen"]
    state = compare.linen_to_torch(variables)
    paths = {
        suffix: compare.save_checkpoint(tmp_path / f"state{suffix}", variables)
        for suffix in SUFFIXES
    }
    loaded = torch.load(paths[".pth"], weights_only=True)
    assert build_torch(PRIME_BIAS, buffer=True).load_state_dict(loaded)
    assert torch.equal(safetensors.torch.load_file(paths[".safetensors"])["mask"], state["mask"])
    restored = serialization.from_bytes(linen_variables(), paths[".msgpack"].read_bytes())
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, variables))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(paths[".orbax"], variables)
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, variables))


def test_we_read_the_plain_libraries_files(tmp_path: Path) -> None:
    state, variables = state_of(PRIME_BIAS, "float32"), linen_variables()
    torch.save(torch_module().state_dict(), tmp_path / "state.pt")
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    (tmp_path / "state.msgpack").write_bytes(serialization.to_bytes(variables))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", variables)
    for name in ("state.pt", "state.safetensors", "state.msgpack", "state"):
        back = compare.read_checkpoint(tmp_path / name)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state), name


def test_a_file_saved_on_cuda_loads_without_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every storage in the file is marked `cuda:0`, as on a GPU; plain torch.load refuses it."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(torch_module().state_dict(), tmp_path / "state.pth")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="Attempting to deserialize object on a CUDA device"):
            torch.load(tmp_path / "state.pth", weights_only=True)
    for implementation in FRAMEWORKS:
        state = as_state(compare.load_checkpoint(tmp_path / "state.pth", fresh(implementation)))
        assert torch.equal(state["mask"], torch_module().mask)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_state_on_the_device_is_saved_for_any_machine(
    suffix: str, device: str, tmp_path: Path
) -> None:
    module = torch_module().to(device)
    on_device = jax.device_put(linen_variables(), jax.devices(device)[0])
    torch_path = compare.save_checkpoint(tmp_path / f"torch{suffix}", module)
    jax_path = compare.save_checkpoint(tmp_path / f"jax{suffix}", on_device)
    for path in (torch_path, jax_path):
        assert all(tensor.device.type == "cpu" for tensor in compare.read_checkpoint(path).values())
        again = compare.load_checkpoint(path, build_torch(PRIME_BIAS, buffer=True).to(device))
        assert again.mask.device == module.mask.device
        assert torch.equal(again.mask, module.mask)


# Each function makes one kind of unreadable file.
def _no_file(path: Path) -> None: ...
def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _junk(path: Path) -> None:
    path.write_bytes(b"neither one nor the other\n" * 9)


def _cut(path: Path) -> None:
    compare.save_checkpoint(path, torch_module())
    path.write_bytes(path.read_bytes()[:-20])


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_file, "no such file or folder"),
        (_empty, "is empty"),
        (_junk, "not a whole"),
        (_cut, "not a whole"),
        (_folder, "is not a regular file: name an Orbax folder without a suffix"),
    ],
)
def test_unreadable_files(
    make: Callable[[Path], None], message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"state{suffix}"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        compare.read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "weights_only=False" not in str(caught.value)


def test_unreadable_orbax_folders(tmp_path: Path) -> None:
    (tmp_path / "empty.orbax").mkdir()
    (tmp_path / "file.orbax").write_bytes(b"1")
    for name, message in (
        ("empty.orbax", "is not a finished Orbax checkpoint"),
        ("file.orbax", "is a file; an Orbax checkpoint is a folder"),
        ("none.orbax", "no such file or folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            compare.read_checkpoint(tmp_path / name)


@pytest.mark.slow
def test_an_orbax_folder_without_its_data(tmp_path: Path) -> None:
    """This runs in a process of its own, because callbacks of Orbax fail after the error."""
    path = compare.save_checkpoint(tmp_path / "cut.orbax", torch_module())
    for data in (path / "d").iterdir():
        data.unlink()
    script = (
        "import sys, compare\n"
        "try: compare.read_checkpoint(sys.argv[1])\n"
        "except compare.CheckpointError as error: print(error)\n"
    )
    assert f"{path}: not a whole Orbax checkpoint" in run_script(script, str(path))


class _Planted:
    def __reduce__(self) -> Any:
        return (exec, ("import pathlib; pathlib.Path('planted').touch()",))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"mask": _Planted()}, tmp_path / "state.pth")
    with pytest.raises(
        CheckpointError, match="more than a state dict of tensors; its code was not run"
    ):
        compare.read_checkpoint(tmp_path / "state.pth")
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list; expected a state dict"),
        ({1: torch.zeros(2)}, "holds a dict; expected a state dict"),
        ({"mask": "causal"}, "mask is a str; expected a tensor"),
    ],
)
def test_torch_files_of_something_else(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match=message):
        compare.read_checkpoint(tmp_path / "state.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: [1, 2], "holds a list; expected Linen variables"),
        (lambda tree: {**tree, "buffers": {"mask": "causal"}}, "mask: is a str, not an array"),
        (
            lambda tree: {**tree, "buffers": {"mask": {"a": np.zeros(2)}}},
            r"unexpected buffers/mask/a \(2,\)",
        ),
        (lambda tree: {**tree, "cache": {"index": np.zeros(2)}}, r"unexpected cache/index \(2,\)"),
        (lambda tree: {"buffers": tree["buffers"]}, r"missing W_query.weight"),
    ],
)
def test_msgpack_files_of_something_else(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    tree = jax.tree.map(np.asarray, linen_variables(PRIME))
    (tmp_path / "state.msgpack").write_bytes(serialization.msgpack_serialize(change(tree)))
    with pytest.raises(CheckpointError, match=message):
        compare.read_checkpoint(tmp_path / "state.msgpack")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("reader", FRAMEWORKS)
def test_a_state_that_does_not_fit_changes_nothing(
    reader: str, suffix: str, tmp_path: Path
) -> None:
    longer = Config(13, 11, 11, 0.1, qkv_bias=True)
    path = compare.save_checkpoint(tmp_path / f"state{suffix}", torch_module(longer, seed=9))
    target = fresh(reader) if reader != "linen" else linen_variables()
    before = {key: tensor_to_numpy(tensor).copy() for key, tensor in as_state(target).items()}
    with pytest.raises(
        CheckpointError, match=r"mask has shape \(11, 11\).*context_length=11"
    ) as caught:
        compare.load_checkpoint(path, target)
    assert [entry.name for entry in caught.value.mismatch.misshaped] == ["mask"]
    for key, tensor in as_state(target).items():
        assert same_bits(tensor_to_numpy(tensor), before[key])


# torch 2.11 warns about every sparse tensor that it loads.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "value", [torch.zeros(11).to_sparse(), torch.zeros(11, device="meta")], ids=["sparse", "meta"]
)
def test_a_tensor_without_plain_values_changes_nothing(value: torch.Tensor, tmp_path: Path) -> None:
    torch.save({**state_of(PRIME_BIAS, "float32"), "W_value.bias": value}, tmp_path / "state.pth")
    module = torch_module(seed=9)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"W_value.bias: a (sparse|meta)"):
        compare.load_checkpoint(tmp_path / "state.pth", module)
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


def test_an_expanded_mask_is_not_half_loaded_into(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "state.pth", torch_module(seed=1))
    module = torch_module(seed=9)
    module.mask = torch.zeros(1, 7).expand(7, 7)
    with pytest.raises(CheckpointError, match=r"`module.mask = module.mask.contiguous\(\)` first"):
        compare.load_checkpoint(path, module)
    assert torch.equal(module.W_key.weight, torch_module(seed=9).W_key.weight)


class _WithExtraState(torch.nn.Linear):
    def get_extra_state(self) -> Any:
        return {"step": 3}


def test_a_module_with_more_than_tensors_is_refused_with_all_else(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "state.pth", {"weight": torch.zeros(2, 3)})
    with pytest.raises(
        CheckpointError, match="_extra_state: is a dict in the module; only tensors are stored"
    ) as caught:
        compare.load_checkpoint(path, _WithExtraState(2, 2))
    assert [entry.name for entry in caught.value.mismatch.missing] == ["bias"]
    assert [entry.name for entry in caught.value.mismatch.misshaped] == ["weight"]


def test_links_permissions_and_views(tmp_path: Path) -> None:
    real = compare.save_checkpoint(tmp_path / "real.pth", torch_module(seed=1))
    real.chmod(0o600)
    (tmp_path / "link.pth").symlink_to(real)
    compare.save_checkpoint(tmp_path / "link.pth", torch_module(seed=2))
    assert (tmp_path / "link.pth").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    assert torch.equal(
        compare.read_checkpoint(real)["W_key.weight"], torch_module(seed=2).W_key.weight
    )
    view = compare.save_checkpoint(tmp_path / "view.pth", {"mask": torch.zeros(1000, 1000)[:2, :2]})
    assert view.stat().st_size < 10_000, "the view took its whole storage along"


def test_torch_modules_are_never_cast_into(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "state.safetensors", torch_module(PRIME))
    with pytest.raises(
        CheckpointError,
        match=r"mask: is torch.float32; the module has torch.float64: "
        r"`module.to\(torch.float32\)` first",
    ):
        compare.load_checkpoint(path, torch_module(PRIME).double())
    whole = compare.save_checkpoint(
        tmp_path / "bool.pth", {**state_of(PRIME, "float32"), "mask": torch.ones(7, 7) > 0}
    )
    with pytest.raises(
        CheckpointError, match=r"`module.mask = module.mask.to\(torch.bool\)` first"
    ):
        compare.load_checkpoint(whole, torch_module(PRIME))
    with torch.device("meta"):
        unmade = build_torch(PRIME, buffer=True)
    with pytest.raises(CheckpointError, match=r"mask: the module is on the meta device"):
        compare.load_checkpoint(path, unmade)
    with pytest.raises(TypeError, match="target is a str"):
        compare.load_checkpoint(path, "module")  # type: ignore[call-overload]


def test_weights_without_a_mask_do_not_load_into_the_class_with_one(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "state.msgpack", torch_module(PRIME, buffer=False))
    for implementation in FRAMEWORKS:
        with pytest.raises(CheckpointError, match="missing mask"):
            compare.load_checkpoint(path, fresh(implementation, PRIME))


@pytest.mark.parametrize(
    ("name", "source", "error", "message"),
    [
        (
            "state.h5",
            torch_module,
            CheckpointError,
            r"unknown suffix '.h5': name it with one of .pth, .pt,",
        ),
        (
            "none/state.pth",
            torch_module,
            CheckpointError,
            "the folder .*none does not exist: make it first",
        ),
        ("folder.pth", torch_module, CheckpointError, "is not a regular file"),
        ("file.orbax", torch_module, CheckpointError, "is not a folder"),
        ("pipe.pth", torch_module, CheckpointError, "is not a regular file"),
        (
            ".",
            torch_module,
            CheckpointError,
            "is a folder that Orbax did not write; it was not changed",
        ),
        (".pth", torch_module, CheckpointError, "is a suffix without a name: say 'state.pth'"),
        (
            "mixed",
            torch_module,
            CheckpointError,
            "holds thesis.tex beside an Orbax checkpoint; it was not changed",
        ),
        (
            "state.pth",
            lambda: {1: torch.zeros(2)},
            CheckpointError,
            "the key 1 is an int; a state dict has names",
        ),
        ("state.pth", lambda: nnx.state(nnx_model()), CheckpointError, "give the NNX model"),
        (
            "folder",
            torch_module,
            CheckpointError,
            "is a folder that Orbax did not write; it was not changed",
        ),
        ("state.pth", dict, CheckpointError, "there is no state in a dict"),
        ("state.pth", lambda: 3, CheckpointError, "there is no state in an int"),
        ("state.pth", lambda: {"mask": 3}, CheckpointError, "mask is an int; expected a tensor"),
        (
            "state.pth",
            lambda: {"mask": torch.zeros(2, device="meta")},
            CheckpointError,
            "mask: a meta tensor",
        ),
        (
            "state.msgpack",
            lambda: {"head": torch.zeros(2)},
            CheckpointError,
            "nothing says how the names pair: pass mapping=",
        ),
        (
            "state.orbax",
            lambda: {**state_of(PRIME, "float32"), "mask": torch.zeros(0, 0)},
            CheckpointError,
            "Orbax cannot store .*mask",
        ),
    ],
)
def test_what_cannot_be_saved(
    name: str, source: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    (tmp_path / "file.orbax").write_text("x")
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "_METADATA").write_text("{}")
    (tmp_path / "mixed" / "thesis.tex").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        compare.save_checkpoint(tmp_path / name, source())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_package_is_named(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        CheckpointError,
        match=r"needs .*, which is not installed: pip install 'attention-parity\[all\]'",
    ):
        compare.save_checkpoint(tmp_path / f"state{suffix}", torch_module())


@pytest.mark.parametrize(
    "suffix",
    [
        ".orbax",
        pytest.param(".pth", marks=pytest.mark.again),
        pytest.param(".safetensors", marks=pytest.mark.again),
        pytest.param(".msgpack", marks=pytest.mark.again),
    ],
)
@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file(suffix: str, tmp_path: Path) -> None:
    """A process with a limit of 20 kB a file stands for the full disk."""
    path = compare.save_checkpoint(tmp_path / f"state{suffix}", torch_module())
    before = compare.read_checkpoint(path)
    script = (
        "import resource, sys, torch, compare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "names = ['mask', *(f'W_{name}.weight' for name in ('query', 'key', 'value'))]\n"
        "try: compare.save_checkpoint(sys.argv[1], {name: torch.ones(99, 99) for name in names})\n"
        "except compare.CheckpointError as error: print(error)\n"
    )
    printed = run_script(script, str(path))
    assert "could not be written" in printed
    assert "what was there before is unchanged" in printed
    assert "make room for 156,816 bytes" in printed
    assert "File too large" in printed
    after = compare.read_checkpoint(path)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# After an interrupt inside `open` itself, only Python has the file object and can close it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("seconds", [0.01, 0.03, 0.06, 0.1])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.slow
def test_an_interrupt_is_one_and_leaves_nothing(
    suffix: str, seconds: float, tmp_path: Path
) -> None:
    """Ctrl-C at any moment of a save raises KeyboardInterrupt and leaves nothing behind.

    torch replaces the interrupt by another error, and Orbax goes on writing in its own threads.
    """
    path = tmp_path / f"state{suffix}"
    tree = {
        "params": {f"w{index}": np.full((1000, 1000), index, np.float32) for index in range(12)}
    }
    tensors = {name: torch.from_numpy(array) for name, array in tree["params"].items()}
    source: Any = tensors if suffix in (".pth", ".safetensors") else tree
    compare.save_checkpoint(path, source)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        compare.save_checkpoint(path, source)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGALRM, before)
    time.sleep(0.3)  # a thread might still be writing
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with compare.open_checkpoint(path) as stored:
        assert {str(key[-1]): float(array.mean()) for key, array in stored.read()} == {
            f"w{i}": i for i in range(12)
        }


def test_an_interrupted_start_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        begun.wait(60)
        raise KeyboardInterrupt

    def work() -> None:
        begun.set()
        time.sleep(0.2)
        ended.append(True)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        orbax._in_a_thread(work)
    assert ended


def test_an_interrupt_from_before_is_not_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the writer gave up")

    monkeypatch.setattr(writing.os, "fsync", fail)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(CheckpointError, match="the writer gave up"):
            compare.save_checkpoint(tmp_path / "state.pth", {"x": torch.ones(3)})


@pytest.mark.parametrize(
    ("name", "key", "mend"),
    [
        ("a" * 240, "x", "choose a shorter name"),
        ("state", "\ud800", "rename the entry: its name is not valid text"),
    ],
)
def test_what_room_does_not_mend(name: str, key: str, mend: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=mend):
        compare.save_checkpoint(tmp_path / f"{name}.safetensors", {key: torch.ones(3)})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failing_writer_leaves_the_old_checkpoint(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compare.save_checkpoint(tmp_path / f"state{suffix}", torch_module(seed=1))

    def fail(*_: Any) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(writing, "_fsync", fail)
    monkeypatch.setattr(writing.os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"could not be written \(the disk went away\)"):
        compare.save_checkpoint(path, torch_module(seed=2))
    monkeypatch.undo()
    assert torch.equal(
        compare.read_checkpoint(path)["W_key.weight"], torch_module(seed=1).W_key.weight
    )
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_folders_are_exchanged_where_the_system_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing.ctypes, "CDLL", lambda *_, **__: object())
    path = compare.save_checkpoint(tmp_path / "state.orbax", torch_module(seed=1))
    compare.save_checkpoint(path, torch_module(seed=2))
    assert torch.equal(
        compare.read_checkpoint(path)["W_key.weight"], torch_module(seed=2).W_key.weight
    )
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_saving_leaves_its_argument_alone(tmp_path: Path) -> None:
    state, variables, model = state_of(PRIME, "float32"), linen_variables(PRIME), nnx_model(PRIME)
    kinds = {key: type(value) for key, value in state.items()}
    for suffix in SUFFIXES:
        for source in (state, variables, model):
            compare.save_checkpoint(tmp_path / f"state{suffix}", source)
    assert {key: type(value) for key, value in state.items()} == kinds
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix in SUFFIXES:
        assert compare.read_checkpoint(
            compare.save_checkpoint(f"state{suffix}", torch_module())
        ).keys()
    assert {entry.name for entry in tmp_path.iterdir()} == {f"state{suffix}" for suffix in SUFFIXES}
