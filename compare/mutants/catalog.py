"""The catalog of planted bugs. A change is a regular expression and its replacement."""

import re
import tomllib
from importlib.resources import files

from ..proof.cases import FRAMEWORKS
from .mutant import (
    ATTENTION,
    HEADS,
    MODULES,
    Mutant,
    attention,
    classes,
    flax,
    per_framework,
    training,
)

LINEN_VARIABLE = r'self\.variable\("buffers", "mask", causal_mask, self\.context_length\)'
SCALE = r"head_dim\*\*0\.5"
BLOCKED = r"blocked = (.*)  #"
FILLED = r"scores = (?:scores\.masked_fill|jnp\.where).*\n"
OPEN_MASK = "mask[:num_tokens, :num_tokens]"
CONTEXT = r"return dropout\(weights\) @ values"
RETURNED = "return dropout(weights) @ values"
WRITTEN = r"return \[arrays\[path\]\]"


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


_SCALING = [
    *attention("no scale", (f"scores / {SCALE}", "scores")),
    *attention("scale by head_dim", (SCALE, "head_dim")),
    *attention("scale by sqrt(tokens)", (SCALE, "num_tokens**0.5")),
    *attention("scale multiplies", ("scores / head_dim", "scores * head_dim")),
    *attention("scale 1 % off", (SCALE, "(1.01 * head_dim**0.5)")),
    *attention("scale 1e-9 off", (SCALE, "((1 + 1e-9) * head_dim**0.5)")),
    *classes(
        "scale by sqrt(input_embedding_dim)",
        (
            r"queries = self\.W_query\(inputs\)",
            "queries = self.W_query(inputs)\n"
            "        queries = queries * (queries.shape[-1] / inputs.shape[-1]) ** 0.5",
        ),
    ),
    *attention(
        "softmax before the scale",
        (rf"scores = scores / {SCALE}", "scores = scores * 1"),
        (r"softmax\(scores, (dim|axis)=-1\)", r"softmax(scores, \1=-1) / head_dim**0.5"),
    ),
]

