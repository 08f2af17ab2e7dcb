"""Every error has five parts, and its next step works when it is taken."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx

import compare
from compare.checkpoint.errors import CheckpointError
from compare.cli import main
from compare.conversion.mapping import Policy, StateMapping

from ..support import linen_variables, torch_module


def refused(work: Callable[[], object]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        work()
    error = caught.value
    parts = error.path, error.key, error.expected, error.found, error.mend
    assert all(parts), f"{error}: {parts}"
    assert error.mend in str(error)
    return error


def saved(folder: Path, state: Any) -> Path:
    return compare.save_checkpoint(folder / "a.pth", state)


def test_nothing_there(tmp_path: Path) -> None:
    error = refused(lambda: compare.load_checkpoint(tmp_path / "a.pth", torch.nn.Linear(2, 2)))
    assert (error.key, error.found) == ("a.pth", "nothing")
    assert error.mend == "check the name, or save the checkpoint first"


def test_another_shape(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.nn.Linear(2, 2))
    error = refused(lambda: compare.load_checkpoint(path, torch.nn.Linear(3, 2)))
    assert (error.key, error.expected, error.found) == ("weight", "(2, 3)", "(2, 2)")
    assert error.mend.startswith("build weight with the shape (2, 2)")
    compare.load_checkpoint(path, torch.nn.Linear(2, 2))


def test_another_context_length(tmp_path: Path) -> None:
    path = saved(tmp_path, torch_module())
    shorter = torch.nn.Module()
    shorter.load_state_dict(torch_module().state_dict(), strict=False)
    module = torch_module()
    module.mask = torch.zeros(3, 3)
    error = refused(lambda: compare.load_checkpoint(path, module))
    assert "build the target with context_length=7" in error.mend


def test_a_missing_entry(tmp_path: Path) -> None:
    path = saved(tmp_path, {"weight": torch.ones(2, 2)})
    target = torch.nn.Linear(2, 2)
    error = refused(lambda: compare.load_checkpoint(path, target))
    assert (error.key, error.expected, error.found) == ("bias", "(2,)", "nothing")
    assert "policy={'bias': 'ignore'} keeps the target's own value" in error.mend
    bias = target.bias.clone()
    compare.load_checkpoint(path, target, policy={"bias": "ignore"})
    assert torch.equal(target.bias, bias) and torch.equal(target.weight, torch.ones(2, 2))


def test_a_missing_entry_of_flax(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "a.msgpack", {"params": {"a": np.ones(2, "f4")}})
    target = {"params": {"a": np.ones(2, "f4"), "b": np.full(3, 5, "f4")}}
    error = refused(lambda: compare.load_checkpoint(path, target))
    assert "policy={'params/b': 'ignore'} keeps the target's own value" in error.mend
    loaded = compare.load_checkpoint(path, target, policy={"params/b": "ignore"})
    assert loaded["params"]["b"].tolist() == [5, 5, 5]


def test_an_unexpected_entry(tmp_path: Path) -> None:
    path = saved(
        tmp_path, {"weight": torch.ones(2, 2), "bias": torch.ones(2), "old": torch.ones(1)}
    )
    error = refused(lambda: compare.load_checkpoint(path, torch.nn.Linear(2, 2)))
    assert (error.key, error.expected, error.found) == ("old", "no such entry", "(1,)")
    assert "policy={'old': 'ignore'} leaves it out" in error.mend
    compare.load_checkpoint(path, torch.nn.Linear(2, 2), policy={"old": "ignore"})


def test_an_edited_mask_is_named_as_the_reason(tmp_path: Path) -> None:
    state = {key: value for key, value in torch_module().state_dict().items() if key != "mask"}
    path = saved(tmp_path, state)
    module, variables = torch_module(), linen_variables()
    compare.load_checkpoint(path, module, policy={"mask": "verify"})
    module.mask[2, 0] = 1
    message = "the target's own was edited: 1 of its 49 entries"
    error = refused(lambda: compare.load_checkpoint(path, module, policy={"mask": "verify"}))
    assert message in str(error) and "policy={'mask': 'ignore'}" in error.mend
    variables["buffers"]["mask"] = variables["buffers"]["mask"].at[2, 0].set(1)
    flax_path = compare.save_checkpoint(
        tmp_path / "b.msgpack", {"params": linen_variables()["params"]}
    )
    policy: Any = {"buffers/mask": "verify"}
    error = refused(lambda: compare.load_checkpoint(flax_path, variables, policy=policy))
    assert message in str(error)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile
def test_a_wrappers_prefix(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    wrapped = saved(tmp_path, torch.nn.DataParallel(module).state_dict())
    error = refused(lambda: compare.load_checkpoint(wrapped, torch.nn.Linear(2, 2)))
    assert error.mend == "the file has a prefix: pass prefix='module.'"
    assert "unexpected module.*: 2 names begin so" in str(error)
    target = compare.load_checkpoint(wrapped, torch.nn.Linear(2, 2), prefix="module.")
    assert torch.equal(target.weight, module.weight)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    error = refused(lambda: compare.load_checkpoint(wrapped, model))
    assert error.mend == "the file has a prefix: pass prefix='module.'"
    error = refused(lambda: compare.load_checkpoint(wrapped, model, prefix="module."))
    assert error.mend.startswith('pass layouts={"module.weight": "transposed"} (')
    compare.load_checkpoint(
        wrapped, model, prefix="module.", layouts={"module.weight": "transposed"}
    )
    assert np.array_equal(model.kernel[...], module.weight.detach().numpy().T)
    plain = saved(tmp_path, module)
    compiled: Any = torch.compile(torch.nn.Linear(2, 2))
    error = refused(lambda: compare.load_checkpoint(plain, compiled))
    assert "load it into module.get_submodule('_orig_mod')" in error.mend
    compare.load_checkpoint(plain, compiled.get_submodule("_orig_mod"))
    assert torch.equal(compiled.state_dict()["_orig_mod.weight"], module.weight)


def test_entries_that_cannot_be_filled(tmp_path: Path) -> None:
    """Inside a container, as a parameter, or with a name that is a pattern: the statement works."""
    module: Any = torch.nn.Sequential(torch.nn.Linear(2, 2))
    path = saved(tmp_path, module)
    module[0].weight = torch.nn.Parameter(torch.zeros(1, 1).expand(2, 2))
    error = refused(lambda: compare.load_checkpoint(path, module))
    statement = error.mend.split("`")[1]
    exec(statement, {"module": module, "torch": torch})
    compare.load_checkpoint(path, module)
    listed: Any = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2).long(), False)])
    path = saved(tmp_path, {"0": torch.ones(2, dtype=torch.int16)})
    error = refused(lambda: compare.load_checkpoint(path, listed))
    exec(error.mend.split("`")[1], {"module": listed, "torch": torch})
    assert compare.load_checkpoint(path, listed)[0].tolist() == [1, 1]
    odd = torch.nn.Module()
    odd.register_buffer("x[0]", torch.zeros(1))
    path = saved(tmp_path, {"y": torch.ones(1)})
    error = refused(lambda: compare.load_checkpoint(path, odd, policy={"y": "ignore"}))
    policy = eval(error.mend.partition("policy=")[2].partition("}")[0] + "}")
    compare.load_checkpoint(path, odd, policy={"y": "ignore", **policy})


SHARING_MEMORY: dict[str, Callable[[], torch.Tensor]] = {
    "expanded": lambda: torch.zeros(3, 1).expand(3, 3),
    "unfolded": lambda: torch.zeros(5).unfold(0, 3, 1),
    "strided": lambda: torch.zeros(9).as_strided((3, 3), (1, 1)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("name", SHARING_MEMORY)
def test_a_buffer_without_memory_of_its_own(name: str, tmp_path: Path) -> None:
    module: Any = torch.nn.Module()
    module.b = torch.nn.Buffer(torch.arange(9.0).reshape(3, 3))
    path = saved(tmp_path, module)
    module.b = torch.nn.Buffer(SHARING_MEMORY[name]())
    error = refused(lambda: compare.load_checkpoint(path, module))
    exec(error.mend.split("`")[1], {"module": module, "torch": torch})
    assert compare.load_checkpoint(path, module).b.flatten().tolist() == list(range(9))
    module.b = torch.zeros(3, 6)[:, ::2].mT  # gaps, but no place twice
    assert compare.load_checkpoint(path, module).b.flatten().tolist() == list(range(9))


def test_an_own_mask_that_flax_has_no_place_for(tmp_path: Path) -> None:
    """It stays as it is, so it has to be the causal mask."""
    module: Any = torch.nn.Module()
    module.layer = torch.nn.Linear(4, 4)
    module.attn = torch.nn.Module()
    module.attn.register_buffer("bias", torch.tril(torch.ones(5, 5)))

    class Port(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    path = compare.save_checkpoint(tmp_path / "p.msgpack", Port())
    compare.load_checkpoint(path, module)
    module.attn.bias[4, 0] = 0.0
    policies: list[dict[str, Policy]] = [{}, {"attn.bias": "verify"}]
    for policy in policies:
        error = refused(partial(compare.load_checkpoint, path, module, policy=policy))
        assert "the target's own was edited" in str(error)
    chosen = eval(error.mend.partition("policy=")[2].partition("}")[0] + "}")
    compare.load_checkpoint(path, module, policy=chosen)
    assert module.attn.bias[4, 0] == 0.0


def test_a_lazy_target_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.nn.Sequential(torch.nn.Linear(3, 2)))
    error = refused(
        lambda: compare.load_checkpoint(path, torch.nn.Sequential(torch.nn.LazyLinear(2)))
    )
    assert "call the module once first" in error.mend and "unexpected" not in str(error)


def test_a_policy_beside_a_mapping(tmp_path: Path) -> None:
    """Whether the mapping is in the file or given, and whichever side lacks the entry."""

    class Model(nnx.Module):
        def __init__(self, *names: str) -> None:
            for name in names:
                setattr(self, name, nnx.Linear(2, 2, rngs=nnx.Rngs(0)))

    both: Any = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    one = torch.nn.ModuleDict({"a": both["a"]})
    mapping = compare.match(both, Model("a", "b"))
    more = compare.save_checkpoint(tmp_path / "more.pth", both, mapping=mapping)
    assert "b.weight" in str(refused(lambda: compare.load_checkpoint(more, Model("a"))))
    loaded: Any = compare.load_checkpoint(more, Model("a"), policy={"b.*": "ignore"})
    assert np.array_equal(loaded.a.kernel[...], both["a"].weight.detach().numpy().T)
    less = compare.save_checkpoint(tmp_path / "less.pth", one)
    target: Any = Model("a", "b")
    kept = np.asarray(target.b.kernel[...])
    compare.load_checkpoint(less, target, mapping=mapping, policy={"b/*": "ignore"})
    assert np.array_equal(target.b.kernel[...], kept)
    flax = compare.save_checkpoint(tmp_path / "less.msgpack", Model("a"))
    error = refused(lambda: compare.load_checkpoint(flax, both))
    assert "missing b.weight" in str(error), "the file lacks it"
    compare.load_checkpoint(flax, both, mapping=mapping, policy={"b.*": "ignore"})


def test_another_dtype(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.nn.Linear(2, 2).double())
    target = torch.nn.Linear(2, 2)
    error = refused(lambda: compare.load_checkpoint(path, target))
    assert error.mend == "`module.to(torch.float64)` first, or pass cast=True"
    compare.load_checkpoint(path, target, cast=True)
    compare.load_checkpoint(path, target.to(torch.float64))


def test_names_of_another_framework(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    error = refused(lambda: compare.save_checkpoint(tmp_path / "a.msgpack", layer))
    assert "pass mapping=compare.match(module, template)" in error.mend
    template = {"params": {"kernel": np.ones((2, 2), "f4"), "bias": np.ones(2, "f4")}}
    mapping = compare.match(layer, template)
    compare.save_checkpoint(tmp_path / "a.msgpack", layer, mapping=mapping)


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    for text in ("{", "{}", '{"flax": "linen", "rows": 3, "left": []}'):
        path.write_text(text)
        with pytest.raises(compare.MappingError) as caught:
            StateMapping.load(path)
        error = caught.value
        assert all((error.path, error.key, error.expected, error.found, error.mend))
        assert "compare.match(source, template).save(path)" in error.mend
    template = {"params": {"kernel": np.ones((2, 2), "f4"), "bias": np.ones(2, "f4")}}
    compare.match(torch.nn.Linear(2, 2), template).save(path)
    assert StateMapping.load(path).flax == "linen"


def _flipped(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    return path


Run = Callable[[str], tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line as the console script does: the exit code, and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run_main(command: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["attention-parity", *command.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run_main


def test_a_damaged_file_is_no_wrong_usage(run: Run) -> None:
    for name in ("good", "bad"):
        compare.save_checkpoint(f"{name}.safetensors", torch_module())
    _flipped(Path("bad.safetensors"))
    for command in (
        "verify good.safetensors bad.safetensors",
        "verify bad.safetensors good.safetensors",
        "inspect bad.safetensors",
        "convert bad.safetensors c.pth",
    ):
        code, printed = run(command)
        assert code == 1, command
        assert "Error: bad.safetensors: the values of" in printed
        assert "Usage" not in printed and "take another copy" in printed


def test_a_number_that_does_not_fit_is_no_wrong_usage(run: Run) -> None:
    compare.save_checkpoint("a.pth", {"w": torch.tensor([1e30])})
    code, printed = run("convert a.pth b.pth --dtype float16")
    assert code == 1 and "Usage" not in printed
    assert "choose float64 or float32 or bfloat16" in printed
    assert run("convert a.pth b.pth --dtype bfloat16")[0] == 0
    compare.save_checkpoint("w.pth", {"w": torch.tensor([1e300], dtype=torch.float64)})
    assert "choose float64\n" in run("convert w.pth b.pth --dtype float16")[1]


def test_wrong_usage_ends_with_2(run: Run) -> None:
    compare.save_checkpoint("a.pth", torch_module())
    for command in (
        "inspect",
        "inspect none.pth",
        "convert a.pth b.h5",
        "convert a.pth b.pth --layout flax",
        "verify a.pth a.pth --no-such-option",
    ):
        code, printed = run(command)
        assert code == 2 and "Usage" in printed, command
