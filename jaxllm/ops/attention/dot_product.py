"""Attention by jax.nn.dot_product_attention: cuDNN's fused kernel on a GPU, XLA's own form elsewhere.

Causality and a window are arguments that cuDNN knows; documents, prefixes and a bias reach it as an array of [B, 1 or H, T, S],
which takes that memory. cuDNN computes in float16 or bfloat16 only. Dropout is not in the interface: `blocked` does it.
"""

from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp

from jaxllm.ops.attention.backend import Backend
from jaxllm.ops.attention.fallback import explain
from jaxllm.ops.attention.mask import Mask, check


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    *,
    bias_XHTS: jax.Array | None = None,
    scale: float | None = None,
    rng: jax.Array | None = None,
    dropout_frac: float = 0.0,
    block_tokens: int = 128,
) -> jax.Array:
    """As `plain`, [B, T, H, K], of what is not refused. For arguments and errors see `jaxllm.ops.attention.attend`."""
    del rng, dropout_frac, block_tokens
    check(q_BTHK, k_BSGK, v_BSGK, mask, bias_XHTS)
    query_tokens, key_tokens = q_BTHK.shape[1], k_BSGK.shape[1]
    # jax counts the slots of queries and keys from their first ones, and a prefix is an exception to both conditions.
    known = mask.causal and query_tokens == key_tokens and mask.prefix_BS is None
    rest = replace(mask, causal=False, window_tokens=0) if known else mask
    visible_BTS = rest.visible_whole(query_tokens, key_tokens)
    out_BTHK = jax.nn.dot_product_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        bias=bias_XHTS,
        mask=None if visible_BTS is None else visible_BTS[:, None],
        scale=scale,
        is_causal=known,
        local_window_size=(mask.window_tokens - 1, 0) if known and mask.window_tokens else None,
        implementation=_choose(q_BTHK, k_BSGK, bias_XHTS is not None or visible_BTS is not None),
    )
    if mask.may_be_blind:
        seen_BTS = mask.visible_whole(query_tokens, key_tokens)
        out_BTHK = out_BTHK if seen_BTS is None else jnp.where(seen_BTS.any(-1)[:, :, None, None], out_BTHK, 0)
    return out_BTHK.astype(q_BTHK.dtype)


def refuse(q_BTHK: jax.Array, k_BSGK: jax.Array, mask: Mask, bias_XHTS: jax.Array | None, rng: jax.Array | None) -> str | None:
    """`Backend.refuse`."""
    del q_BTHK, k_BSGK, mask, bias_XHTS
    return None if rng is None else "it has no dropout"


def _choose(q_BTHK: jax.Array, k_BSGK: jax.Array, biased: bool) -> Literal["cudnn", "xla"]:
    """What jax is to run. On a GPU that is no use to cuDNN the log says why; elsewhere there is no choice."""
    if jax.default_backend() != "gpu":
        return "xla"
    reason = None
    if q_BTHK.dtype not in (jnp.float16, jnp.bfloat16):
        reason = f"cuDNN takes float16 and bfloat16, not {q_BTHK.dtype}"
    elif q_BTHK.shape[-1] % 8 or q_BTHK.shape[-1] > 128:
        reason = f"cuDNN takes head widths up to 128 that are multiples of 8, not {q_BTHK.shape[-1]}"
    elif biased and (q_BTHK.shape[1] % 2 or k_BSGK.shape[1] % 2):
        reason = f"cuDNN takes even lengths with a mask or bias, not {q_BTHK.shape[1]} and {k_BSGK.shape[1]}"
    if reason is None:
        return "cudnn"
    explain("dot_product by cuDNN", "XLA", reason)
    return "xla"


BACKEND = Backend(attend, refuse)
