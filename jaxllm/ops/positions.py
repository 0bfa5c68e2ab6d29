"""Rotary position embedding."""

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
    frequencies_K = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BT1K = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies_K
    cos, sin = jnp.cos(angles_BT1K), jnp.sin(angles_BT1K)
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHK.dtype)
