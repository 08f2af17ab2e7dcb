"""The catalog of planted bugs. A change is a regular expression and its replacement."""

import re
import tomllib
from importlib.resources import files
from typing import Literal, NamedTuple

from ..proof.cases import FRAMEWORKS, Framework

Change = tuple[str, str]

ATTENTION = {
    "torch": "torch_impl.attention",
    "linen": "flax_impl.attention",
    "nnx": "flax_impl.attention",
}
MODULES = {
    "torch": "torch_impl.causal_attention",
    "linen": "flax_impl.linen.causal_attention",
    "nnx": "flax_impl.nnx.causal_attention",
}
HEADS = {
    "torch": "torch_impl.multi_head_attention",
    "linen": "flax_impl.linen.multi_head_attention",
    "nnx": "flax_impl.nnx.multi_head_attention",
}
LINEN_VARIABLE = r'self\.variable\("buffers", "mask", causal_mask, self\.context_length\)'
SCALE = r"head_dim\*\*0\.5"
BLOCKED = r"blocked = (.*)  #"
FILLED = r"scores = (?:scores\.masked_fill|jnp\.where).*\n"
OPEN_MASK = "mask[:num_tokens, :num_tokens]"
CONTEXT = r"return dropout\(weights\) @ values"
RETURNED = "return dropout(weights) @ values"
WRITTEN = r"return \[arrays\[path\]\]"


class Mutant(NamedTuple):
    """A bug planted in one implementation.

    Attributes:
        name: what is wrong.
        implementation: the framework whose checks must see it.
        module: the module whose source is changed.
        changes: the changes.
        by: who thought it up: the authors of the checks, or a reader who had not seen the catalog.
    """

    name: str
    implementation: Framework
    module: str
    changes: tuple[Change, ...]
    by: Literal["ours", "reader"] = "ours"


def _readers() -> list[Mutant]:
    """Return the bugs of `reader.toml`, whose changes are literal text."""
    text = files("compare.mutants").joinpath("reader.toml").read_text(encoding="utf-8")
    return [
        Mutant(
            bug["name"],
            bug["framework"],
            bug["module"],
            ((re.escape(bug["old"]), bug["new"].replace("\\", r"\\")),),
            "reader",
        )
        for bug in tomllib.loads(text)["bug"]
    ]


def _attention(name: str, *changes: Change, only: Framework | None = None) -> list[Mutant]:
    """Return the mutants with these changes in `attention.py`, for all frameworks or only one."""
    return [
        Mutant(name, framework, ATTENTION[framework], changes)
        for framework in FRAMEWORKS
        if only in (None, framework)
    ]


def _per_framework(
    name: str, modules: dict[str, str], **changes: Change | tuple[Change, ...]
) -> list[Mutant]:
    """Return the mutants with a framework's own changes, for the frameworks that have any."""
    mutants = []
    for framework in FRAMEWORKS:
        if change := changes.get(framework):
            as_tuple = change if isinstance(change[0], tuple) else (change,)
            mutants.append(Mutant(name, framework, modules[framework], as_tuple))
    return mutants


def _classes(name: str, *changes: Change) -> list[Mutant]:
    """Return the mutants with the same changes in the three `causal_attention.py`."""
    return [Mutant(name, framework, MODULES[framework], changes) for framework in FRAMEWORKS]


def _flax(name: str, module: str, *changes: Change) -> list[Mutant]:
    """Return the mutants with these changes in a module that both Linen and NNX use."""
    return [Mutant(name, framework, module, changes) for framework in ("linen", "nnx")]


def _training(name: str, torch: Change | None, flax: Change | None) -> list[Mutant]:
    """Return the mutants with these changes in the training loops."""
    changes: dict[Framework, Change | None] = {"torch": torch, "linen": flax, "nnx": flax}
    return [
        Mutant(name, framework, "compare.runners.train", (change,))
        for framework, change in changes.items()
        if change
    ]


