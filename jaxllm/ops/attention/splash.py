"""Attention by the Pallas kernel "splash" on a TPU: blockwise as `flash`, and blocks that nothing sees are not computed.

The kernel knows causality, a window and documents, and has no bias, prefix, branches or dropout. Lengths and head widths are padded to
what it takes. The compiler cannot share it out: on a mesh each device runs it on its own rows and heads.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from jaxllm.ops.attention import blocked
from jaxllm.ops.attention.backend import Backend
from jaxllm.ops.attention.mask import Mask, check

LANES = 128  # lengths are multiples of this
NOWHERE = jnp.iinfo(jnp.int32).min  # segment of padded keys


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
    interpret: bool = False,
) -> jax.Array:
    """As `plain`, [B, T, H, K], of what is not refused. `interpret` runs it on any device, slowly."""
    del bias_XHTS, rng, dropout_frac, block_tokens
    group, query_tokens, width = check(q_BTHK, k_BSGK, v_BSGK, mask, None), q_BTHK.shape[1], q_BTHK.shape[-1]
    key_tokens, lane = k_BSGK.shape[1], LANES // 2 if width <= LANES // 2 else LANES
    # The kernel does not scale, and padded widths would mislead it if it did.
    scale = width**-0.5 if scale is None else scale
    q_BTHK = (q_BTHK.astype(jnp.float32) * scale).astype(q_BTHK.dtype)
    q, k, v = (_pad(_pad(x.swapaxes(1, 2), 2, LANES), 3, lane) for x in (q_BTHK, k_BSGK, v_BSGK))
    q = q.reshape(q.shape[0], -1, group, *q.shape[2:])
    segments = _segments(mask, q.shape[0], query_tokens, key_tokens)
    kernel = splash_attention.make_splash_mqa_single_device(
        splash_attention.MultiHeadMask([_lazy_mask(mask, q.shape[3], k.shape[2], key_tokens - query_tokens)] * group),
        block_sizes=_block_sizes(q.shape[3], k.shape[2]),
        interpret=interpret,
        residual_checkpoint_name="attended",
    )
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out = jax.vmap(over_heads)(q, k, v, segments)[:, :, :, :query_tokens, :width]
    out_BTHK = blocked.unfold(out, q_BTHK.dtype)
    seen_BTS = mask.visible_whole(query_tokens, key_tokens) if mask.may_be_blind else None
    return out_BTHK if seen_BTS is None else jnp.where(seen_BTS.any(-1)[:, :, None, None], out_BTHK, 0)


def refuse(q_BTHK: jax.Array, k_BSGK: jax.Array, mask: Mask, bias_XHTS: jax.Array | None, rng: jax.Array | None) -> str | None:
    """`Backend.refuse`."""
    query_tokens, key_tokens = q_BTHK.shape[1], k_BSGK.shape[1]
    if jax.default_backend() != "tpu":
        return f"it needs a TPU and this is a {jax.default_backend()}"
    if rng is not None:
        return "it has no dropout"
    if bias_XHTS is not None:
        return "it has no bias"
    if mask.prefix_BS is not None:
        return "it has no prefix"
    if mask.branches_BT is not None:
        return "it has no branches"
    if mask.window_tokens and query_tokens != key_tokens:
        return f"it has no window over {query_tokens} queries and {key_tokens} keys"
    return None


def _pad(x: jax.Array, axis: int, multiple: int, value: int = 0) -> jax.Array:
    widths = [(0, -size % multiple if i == axis else 0) for i, size in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


def _segments(mask: Mask, batch: int, query_tokens: int, key_tokens: int) -> splash_attention.SegmentIds | None:
    """Segments of queries and keys, padded; None if there is nothing that they would hide."""
    if mask.segments_BT is None and (mask.causal or key_tokens % LANES == 0):
        return None  # no causal query sees the padded keys, which are behind it
    segments_BT, keys_BS = mask.segments_BT, mask.key_segments_BS
    segments_BT = jnp.zeros((batch, query_tokens), jnp.int32) if segments_BT is None else jnp.asarray(segments_BT, jnp.int32)
    if keys_BS is None:
        keys_BS = jnp.zeros((batch, key_tokens), jnp.int32) if mask.segments_BT is None else segments_BT
    keys_BS = _pad(jnp.asarray(keys_BS, jnp.int32), 1, LANES, NOWHERE)
    return splash_attention.SegmentIds(_pad(segments_BT, 1, LANES), keys_BS)


def _lazy_mask(mask: Mask, rows: int, columns: int, offset: int) -> splash_attention.Mask:
    """The static part of the mask in the kernel's terms; padded rows and columns follow its rule."""
    shape = rows, columns
    if mask.window_tokens:
        return splash_attention.LocalMask(shape, (mask.window_tokens - 1, 0 if mask.causal else None), offset)
    return splash_attention.CausalMask(shape, offset) if mask.causal else splash_attention.FullMask(shape)


def _block_sizes(rows: int, columns: int) -> splash_attention.BlockSizes:
    """The largest of a few blocks that divide the lengths."""
    row, column = (max(size for size in (128, 256, 512) if tokens % size == 0) for tokens in (rows, columns))
    return splash_attention.BlockSizes(
        block_q=row,
        block_kv=column,
        block_q_dkv=row,
        block_kv_dkv=column,
        block_q_dq=row,
        block_kv_dq=column,
    )


BACKEND = Backend(attend, refuse, per_device=True)