_MASKING = [
    *attention("mask ignored", (BLOCKED, r"blocked = (\1) & False  #")),
    *attention("mask inverted", (BLOCKED, r"blocked = ~(\1)  #")),
    *attention("mask transposed", (r"mask\[:num", "mask.mT[:num")),
    *attention(
        "mask from the other corner", (r":num_tokens, :num_tokens", "-num_tokens:, -num_tokens:")
    ),
    *attention("only entries of 1 block", (BLOCKED, f"blocked = {OPEN_MASK} == 1  #")),
    *attention("only positive entries block", (BLOCKED, f"blocked = {OPEN_MASK} > 0  #")),
    *attention("assumed causal", (BLOCKED, "blocked = causal_mask(num_tokens)[None] > 0  #")),
    *attention("the diagonal is blocked", (r"(diagonal|k)=1\)", r"\1=0)")),
    *attention("blocked by -1e4", (r"-(torch|jnp)\.inf", "-1e4")),
    *attention("blocked by -1e9", (r"-(torch|jnp)\.inf", "-1e9")),
    *attention(
        "mask added times -1e9",
        (FILLED, f"scores = scores + ({OPEN_MASK} * -1e9).to(scores)\n"),
        only="torch",
    ),
    *flax(
        "mask added times -1e9",
        "flax_impl.attention",
        (FILLED, f"scores = scores + ({OPEN_MASK} * -1e9).astype(scores.dtype)\n"),
    ),
    *attention(
        "mask after the softmax",
        (rf"{FILLED}    (weights = .*)  #", rf"\1 * (1.0 - {OPEN_MASK}).to(scores)  #"),
        only="torch",
    ),
    *flax(
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
    *flax(
        "a closed row is 0",
        "flax_impl.attention",
        (r"return dropout\(weights\)", "return dropout(jnp.nan_to_num(weights))"),
    ),
]

_SHAPES = [
    *attention(
        "fewer queries are the first tokens",
        (r"blocked\[num_tokens - num_queries :\]", "blocked[:num_queries]"),
    ),
    *attention(
        "heads alternate between their keys",
        (r"repeat_interleave\(groups, dim=-3\)", "repeat(1, groups, 1, 1)"),
        only="torch",
    ),
    *flax(
        "heads alternate between their keys",
        "flax_impl.attention",
        (r"repeated\(keys, groups\)", "jnp.tile(keys, (groups, 1, 1))"),
    ),
]

_MIXING = [
    *attention("softmax over the queries", (r"(dim|axis)=-1", r"\1=-2")),
    *attention("softmax over the batch", (r"(dim|axis)=-1", r"\1=0")),
    *attention(
        "softmax twice",
        (
            r"(torch|jax\.nn)\.softmax\((.*), (dim|axis)=-1\)",
            r"\1.softmax(\1.softmax(\2, \3=-1), \3=-1)",
        ),
    ),
    *attention("queries and keys swapped", (r"queries @ keys\.mT", "keys @ queries.mT")),
    *attention(
        "keys and values swapped",
        (r"queries @ keys\.mT", "queries @ values.mT"),
        ("@ values  #", "@ keys  #"),
    ),
    *attention("values for keys", (r"queries @ keys\.mT", "queries @ values.mT")),
    *attention("keys for values", ("@ values  #", "@ keys  #")),
    *attention(
        "a later token leaks",
        (CONTEXT, r"return dropout(weights) @ (values + 1e-9 * values.mean(0)[None])"),
    ),
    *classes("keys from W_query", (r"keys = self\.W_key\(inputs\)", "keys = self.W_query(inputs)")),
    *classes(
        "values from W_key", (r"values = self\.W_value\(inputs\)", "values = self.W_key(inputs)")
    ),
    *classes(
        "bias dropped",
        (
            r"values = self\.W_value\(inputs\)",
            "values = self.W_value(inputs) - self.W_value(inputs * 0)",
        ),
    ),
    *classes(
        "bias doubled",
        (
            r"values = self\.W_value\(inputs\)",
            "values = self.W_value(inputs) + self.W_value(inputs * 0)",
        ),
    ),
    *per_framework(
        "bias left out",
        MODULES,
        torch=(r"(W_key = .*)bias=qkv_bias", r"\1bias=False"),
        linen=(r"(W_key = .*)use_bias=self\.qkv_bias", r"\1use_bias=False"),
        nnx=(r"(W_key = .*)use_bias=qkv_bias", r"\1use_bias=False"),
    ),
]

_PRECISION = [
    *attention(
        "TF32 left on",
        (r"queries @ keys\.mT", "_tf32(queries) @ _tf32(keys).mT"),
        (
            r"def causal_mask",
            "def _tf32(array):\n    high = array * 8193.0\n"
            "    return high - (high - array)\n\n\ndef causal_mask",
        ),
    ),
    *attention(
        "scores in half precision",
        (r"queries @ keys\.mT", "(queries.half() @ keys.half().mT).to(queries)"),
        only="torch",
    ),
    *flax(
        "scores in half precision",
        "flax_impl.attention",
        (
            r"queries @ keys\.mT",
            "(queries.astype(jnp.float16) @ keys.astype(jnp.float16).mT).astype(queries.dtype)",
        ),
    ),
    *attention(
        "softmax in float32",
        (r"softmax\((.*), dim=-1\)", r"softmax((\1).float(), dim=-1).to(scores)"),
        only="torch",
    ),
    *flax(
        "softmax in float32",
        "flax_impl.attention",
        (
            r"weights = jax\.nn\.softmax\((.*), axis=-1\)",
            r"weights = jax.nn.softmax((\1).astype(jnp.float32), axis=-1).astype(scores.dtype)",
        ),
    ),
    *attention(
        "not the same twice",
        (r"queries @ keys\.mT", "queries @ keys.mT * (1 + 1e-6 * __import__('random').random())"),
    ),
]

_DROPPING = [
    *attention("dropout forgotten", (r"dropout\(weights\)", "weights")),
    *attention(
        "dropout on the scores",
        (r"softmax\(scores", "softmax(dropout(scores)"),
        (r"dropout\(weights\)", "weights"),
    ),
    *attention("dropout twice", (r"dropout\(weights\)", "dropout(dropout(weights))")),
    *attention(
        "dropout scale missing",
        (r"dropout\(weights\)", "(weights * (dropout(weights) != 0))"),
        only="torch",
    ),
    *flax(
        "dropout scale missing",
        "flax_impl.attention",
        (r"dropout\(weights\)", "(weights * (dropout(weights) != 0).astype(weights.dtype))"),
    ),
    *per_framework(
        "dropout keeps what it should drop",
        MODULES,
        torch=(r"nn\.Dropout\(dropout\)", "nn.Dropout(1 - dropout)"),
        linen=(r"nn\.Dropout\(self\.dropout\)", "nn.Dropout(1 - self.dropout)"),
        nnx=(r"nnx\.Dropout\(dropout", "nnx.Dropout(1 - dropout"),
    ),
    *per_framework(
        "one pattern for the batch",
        MODULES,
        torch=(r"nn\.Dropout\(dropout\)", "nn.Dropout2d(dropout)"),
        linen=(r"nn\.Dropout\(self\.dropout\)", "nn.Dropout(self.dropout, broadcast_dims=(0,))"),
        nnx=(r"nnx\.Dropout\(dropout", "nnx.Dropout(dropout, broadcast_dims=(0,)"),
    ),
    *per_framework(
        "dropout in eval",
        ATTENTION,
        torch=(r"dropout\(weights\)", "torch.nn.functional.dropout(weights, 0.1)"),
    ),
]

_GRADIENTS = [
    *attention(
        "no gradient through the weights",
        (r"dropout\(weights\)", "dropout(weights.detach())"),
        only="torch",
    ),
    *flax(
        "no gradient through the weights",
        "flax_impl.attention",
        (r"dropout\(weights\)", "dropout(jax.lax.stop_gradient(weights))"),
    ),
    *attention("no gradient through the keys", (r"keys\.mT", "keys.detach().mT"), only="torch"),
    *flax(
        "no gradient through the keys",
        "flax_impl.attention",
        (r"keys\.mT", "jax.lax.stop_gradient(keys).mT"),
    ),
    *attention(
        "only the gradient is wrong",
        (CONTEXT, f"values = 2.0 * values - values.detach()\n    {RETURNED}"),
        only="torch",
    ),
    *flax(
        "only the gradient is wrong",
        "flax_impl.attention",
        (CONTEXT, f"values = 2.0 * values - jax.lax.stop_gradient(values)\n    {RETURNED}"),
    ),
]

_STATE = [
    *per_framework(
        "buffer trained",
        MODULES,
        torch=((r'self\.register_buffer\("mask", (.*)\)', r"self.mask = nn.Parameter(\1)"),),
        linen=((LINEN_VARIABLE, 'self.param("mask", lambda _: causal_mask(self.context_length))'),),
        nnx=((r"self\.mask = Buffer\(", "self.mask = nnx.Param("),),
    ),
    *per_framework(
        "buffer left out of the checkpoint",
        MODULES,
        torch=(
            (r'register_buffer\("mask", (.*)\)', r'register_buffer("mask", \1, persistent=False)'),
        ),
        linen=((LINEN_VARIABLE, "causal_mask(self.context_length)"),),
        nnx=((r"self\.mask = Buffer\((.*)\)", r"self.mask = \1"),),
    ),
    *per_framework(
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
    *flax(
        "kernel transposed where not square",
        "compare.conversion.apply_mapping",
        (
            r"= layout\(row\.layout, row\.slice_shape\(flax_shape\)\)\n    if",
            r'= layout("same" if len(set(flax_shape)) == 1 else row.layout, flax_shape)\n    if',
        ),
    ),
    *flax(
        "W_query and W_key exchanged",
        "compare.conversion.match",
        (
            r'(    prefix, _, leaf = name\.rpartition\("\."\)\n)',
            r'\1    prefix = {"W_query": "W_key", "W_key": "W_query"}.get(prefix, prefix)\n',
        ),
    ),
    *flax(
        "mask rebuilt on the way",
        "compare.conversion.apply_mapping",
        (
            r"arrays\[path\] = (place_like\(.*\))",
            r"arrays[path] = \1\n            "
            r"arrays[path] = jax.numpy.triu(jax.numpy.ones_like(\1), 1) "
            r'if path[-1] == "mask" else \1',
        ),
    ),
    *flax(
        "weights narrowed to bfloat16",
        "compare.conversion.apply_mapping",
        (
            r"arrays\[path\] = (place_like\(.*\))",
            r"arrays[path] = \1.astype(jax.numpy.bfloat16)"
            r".astype(jax.dtypes.canonicalize_dtype(\1.dtype))",
        ),
    ),
    *flax(
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
    *training(
        "weight decay in the gradient",
        (r"torch\.optim\.AdamW\(", "torch.optim.Adam("),
        (
            r"optax\.adamw\(\s*(.*), weight_decay=recipe\.weight_decay\s*\)",
            r"optax.add_decayed_weights(recipe.weight_decay), optax.adam(\1)",
        ),
    ),
    *training(
        "weight decay forgotten",
        (r"weight_decay=recipe\.weight_decay", "weight_decay=0.0"),
        (r"add_decayed_weights\(recipe\.weight_decay\)", "add_decayed_weights(0.0)"),
    ),
    *training(
        "clipping forgotten",
        (r"torch\.nn\.utils\.clip_grad_norm_\(.*\)", "pass"),
        (r"jnp\.minimum\(1\.0, max_norm / \(norm \+ CLIP_EPS\)\)", "1.0"),
    ),
    *training(
        "clipped by each value",
        (r"clip_grad_norm_\(module", "clip_grad_value_(module"),
        (r"update \* factor", "jnp.clip(update, -max_norm, max_norm)"),
    ),
    *training(
        "optax.clip_by_global_norm",
        None,
        (r"clip_grad_norm\(recipe", "optax.clip_by_global_norm(recipe"),
    ),
    *training(
        "Nesterov momentum",
        (r"momentum=recipe\.momentum", "momentum=recipe.momentum, nesterov=True"),
        (r"momentum=recipe\.momentum", "momentum=recipe.momentum, nesterov=True"),
    ),
    *training("epsilon under the root", None, (r"eps=recipe\.eps", "eps=0.0, eps_root=recipe.eps")),
    *training(
        "epsilon left at its default", (r"eps=recipe\.eps,\s+", ""), (r"eps=recipe\.eps, ", "")
    ),
    *training(
        "betas left at their default",
        (r"betas=recipe\.betas,\s+", ""),
        (r"first, second, eps", "eps"),
    ),
    *training("gradients pile up", (r"optimizer\.zero_grad\(\)", "pass"), None),
    *training(
        "pattern of the step before",
        (r"course\.keeps\)\n", "np.roll(course.keeps, 1, axis=0))\n"),
        (r"course\.keeps, strict", "np.roll(course.keeps, 1, axis=0), strict"),
    ),
    *training(
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
    *per_framework(
        "heads of the tokens",
        HEADS,
        torch=(
            r"\.unflatten\(-1, \(-1, self\.head_dim\)\)\.transpose\(-3, -2\)",
            ".reshape(len(projected), -1, projected.shape[1], self.head_dim)",
        ),
        linen=(
            r"\.reshape\((\*projected.*), num_heads, head_dim\)\.swapaxes\(-3, -2\)",
            ".reshape(len(projected), num_heads, projected.shape[1], head_dim)",
        ),
        nnx=(
            r"\.reshape\((\*projected.*), num_heads, head_dim\)\.swapaxes\(-3, -2\)",
            ".reshape(len(projected), num_heads, projected.shape[1], head_dim)",
        ),
    ),
    *per_framework(
        "heads joined in another order",
        HEADS,
        torch=(r"context\.transpose\(-3, -2\)", "context.flip(-3).transpose(-3, -2)"),
        linen=(r"context\.swapaxes\(-3, -2\)", "context[..., ::-1, :, :].swapaxes(-3, -2)"),
        nnx=(r"context\.swapaxes\(-3, -2\)", "context[..., ::-1, :, :].swapaxes(-3, -2)"),
    ),
    *per_framework(
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
    *flax(
        "fused: assumed causal",
        "flax_impl.mask_tiles",
        (
            r"is_nonzero\(slice_of\(mask, \(first_query, first_key\), shape\)\)",
            "(first_key + jnp.arange(shape.keys, dtype=jnp.int32)[None]"
            " > first_query + jnp.arange(shape.queries, dtype=jnp.int32)[:, None])",
        ),
    ),
    *flax(
        "fused: mixed tiles taken for open ones",
        "flax_impl.mask_tiles",
        (r"return ~self\.blocked\.any\(\)", "return ~self.blocked.all()"),
    ),
    *flax(
        "fused: tiles counted from the first key",
        "flax_impl.mask_tiles",
        (r"nominal = tile \* shape\.keys", "nominal = (tile - next_tiles[0]) * shape.keys"),
    ),
    *flax(
        "fused: the last tile of keys counted twice",
        "flax_impl.mask_tiles",
        (r"blocked \|= \(first_key.*", "pass"),
    ),
    *flax(
        "fused: the last strip's gradient counted twice",
        "flax_impl.mask_tiles",
        (r"blocked \|= ~is_new.*", "pass"),
    ),
    *flax("fused: sums not shrunk", "flax_impl.fused", (r"acc \* rescale", "acc")),
    *flax(
        "fused: a closed row is 0",
        "flax_impl.fused",
        (r"acc / l\)", "acc / jnp.where(l == 0, 1, l))"),
    ),
    *flax(
        "fused: scale missing",
        "flax_impl.fused",
        (r"shape\.queries\) \* scale", "shape.queries)"),
    ),
    *flax(
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
