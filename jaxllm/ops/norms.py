"""Normalization over the last axis, with statistics in float32 whatever the input is."""

import jax
import jax.numpy as jnp


def rmsnorm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale in x.dtype (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4). x [..., D], scale [D].

    The product with `scale` is taken after the cast back to x.dtype, as in the published LLaMA weights' own code.
    """
    x_f32 = x.astype(jnp.float32)
    normed = x_f32 * jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def layernorm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias in x.dtype (Ba et al. 2016, arXiv:1607.06450, eq. 3). x [..., D]."""
    x_f32 = x.astype(jnp.float32)
    # Two passes: mean(x^2) - mean(x)^2 cancels when the mean is large.
    centered = x_f32 - jnp.mean(x_f32, axis=-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    scaled = normed * scale.astype(jnp.float32)
    return (scaled if bias is None else scaled + bias.astype(jnp.float32)).astype(x.dtype)