_SCALING = [
    *_attention("no scale", (f"scores / {SCALE}", "scores")),
    *_attention("scale by head_dim", (SCALE, "head_dim")),
    *_attention("scale by sqrt(tokens)", (SCALE, "num_tokens**0.5")),
    *_attention("scale multiplies", ("scores / head_dim", "scores * head_dim")),
    *_attention("scale 1 % off", (SCALE, "(1.01 * head_dim**0.5)")),
    *_attention("scale 1e-9 off", (SCALE, "((1 + 1e-9) * head_dim**0.5)")),
    *_classes(
        "scale by sqrt(input_embedding_dim)",
        (
            r"queries = self\.W_query\(inputs\)",
            "queries = self.W_query(inputs)\n"
            "        queries = queries * (queries.shape[-1] / inputs.shape[-1]) ** 0.5",
        ),
    ),
    *_attention(
        "softmax before the scale",
        (rf"scores = scores / {SCALE}", "scores = scores * 1"),
        (r"softmax\(scores, (dim|axis)=-1\)", r"softmax(scores, \1=-1) / head_dim**0.5"),
    ),
]

_MASKING = [
    *_attention("mask ignored", (BLOCKED, r"blocked = (\1) & False  #")),
    *_attention("mask inverted", (BLOCKED, r"blocked = ~(\1)  #")),
    *_attention("mask transposed", (r"mask\[:num", "mask.mT[:num")),
    *_attention(
        "mask from the other corner", (r":num_tokens, :num_tokens", "-num_tokens:, -num_tokens:")
    ),
    *_attention("only entries of 1 block", (BLOCKED, f"blocked = {OPEN_MASK} == 1  #")),
    *_attention("only positive entries block", (BLOCKED, f"blocked = {OPEN_MASK} > 0  #")),
    *_attention("assumed causal", (BLOCKED, "blocked = causal_mask(num_tokens)[None] > 0  #")),
    *_attention("the diagonal is blocked", (r"(diagonal|k)=1\)", r"\1=0)")),
    *_attention("blocked by -1e4", (r"-(torch|jnp)\.inf", "-1e4")),
    *_attention("blocked by -1e9", (r"-(torch|jnp)\.inf", "-1e9")),
    *_attention(
        "mask added times -1e9",
        (FILLED, f"scores = scores + ({OPEN_MASK} * -1e9).to(scores)\n"),
        only="torch",
    ),
    *_flax(
        "mask added times -1e9",
        "flax_impl.attention",
        (FILLED, f"scores = scores + ({OPEN_MASK} * -1e9).astype(scores.dtype)\n"),
    ),
    *_attention(
        "mask after the softmax",
        (rf"{FILLED}    (weights = .*)  #", rf"\1 * (1.0 - {OPEN_MASK}).to(scores)  #"),
        only="torch",
    ),
    *_flax(
        "mask after the softmax",
        "flax_impl.attention",
        (rf"{FILLED}    (weights = .*)  #", rf"\1 * (1.0 - {OPEN_MASK}.astype(scores.dtype))  #"),
    ),
    Mutant(
        "a closed row is 0",
        "torch",
        "torch_impl.closed_rows",
        (
            (
                r"where\(closed, filled\.to\(outputs\.dtype\), outputs\)",
                "where(closed, 0.0, outputs)",
            ),
        ),
    ),
    *_flax(
        "a closed row is 0",
        "flax_impl.attention",
        (r"return dropout\(weights\)", "return dropout(jnp.nan_to_num(weights))"),
    ),
]

_SHAPES = [
    *_attention(
        "fewer queries are the first tokens",
        (r"num_tokens - queries\.shape\[-2\] :\]", ": queries.shape[-2]]"),
    ),
    *_attention(
        "heads alternate between their keys",
        (r"repeat_interleave\(groups, dim=-3\)", "repeat(1, groups, 1, 1)"),
        only="torch",
    ),
    *_flax(
        "heads alternate between their keys",
        "flax_impl.attention",
        (r"jnp\.repeat\(keys, groups, axis=-3\)", "jnp.tile(keys, (groups, 1, 1))"),
    ),
]

