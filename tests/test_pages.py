"""What the pages say of the code and of the frameworks, where no other test says it."""

import inspect
import json
import re
import tomllib
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import flax_impl.dispatch
import torch_impl.dispatch
from compare.checkpoint.manifest import Crc32

from .support import normal, torch_module

ROOT = Path(__file__).parent.parent


def page(name: str) -> str:
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_the_lines_that_differ_are_in_the_files() -> None:
    """The table of the README quotes how each framework keeps the mask."""
    rows = re.findall(
        r"^\| (?:file|the mask as .*?) \|(.*)\|$", (ROOT / "README.md").read_text(), re.M
    )
    files, *quotes = ([cell.strip() for cell in row.split(" | ")] for row in rows)
    assert len(quotes) == 2
    for column, link in enumerate(files):
        match = re.search(r"\]\((.*)\)", link)
        assert match
        source = " ".join((ROOT / match[1]).read_text(encoding="utf-8").split())
        for quote in quotes:
            for part in quote[column].strip("`").split("..."):
                assert part.strip(")") in source, (match[1], part)


def test_the_numbers_of_tokens_are_those_of_the_code() -> None:
    for package, module in (("torch_impl", torch_impl.dispatch), ("flax_impl", flax_impl.dispatch)):
        text = page(f"{package}/README.md")
        assert f"uses the fused path from {module.MIN_FUSED_TOKENS} tokens on" in text


def test_both_commands_are_one_program() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"]["attention-parity"] == "compare.cli:main"
    assert "from compare.cli import main" in (ROOT / "compare/__main__.py").read_text(
        encoding="utf-8"
    )


def test_the_commit_hooks_are_the_checks() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for command in ("ruff format", "ruff check", "mypy", "lint-imports"):
        assert f"entry: {command}," in hooks


def _default(call: object, name: str) -> object:
    return inspect.signature(call).parameters[name].default  # type: ignore[arg-type]


def test_the_norms_have_other_epsilons() -> None:
    for layer in (torch.nn.LayerNorm(2), torch.nn.GroupNorm(1, 2), torch.nn.BatchNorm1d(2)):
        assert layer.eps == 1e-5
    assert torch.nn.RMSNorm(2).eps is None
    for name in ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"):
        nnx_default = _default(getattr(nnx, name).__init__, "epsilon")
        assert getattr(linen, name).epsilon == nnx_default == 1e-6
    assert linen.BatchNorm.epsilon == _default(nnx.BatchNorm.__init__, "epsilon") == 1e-5


def test_gelu_is_exact_in_torch_and_an_approximation_in_flax() -> None:
    inputs = np.linspace(-3, 3, 50)
    exact = torch.nn.GELU()(torch.from_numpy(inputs)).numpy()
    with jax.enable_x64(True):
        default = np.asarray(nnx.gelu(jnp.asarray(inputs)))
        same = np.asarray(nnx.gelu(jnp.asarray(inputs), approximate=False))
    assert np.abs(default - exact).max() > 1e-4
    assert np.abs(same - exact).max() < 8 * 2.0**-53 * np.abs(inputs).max()


def test_the_gradient_of_the_keys_bias_is_zero() -> None:
    """A bias of the keys adds the same number to all scores of a query, which softmax ignores."""
    module = torch_module().double()
    inputs = torch.from_numpy(normal(2, 7, module.input_embedding_dim)).double()
    module(inputs).square().sum().backward()
    key_bias, query_bias = module.W_key.bias.grad, module.W_query.bias.grad
    assert key_bias is not None and query_bias is not None
    assert float(key_bias.abs().max()) < 1e-13 < 1e-6 < float(query_bias.abs().max())


@pytest.mark.parametrize("seed", range(20))
def test_a_checksum_sees_every_burst_of_32_bits(seed: int) -> None:
    """Drawn data, places, lengths and patterns."""
    random = np.random.default_rng(seed)
    data = random.bytes(int(random.integers(8, 400)))
    for _ in range(100):
        length = int(random.integers(1, 33))
        begin = int(random.integers(0, 8 * len(data) - length + 1))
        # A burst begins and ends with a bit that is flipped.
        pattern = 1 | int(random.integers(0, 1 << (length - 1))) << 1 if length > 1 else 1
        pattern |= 1 << (length - 1)
        damaged = int.from_bytes(data, "little") ^ (pattern << begin)
        other = damaged.to_bytes(len(data), "little")
        assert Crc32(data).hexdigest() != Crc32(other).hexdigest()
    assert int(Crc32(data).hexdigest(), 16) == zlib.crc32(data)


def test_what_a_gpu_gave_is_in_its_records() -> None:
    readme, records = page("README.md"), Path(__file__).parent.parent / "compare/records"

    def held(name: str) -> str:
        report = json.loads((records / f"{name}-cuda.json").read_text(encoding="utf-8"))
        assert report["machine"]["gpu"].startswith(("NVIDIA H100", "NVIDIA H200"))
        verdicts = [check["held"] for part in report["sections"] for check in part["checks"]]
        return f"[{sum(verdicts)} of {len(verdicts)} held](compare/records/{name}-cuda.json)"

    for name in ("outputs", "checks", "checkpoints"):
        assert held(name) in readme
    summary = (records / "gpu-h100.txt").read_text(encoding="utf-8")
    assert re.search(r"\btests +held\n", summary)
    ratios = [
        float(row.split()[-1]) / float(row.split()[-2]) for row in summary.split("\ncausal ")[1:]
    ]
    assert (round(min(ratios), 1), round(max(ratios), 1)) == (1.6, 4.3)
    times = json.loads((records / "attention-cuda.json").read_text(encoding="utf-8"))["sections"]
    (errors,) = (
        block
        for block in times[0]["blocks"]
        if isinstance(block, dict) and block.get("columns", [""])[0] == "ratio"
    )
    assert all(float(error) < 1 for _, *row in errors["rows"] for error in row if error), (
        "a product in TF32 is outside the bound"
    )
