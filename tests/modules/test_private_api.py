"""If torch lacks its undocumented operators, the package imports and uses the formula."""

import subprocess
import sys

import pytest
import torch

import torch_impl
from torch_impl import context, fused

SCRIPT = """
import torch
class WithoutFlash:
    def __getattr__(self, name):
        if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            raise AttributeError(name)
        return getattr(aten, name)
aten = torch.ops.aten
torch.ops.aten = WithoutFlash()
import torch_impl
from torch_impl import private_api
assert private_api.HAS_KERNELS is False
torch.manual_seed(0)
module = torch_impl.CausalAttentionWithBuffer(16, 16, 256, 0.0)
formula = torch_impl.CausalAttentionWithBuffer(16, 16, 256, 0.0, implementation="reference")
formula.load_state_dict(module.state_dict())
inputs = torch.randn(2, 256, 16)
print(torch.equal(module(inputs), formula(inputs)))
module(inputs).sum().backward()
"""


@pytest.mark.slow
def test_without_them_the_formula_is_taken() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


def test_without_kernels_there_is_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    ones, mask = torch.ones(1, 4, 2), torch_impl.causal_mask(4)
    assert fused.kernel_layout(ones, ones, ones, mask) is not None
    monkeypatch.setattr(fused, "HAS_KERNELS", False)
    assert fused.kernel_layout(ones, ones, ones, mask) is None


@pytest.mark.parametrize(
    ("owner", "name", "path"),
    [
        (torch._C, "_are_functorch_transforms_active", "formula"),
        (torch.autograd.forward_ad, "_current_level", "formula"),
        (torch._C, "_len_torch_dispatch_stack", "formula"),
        (torch._C._functorch, "get_interpreter_stack", "kernels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_without_a_query_a_transform_is_assumed(
    owner: object, name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = torch.ones(1, 4, 2)
    assert context.possible_path(ones) == "kernels"
    paths: list[str] = []

    def asked(one: torch.Tensor) -> torch.Tensor:
        paths.append(context.possible_path(one))
        return one

    with monkeypatch.context() as patched:
        patched.delattr(owner, name)
        assert context.possible_path(ones) == path
        torch.vmap(asked)(ones)
    torch.vmap(asked)(ones)
    assert paths == ["formula", "operator"]