_MIXING = [
    *_attention("softmax over the queries", (r"(dim|axis)=-1", r"\1=-2")),
    *_attention("softmax over the batch", (r"(dim|axis)=-1", r"\1=0")),
    *_attention(
        "softmax twice",
        (
            r"(torch|jax\.nn)\.softmax\((.*), (dim|axis)=-1\)",
            r"\1.softmax(\1.softmax(\2, \3=-1), \3=-1)",
        ),
    ),
    *_attention("queries and keys swapped", (r"queries @ keys\.mT", "keys @ queries.mT")),
    *_attention(
        "keys and values swapped",
        (r"queries @ keys\.mT", "queries @ values.mT"),
        ("@ values  #", "@ keys  #"),
    ),
    *_attention("values for keys", (r"queries @ keys\.mT", "queries @ values.mT")),
    *_attention("keys for values", ("@ values  #", "@ keys  #")),
    *_attention(
        "a later token leaks",
        (CONTEXT, r"return dropout(weights) @ (values + 1e-9 * values.mean(0)[None])"),
    ),
    *_classes(
        "keys from W_query", (r"keys = self\.W_key\(inputs\)", "keys = self.W_query(inputs)")
    ),
    *_classes(
        "values from W_key", (r"values = self\.W_value\(inputs\)", "values = self.W_key(inputs)")
    ),
    *_classes(
        "bias dropped",
        (
            r"values = self\.W_value\(inputs\)",
            "values = self.W_value(inputs) - self.W_value(inputs * 0)",
        ),
    ),
    *_classes(
        "bias doubled",
        (
            r"values = self\.W_value\(inputs\)",
            "values = self.W_value(inputs) + self.W_value(inputs * 0)",
        ),
    ),
    *_per_framework(
        "bias left out",
        MODULES,
        torch=(r"(W_key = .*)bias=qkv_bias", r"\1bias=False"),
        linen=(r"(W_key = .*)use_bias=self\.qkv_bias", r"\1use_bias=False"),
        nnx=(r"(W_key = .*)use_bias=qkv_bias", r"\1use_bias=False"),
    ),
]

_PRECISION = [
    *_attention(
        "TF32 left on",
        (r"queries @ keys\.mT", "_tf32(queries) @ _tf32(keys).mT"),
        (
            r"def causal_mask",
            "def _tf32(array):\n    high = array * 8193.0\n"
            "    return high - (high - array)\n\n\ndef causal_mask",
        ),
    ),
    *_attention(
        "scores in half precision",
        (r"queries @ keys\.mT", "(queries.half() @ keys.half().mT).to(queries)"),
        only="torch",
    ),
    *_flax(
        "scores in half precision",
        "flax_impl.attention",
        (
            r"queries @ keys\.mT",
            "(queries.astype(jnp.float16) @ keys.astype(jnp.float16).mT).astype(queries.dtype)",
        ),
    ),
    *_attention(
        "softmax in float32",
        (r"softmax\((.*), dim=-1\)", r"softmax((\1).float(), dim=-1).to(scores)"),
        only="torch",
    ),
    *_flax(
        "softmax in float32",
        "flax_impl.attention",
        (
            r"weights = jax\.nn\.softmax\((.*), axis=-1\)",
            r"weights = jax.nn.softmax((\1).astype(jnp.float32), axis=-1).astype(scores.dtype)",
        ),
    ),
    *_attention(
        "not the same twice",
        (r"queries @ keys\.mT", "queries @ keys.mT * (1 + 1e-6 * __import__('random').random())"),
    ),
]

