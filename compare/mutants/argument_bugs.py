"""Bugs in what the multi-head module may be given beside its inputs."""

from .mutant import CALL_MASKS, HEADS, Mutant, attention, dispatch, heads, per_framework

ARGUMENT_BUGS = [
    *per_framework(
        "the module's heads alternate between their keys",
        HEADS,
        torch=(r"heads\.repeat_interleave\(copies, dim=-3\)", "heads.repeat(1, copies, 1, 1)"),
        linen=(r"repeated\(heads, copies\)", "jnp.tile(heads, (copies, 1, 1))"),
        nnx=(r"repeated\(heads, copies\)", "jnp.tile(heads, (copies, 1, 1))"),
    ),
    *attention(
        "the scale multiplies the default",
        (r"scores \* float\(scale\)", "scores / head_dim**0.5 * float(scale)"),
    ),
    *dispatch("the scale is ignored", (r"float\(scale\) \* .*\*\* 0\.5", "1.0")),
    *per_framework(
        "out_proj always has a bias",
        HEADS,
        torch=(r"out_bias, \*\*placed", "True, **placed"),
        linen=(r"use_bias=self\.out_bias", "use_bias=True"),
        nnx=(r"use_bias=out_bias", "use_bias=True"),
    ),
    *heads("keys have a bias if queries have one", (r"bias\[1\]", "bias[0]")),
    *per_framework(
        "the call's mask replaces the stored one",
        CALL_MASKS,
        torch=(r"blocked \| attn_mask", "attn_mask"),
        linen=(r"blocked \| ~", "~"),
        nnx=(r"blocked \| ~", "~"),
    ),
    *per_framework(
        "the call's mask inverted",
        CALL_MASKS,
        torch=(r"blocked \| attn_mask", "blocked | ~attn_mask"),
        linen=(r"blocked \| ~", "blocked | "),
        nnx=(r"blocked \| ~", "blocked | "),
    ),
    Mutant(
        "padding blocks the queries",
        "torch",
        "torch_impl.call_masks",
        ((r"\[\.\.\., None, None, :\]", "[..., None, :, None]"),),
    ),
    Mutant(
        "padding replaces the call's mask",
        "torch",
        "torch_impl.call_masks",
        ((r"blocked \| padding", "blocked_pairs(mask, num_queries, num_keys) | padding"),),
    ),
    *per_framework(
        "values of the keys' source",
        HEADS,
        torch=(r"W_value\(value\)", "W_value(key)"),
        linen=(r"W_value\(inputs_v\)", "W_value(inputs_k)"),
        nnx=(r"W_value\(inputs_v\)", "W_value(inputs_k)"),
    ),
    *per_framework(
        "keys of the queries' source",
        HEADS,
        torch=(r"W_key\(key\)", "W_key(inputs)"),
        linen=(r"W_key\(inputs_k\)", "W_key(inputs)"),
        nnx=(r"W_key\(inputs_k\)", "W_key(inputs)"),
    ),
    *per_framework(
        "weights before the dropout",
        HEADS,
        torch=(
            r"kept\.append\(dropout\(weights\)\)\n        return kept\[-1\]",
            "kept.append(weights)\n        return dropout(weights)",
        ),
        linen=(r'"attention_weights", dropped', '"attention_weights", weights'),
        nnx=(r'"attention_weights", dropped', '"attention_weights", weights'),
    ),
    Mutant(
        "the weights of one head are taken for their mean",
        "torch",
        HEADS["torch"],
        ((r"kept\[0\]\.mean\(dim=-3\)", "kept[0][..., 0, :, :]"),),
    ),
    Mutant(
        "the mask stays off the device",
        "torch",
        HEADS["torch"],
        ((r"\.to\(device=device\)", ""),),
    ),
    Mutant(
        "the call's streams are ignored",
        "nnx",
        "flax_impl.nnx.dropout",
        ((r', "rngs": rngs\}', "}"),),
    ),
    Mutant(
        "the call's deterministic only switches dropout off",
        "nnx",
        "flax_impl.nnx.dropout",
        ((r'"deterministic": deterministic, ', ""),),
    ),
    Mutant(
        "the call's deterministic only switches dropout on",
        "nnx",
        "flax_impl.nnx.dropout",
        (
            (r"is_off = deterministic or .*", "is_off = is_plain and dropout.deterministic"),
            (r"deterministic, \"rngs\"", 'deterministic or None, "rngs"'),
        ),
    ),
    *heads(
        "dtype is that of the parameters", (r"dtype=(self\.)?dtype, ", ""), only=("linen", "nnx")
    ),
    *heads(
        "param_dtype is ignored", (r", param_dtype=(self\.)?param_dtype", ""), only=("linen", "nnx")
    ),
    *heads(
        "out_proj starts as the others",
        (r"(self\.)?out_kernel_init or ", ""),
        only=("linen", "nnx"),
    ),
]
