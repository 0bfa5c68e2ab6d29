"""Rotary position embedding. Letters: B batch, T length, H heads, K head width, k = K/2."""

import jax
import jax.numpy as jnp


def rope(x_BTHK: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """x with each pair of features turned by position * frequency, same shape and dtype (Su et al. 2021, arXiv:2104.09864, eq. 34).

    The pairs are (i, i + K/2), the "half" layout of Hugging Face weights; the paper and Meta's own files pair
    (2i, 2i + 1), which is the same up to a permutation of the q and k columns. Angles are float32: 257 has no bfloat16.
    """
    half = x_BTHK.shape[-1] // 2
    if x_BTHK.shape[-1] != 2 * half:
        raise ValueError(
            f"rotary positions need an even head width, not {x_BTHK.shape[-1]}.\n  Accepted: any even model.head_dim."
            "\n  Change model.head_dim, or set model.positions = 'learned'."
        )
    frequencies_k = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BT1k = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies_k
    cos, sin = jnp.cos(angles_BT1k), jnp.sin(angles_BT1k)
    # (a, b) -> (a cos - b sin, b cos + a sin). Rolling by half swaps a and b; on a CPU it is four times faster than split and join.
    cos_BT1K, sin_BT1K = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    x_f32 = x_BTHK.astype(jnp.float32)
    return (x_f32 * cos_BT1K + jnp.roll(x_f32, half, axis=-1) * sin_BT1K).astype(x_BTHK.dtype)