_DROPPING = [
    *_attention("dropout forgotten", (r"dropout\(weights\)", "weights")),
    *_attention(
        "dropout on the scores",
        (r"softmax\(scores", "softmax(dropout(scores)"),
        (r"dropout\(weights\)", "weights"),
    ),
    *_attention("dropout twice", (r"dropout\(weights\)", "dropout(dropout(weights))")),
    *_attention(
        "dropout scale missing",
        (r"dropout\(weights\)", "(weights * (dropout(weights) != 0))"),
        only="torch",
    ),
    *_flax(
        "dropout scale missing",
        "flax_impl.attention",
        (r"dropout\(weights\)", "(weights * (dropout(weights) != 0).astype(weights.dtype))"),
    ),
    *_per_framework(
        "dropout keeps what it should drop",
        MODULES,
        torch=(r"nn\.Dropout\(dropout\)", "nn.Dropout(1 - dropout)"),
        linen=(r"nn\.Dropout\(self\.dropout\)", "nn.Dropout(1 - self.dropout)"),
        nnx=(r"nnx\.Dropout\(dropout", "nnx.Dropout(1 - dropout"),
    ),
    *_per_framework(
        "one pattern for the batch",
        MODULES,
        torch=(r"nn\.Dropout\(dropout\)", "nn.Dropout2d(dropout)"),
        linen=(r"nn\.Dropout\(self\.dropout\)", "nn.Dropout(self.dropout, broadcast_dims=(0,))"),
        nnx=(r"nnx\.Dropout\(dropout", "nnx.Dropout(dropout, broadcast_dims=(0,)"),
    ),
    *_per_framework(
        "dropout in eval",
        ATTENTION,
        torch=(r"dropout\(weights\)", "torch.nn.functional.dropout(weights, 0.1)"),
    ),
]

_GRADIENTS = [
    *_attention(
        "no gradient through the weights",
        (r"dropout\(weights\)", "dropout(weights.detach())"),
        only="torch",
    ),
    *_flax(
        "no gradient through the weights",
        "flax_impl.attention",
        (r"dropout\(weights\)", "dropout(jax.lax.stop_gradient(weights))"),
    ),
    *_attention("no gradient through the keys", (r"keys\.mT", "keys.detach().mT"), only="torch"),
    *_flax(
        "no gradient through the keys",
        "flax_impl.attention",
        (r"keys\.mT", "jax.lax.stop_gradient(keys).mT"),
    ),
    *_attention(
        "only the gradient is wrong",
        (CONTEXT, f"values = 2.0 * values - values.detach()\n    {RETURNED}"),
        only="torch",
    ),
    *_flax(
        "only the gradient is wrong",
        "flax_impl.attention",
        (CONTEXT, f"values = 2.0 * values - jax.lax.stop_gradient(values)\n    {RETURNED}"),
    ),
]

