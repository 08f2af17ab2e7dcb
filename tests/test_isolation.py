"""Each implementation works without the other framework, and `--help` works without both."""

import subprocess
import sys

import pytest

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""

TORCH = """
import torch, torch_impl
for kind in (torch_impl.CausalAttentionWithBuffer, torch_impl.CausalAttentionWithoutBuffers):
    print(tuple(kind(13, 11, 7, 0.1)(torch.zeros(2, 5, 13)).shape))
"""

FLAX = """
import jax, jax.numpy as jnp, flax_impl
from flax import nnx
for kind in (flax_impl.CausalAttentionWithBuffer, flax_impl.CausalAttentionWithoutBuffers):
    print(kind(13, 11, 7, 0.1).init_with_output(jax.random.key(0), jnp.zeros((2, 5, 13)))[0].shape)
for kind in (flax_impl.nnx.CausalAttentionWithBuffer, flax_impl.nnx.CausalAttentionWithoutBuffers):
    print(kind(13, 11, 7, 0.1, rngs=nnx.Rngs(0))(jnp.zeros((2, 5, 13))).shape)
"""

HELP = """
import runpy
sys.argv = ["compare", "--help"]
runpy.run_module("compare", run_name="__main__")
"""

MAIN = HELP.replace(', "--help"', "")


def python(script: str, blocked: set[str]) -> subprocess.CompletedProcess[str]:
    source = f"BLOCKED = {blocked!r}\n{BLOCK}\n{script}"
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("script", "blocked", "lines"),
    [
        (TORCH, {"jax", "jaxlib", "flax", "orbax", "safetensors"}, 2),
        (FLAX, {"torch", "safetensors"}, 4),
    ],
    ids=["torch without jax", "flax without torch"],
)
def test_each_implementation_works_alone(script: str, blocked: set[str], lines: int) -> None:
    done = python(script, blocked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(2, 5, 11)"] * lines


@pytest.mark.parametrize(("package", "other"), [("torch_impl", "jax"), ("flax_impl", "torch")])
def test_the_other_framework_is_not_even_imported(package: str, other: str) -> None:
    done = python(f"import {package}\nprint({other!r} in sys.modules)", set())
    assert done.stdout.strip() == "False", done.stderr


def test_help_needs_no_framework() -> None:
    done = python(HELP, {"torch", "jax", "flax", "numpy"})
    assert done.returncode == 0, done.stderr
    for command in ("notebook", "outputs", "devices", "checkpoints"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "no.pth"], ["convert", "no.pth", "a.msgpack"], ["verify", "no.pth", "b"]],
)
def test_a_missing_file_is_named_before_a_framework_is_imported(arguments: list[str]) -> None:
    done = python(
        HELP.replace('"--help"', ", ".join(map(repr, arguments))), {"torch", "jax", "flax", "numpy"}
    )
    assert done.returncode == 2
    assert "no.pth: no such file or folder" in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("missing", ["torch", "jax", "flax"])
@pytest.mark.slow
def test_a_missing_framework_is_named(missing: str) -> None:
    """`sys.modules[name] = None` makes `find_spec` report that the package is not installed."""
    done = python(f"sys.modules[{missing!r}] = None\n{MAIN}", set())
    assert done.returncode == 2
    message = " ".join(done.stderr.replace("│", " ").split())
    assert f"{missing} cannot be imported" in message
    assert "pip install 'attention-parity[all]'" in message
