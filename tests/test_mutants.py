"""The parity judge catches each statement of the attention written wrong, in both frameworks."""

import inspect
import re

import numpy as np
import pytest

import flax_impl.attention
import torch_impl.attention
from compare.cases import Config
from compare.run import IMPLEMENTATIONS

from .support import judge, normal, state_of
from .test_outputs import RECTANGLE, ROW_CLOSED

CONFIG = Config(13, 11, 7, 0.4, qkv_bias=True)
TOKENS = 5

MUTANTS = {
    "queries and keys swapped": (r"queries @ keys\.mT", "keys @ queries.mT"),
    "keys and values swapped": (r"queries @ keys\.mT", "queries @ values.mT"),
    "values for keys": (r"@ values", "@ keys"),
    "no scale": (r"scores / head_dim\*\*0\.5", "scores"),
    "scale by head_dim": (r"head_dim\*\*0\.5", "head_dim"),
    "scale 1 % off": (r"head_dim\*\*0\.5", "(1.01 * head_dim**0.5)"),
    "scale multiplies": (r"scores / head_dim", "scores * head_dim"),
    "softmax over the queries": (r"(dim|axis)=-1", r"\1=-2"),
    "mask ignored": (r"blocked = (.*)  #", r"blocked = (\1) & False  #"),
    "mask inverted": (r"blocked = (.*)  #", r"blocked = ~(\1)  #"),
    "mask transposed": (r"mask\[None", "mask.mT[None"),
    "mask from the other corner": (r":num_tokens, :num_tokens", "-num_tokens:, -num_tokens:"),
    "finite fill": (r"-(torch|jnp)\.inf", "-1e9"),
    "mask after the softmax": (
        r"scores = (?:scores\.masked_fill|jnp\.where).*\n    (weights = .*)  #",
        r"\1 * (1.0 - mask[None, :num_tokens, :num_tokens])  #",
    ),
    "dropout forgotten": (r"dropout\(weights\)", "weights"),
    "dropout before the softmax": (r"softmax\(scores", "softmax(dropout(scores)"),
}


@pytest.mark.parametrize(("pattern", "replacement"), MUTANTS.values(), ids=MUTANTS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_judge_catches(name: str, pattern: str, replacement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = torch_impl.attention if name == "torch" else flax_impl.attention
    users = {
        "torch": "torch_impl.causal_attention",
        "linen": "flax_impl.linen.causal_attention",
        "nnx": "flax_impl.nnx.causal_attention",
    }
    source, count = re.subn(pattern, replacement, inspect.getsource(home.masked_attention))
    assert count == 1, "the mutant does not apply to the source"
    namespace = dict(vars(home))
    exec(source, namespace)
    assert all(verdicts(name)), "a false alarm on the unbroken code"
    monkeypatch.setattr(f"{users[name]}.masked_attention", namespace["masked_attention"])
    assert not all(verdicts(name))


def verdicts(name: str) -> list[bool]:
    """Judge the implementation under masks of three shapes, and under dropout."""
    inputs = normal(2, TOKENS, CONFIG.input_embedding_dim)
    keep = np.random.default_rng(1).random((2, TOKENS, TOKENS)) >= CONFIG.dropout
    masks = [None, np.array(RECTANGLE, dtype=np.float32), np.array(ROW_CLOSED, dtype=np.float32)]
    plain = [judge(name, CONFIG, state_of(CONFIG, "float32", mask), inputs).held for mask in masks]
    return [*plain, judge(name, CONFIG, state_of(CONFIG, "float32"), inputs, keep=keep).held]