_STATE = [
    *_per_framework(
        "buffer trained",
        MODULES,
        torch=((r'self\.register_buffer\("mask", (.*)\)', r"self.mask = nn.Parameter(\1)"),),
        linen=((LINEN_VARIABLE, 'self.param("mask", lambda _: causal_mask(self.context_length))'),),
        nnx=((r"self\.mask = Buffer\(", "self.mask = nnx.Param("),),
    ),
    *_per_framework(
        "buffer left out of the checkpoint",
        MODULES,
        torch=(
            (r'register_buffer\("mask", (.*)\)', r'register_buffer("mask", \1, persistent=False)'),
        ),
        linen=((LINEN_VARIABLE, "causal_mask(self.context_length)"),),
        nnx=((r"self\.mask = Buffer\((.*)\)", r"self.mask = \1"),),
    ),
    *_per_framework(
        "stale mask",
        MODULES,
        torch=(
            r"values, self\.mask, dropout",
            'values, self.__dict__.setdefault("stale", self.mask.clone()), dropout',
        ),
        linen=(
            r"values, mask, dropout",
            "values, causal_mask(self.context_length), dropout",
        ),
        nnx=(
            r"values, self\.mask\[\.\.\.\], dropout",
            "values, causal_mask(self.context_length), dropout",
        ),
    ),
    *_flax(
        "kernel transposed where not square",
        "compare.conversion.apply_mapping",
        (
            r"= layout\(row\.layout, row\.slice_shape\(flax_shape\)\)\n    if",
            r'= layout("same" if len(set(flax_shape)) == 1 else row.layout, flax_shape)\n    if',
        ),
    ),
    *_flax(
        "W_query and W_key exchanged",
        "compare.conversion.match",
        (
            r'(    prefix, _, leaf = name\.rpartition\("\."\)\n)',
            r'\1    prefix = {"W_query": "W_key", "W_key": "W_query"}.get(prefix, prefix)\n',
        ),
    ),
    *_flax(
        "mask rebuilt on the way",
        "compare.conversion.apply_mapping",
        (
            r"arrays\[path\] = (place_like\(.*\))",
            r"arrays[path] = \1\n            "
            r"arrays[path] = jax.numpy.triu(jax.numpy.ones_like(\1), 1) "
            r'if path[-1] == "mask" else \1',
        ),
    ),
    *_flax(
        "weights narrowed to bfloat16",
        "compare.conversion.apply_mapping",
        (
            r"arrays\[path\] = (place_like\(.*\))",
            r"arrays[path] = \1.astype(jax.numpy.bfloat16)"
            r".astype(jax.dtypes.canonicalize_dtype(\1.dtype))",
        ),
    ),
    *_flax(
        "int64 narrowed",
        "compare.conversion.tensors",
        (
            r"tensor = _fit_x64\(dense\(tensor, copy=copy\), copy=copy\)",
            "tensor = dense(tensor)\n"
            "    tensor = tensor.int() if tensor.dtype == torch.int64 else tensor",
        ),
    ),
    *[
        Mutant(
            "checkpoint in half precision",
            framework,
            "compare.checkpoint.tensors",
            (
                (
                    WRITTEN,
                    "return [arrays[path].astype('float16').astype(arrays[path].dtype)]",
                ),
            ),
        )
        for framework in FRAMEWORKS
    ],
    *[
        Mutant(
            "checkpoint stores a bool mask",
            framework,
            "compare.checkpoint.tensors",
            (
                (
                    WRITTEN,
                    "mask, array = str(path[-1]) == 'mask', arrays[path]; "
                    "return [(array != 0).astype(array.dtype) if mask else array]",
                ),
            ),
        )
        for framework in FRAMEWORKS
    ],
]

