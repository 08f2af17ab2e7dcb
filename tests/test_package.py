"""The wheel works outside the repository, and the annotated shapes are enforced."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ANNOTATIONS = """
from jaxtyping import install_import_hook
with install_import_hook(["torch_impl", "flax_impl"], "beartype.beartype"):
    import flax_impl, torch_impl
import jax, jax.numpy as jnp, torch
from flax import nnx
torch_impl.CausalAttentionWithBuffer(13, 11, 7, 0.1)(torch.zeros(2, 5, 13))
torch_impl.CausalAttentionWithoutBuffers(13, 11, 7, 0.1)(torch.zeros(2, 5, 13))
for kind in (flax_impl.CausalAttentionWithBuffer, flax_impl.CausalAttentionWithoutBuffers):
    kind(13, 11, 7, 0.1).init(jax.random.key(0), jnp.zeros((2, 5, 13)))
for kind in (flax_impl.nnx.CausalAttentionWithBuffer, flax_impl.nnx.CausalAttentionWithoutBuffers):
    kind(13, 11, 7, 0.1, rngs=nnx.Rngs(0))(jnp.zeros((2, 5, 13)))
heads, shorter = torch.zeros(2, 5, 11), torch.zeros(2, 4, 11)
try:
    torch_impl.masked_attention(heads, heads, shorter, torch.zeros(7, 7), lambda x: x)
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed"
)
@pytest.mark.slow
def test_the_notebook_runs_from_an_installed_wheel(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "compare",
        "flax_impl",
        "torch_impl",
    }
    done = subprocess.run(
        [sys.executable, "-m", "compare", "notebook"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "PyTorch 36/36, Flax Linen 36/36, Flax NNX 36/36" in done.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("beartype") is None, reason="beartype is not installed"
)
@pytest.mark.slow
def test_the_annotated_shapes_are_true() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANNOTATIONS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "TypeCheckError", "a wrong shape went unnoticed"