_OPTIMIZING = [
    *_training(
        "weight decay in the gradient",
        (r"torch\.optim\.AdamW\(", "torch.optim.Adam("),
        (
            r"optax\.adamw\(\s*(.*), weight_decay=recipe\.weight_decay\s*\)",
            r"optax.add_decayed_weights(recipe.weight_decay), optax.adam(\1)",
        ),
    ),
    *_training(
        "weight decay forgotten",
        (r"weight_decay=recipe\.weight_decay", "weight_decay=0.0"),
        (r"add_decayed_weights\(recipe\.weight_decay\)", "add_decayed_weights(0.0)"),
    ),
    *_training(
        "clipping forgotten",
        (r"torch\.nn\.utils\.clip_grad_norm_\(.*\)", "pass"),
        (r"jnp\.minimum\(1\.0, max_norm / \(norm \+ CLIP_EPS\)\)", "1.0"),
    ),
    *_training(
        "clipped by each value",
        (r"clip_grad_norm_\(module", "clip_grad_value_(module"),
        (r"update \* factor", "jnp.clip(update, -max_norm, max_norm)"),
    ),
    *_training(
        "optax.clip_by_global_norm",
        None,
        (r"clip_grad_norm\(recipe", "optax.clip_by_global_norm(recipe"),
    ),
    *_training(
        "Nesterov momentum",
        (r"momentum=recipe\.momentum", "momentum=recipe.momentum, nesterov=True"),
        (r"momentum=recipe\.momentum", "momentum=recipe.momentum, nesterov=True"),
    ),
    *_training(
        "epsilon under the root", None, (r"eps=recipe\.eps", "eps=0.0, eps_root=recipe.eps")
    ),
    *_training(
        "epsilon left at its default", (r"eps=recipe\.eps,\s+", ""), (r"eps=recipe\.eps, ", "")
    ),
    *_training(
        "betas left at their default",
        (r"betas=recipe\.betas,\s+", ""),
        (r"first, second, eps", "eps"),
    ),
    *_training("gradients pile up", (r"optimizer\.zero_grad\(\)", "pass"), None),
    *_training(
        "pattern of the step before",
        (r"course\.keeps\)\n", "np.roll(course.keeps, 1, axis=0))\n"),
        (r"course\.keeps, strict", "np.roll(course.keeps, 1, axis=0), strict"),
    ),
    *_training(
        "loss summed",
        (
            r"mse_loss\(module\(inputs\), targets",
            'mse_loss(module(inputs), targets, reduction="sum"',
        ),
        (r"jnp\.mean\(", "jnp.sum("),
    ),
    Mutant(
        "mask decayed",
        "torch",
        "compare.runners.train",
        ((r"optimizer\.step\(\)", "optimizer.step(); module.mask.mul_(1 - 1e-3)"),),
    ),
    Mutant(
        "mask decayed",
        "linen",
        "compare.runners.train",
        (
            (
                r"losses\.append\(float\(loss\)\)",
                "losses.append(float(loss)); "
                "buffers = jax.tree.map(lambda mask: mask * (1 - 1e-3), buffers)",
            ),
        ),
    ),
    Mutant(
        "mask decayed",
        "nnx",
        "compare.runners.train",
        (
            (
                r"pattern\[\.\.\.\] = jnp\.asarray\(keep\)",
                "pattern[...] = jnp.asarray(keep); model.mask[...] = model.mask[...] * (1 - 1e-3)",
            ),
        ),
    ),
]

_HEADS = [
    *_per_framework(
        "heads of the tokens",
        HEADS,
        torch=(
            r"\.unflatten\(2, \(-1, self\.head_dim\)\)\.transpose\(1, 2\)",
            ".reshape(len(projected), self.num_heads, projected.shape[1], -1)",
        ),
        linen=(
            r"\.reshape\((\*projected.*), num_heads, head_dim\)\.swapaxes\(1, 2\)",
            ".reshape(len(projected), num_heads, projected.shape[1], head_dim)",
        ),
        nnx=(
            r"\.reshape\((\*projected.*), num_heads, head_dim\)\.swapaxes\(1, 2\)",
            ".reshape(len(projected), num_heads, projected.shape[1], head_dim)",
        ),
    ),
    *_per_framework(
        "heads joined in another order",
        HEADS,
        torch=(r"context\.transpose\(1, 2\)", "context.flip(1).transpose(1, 2)"),
        linen=(r"context\.swapaxes\(1, 2\)", "context[:, ::-1].swapaxes(1, 2)"),
        nnx=(r"context\.swapaxes\(1, 2\)", "context[:, ::-1].swapaxes(1, 2)"),
    ),
    *_per_framework(
        "out_proj left out",
        HEADS,
        torch=(r"guarded_projection\(self\.out_proj, (context.*), closed\)", r"\1"),
        linen=(r"self\.out_proj\((context.*)\)", r"\1"),
        nnx=(r"self\.out_proj\((context.*)\)", r"\1"),
    ),
]

_FUSED = [
    Mutant(
        "fused: assumed causal",
        "torch",
        "torch_impl.mask_layout",
        ((r"if num_tokens <= self\.causal_until:\n", "if True:\n"),),
    ),
    Mutant(
        "fused: stale remembered mask",
        "torch",
        "torch_impl.mask_layout",
        ((r"return num_tokens <= examined\.size and torch\.equal\([^)]*\)[^)]*\)", "return True"),),
    ),
    Mutant(
        "fused: only the version is looked at",
        "torch",
        "torch_impl.mask_layout",
        ((r'return mask\.device\.type == "cpu"', "return False"),),
    ),
    Mutant(
        "fused: the last key left out",
        "torch",
        "torch_impl.mask_layout",
        ((r"int\(keys\[j\]\) \+ 1", "int(keys[j])"),),
    ),
    Mutant(
        "fused: a closed row is 0",
        "torch",
        "torch_impl.fused",
        ((r"_filled\(context, closed, torch\.nan\)", "_filled(context, closed, 0.0)"),),
    ),
    Mutant(
        "fused: a closed row of a wide strip is 0",
        "torch",
        "torch_impl.fused",
        ((r"_filled\(strip_out\[0\], closed, torch\.nan\)", "_filled(strip_out[0], closed, 0.0)"),),
    ),
    Mutant(
        "fused: wide strips without the mask",
        "torch",
        "torch_impl.fused",
        ((r"attn_mask=_bias\(blocked, queries\.dtype\),\s+", ""),),
    ),
    Mutant(
        "fused: wide strips end with their first range",
        "torch",
        "torch_impl.mask_layout",
        ((r"max\(stop for _, stop in ranges\)", "ranges[0][1]"),),
    ),
    Mutant(
        "fused: scale missing in the strips",
        "torch",
        "torch_impl.fused",
        ((r"alpha=scale", "alpha=1.0"),),
    ),
    Mutant(
        "fused: gradients of the strips overwritten",
        "torch",
        "torch_impl.fused",
        ((r"total\[\.\.\., start:stop, :\] \+= piece", "total[..., start:stop, :] = piece"),),
    ),
    *_flax(
        "fused: assumed causal",
        "flax_impl.mask_tiles",
        (
            r"is_nonzero\(slice_of\(mask, \(first_query, first_key\), shape\)\)",
            "(first_key + jnp.arange(shape.keys, dtype=jnp.int32)[None]"
            " > first_query + jnp.arange(shape.queries, dtype=jnp.int32)[:, None])",
        ),
    ),
    *_flax(
        "fused: mixed tiles taken for open ones",
        "flax_impl.mask_tiles",
        (r"return ~self\.blocked\.any\(\)", "return ~self.blocked.all()"),
    ),
    *_flax(
        "fused: tiles counted from the first key",
        "flax_impl.mask_tiles",
        (r"nominal = tile \* shape\.keys", "nominal = (tile - next_tiles[0]) * shape.keys"),
    ),
    *_flax(
        "fused: the last tile of keys counted twice",
        "flax_impl.mask_tiles",
        (r"blocked \|= \(first_key.*", "pass"),
    ),
    *_flax(
        "fused: the last strip's gradient counted twice",
        "flax_impl.mask_tiles",
        (r"blocked \|= ~is_new.*", "pass"),
    ),
    *_flax("fused: sums not shrunk", "flax_impl.fused", (r"acc \* rescale", "acc")),
    *_flax(
        "fused: a closed row is 0",
        "flax_impl.fused",
        (r"acc / l\)", "acc / jnp.where(l == 0, 1, l))"),
    ),
    *_flax(
        "fused: scale missing",
        "flax_impl.fused",
        (r"shape\.queries\) \* scale", "shape.queries)"),
    ),
    *_flax(
        "fused: subnormal entries taken for 0",
        "flax_impl.mask_tiles",
        (r"is_nonzero\((slice_of.*shape\))\)", r"(\1 != 0)"),
    ),
]

MUTANTS: tuple[Mutant, ...] = (
    *_SCALING,
    *_MASKING,
    *_MIXING,
    *_PRECISION,
    *_DROPPING,
    *_GRADIENTS,
    *_STATE,
    *_OPTIMIZING,
    *_HEADS,
    *_FUSED,
    *_SHAPES,
)

READERS: tuple[Mutant, ...] = tuple(_readers())
