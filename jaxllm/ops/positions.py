"""How positions enter a model. Letters: B batch, T length, H heads, K head width, k = K/2, D width.

rotary (`rope`, `RopeScaling`), sinusoids (`sinusoid`) and buckets of relative distance (`relative_buckets`).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RopeScaling(NamedTuple):
    """How rotary frequencies f are changed for a context `factor` times as long as `original_tokens`. `kind` is one of

    linear   f / factor (Chen et al. 2023, arXiv:2306.15595, eq. 4)
    dynamic  theta grows with the sequence at hand, once that is longer than the original context (NTK-aware, bloc97 2023)
    llama3   f / factor for waves longer than original / low_freq_factor, f for those shorter than original / high_freq_factor, a
             mean of both between (Grattafiori et al. 2024, arXiv:2407.21783, section 3.4.3, and the code of Llama 3.1)
    yarn     f for dimensions that turn more than beta_fast times over the original context, f / factor below beta_slow turns, a ramp
             between; cos and sin times attention_factor (Peng et al. 2023, arXiv:2309.00071, section 3); 0: 0.1 ln factor + 1
    """

    kind: str
    factor: float
    original_tokens: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0


def rope(x_BTHK: jax.Array, positions_BT: jax.Array, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
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
    frequencies_B11k, amplitude = _frequencies(2 * half, positions_BT, theta, scaling)
    angles_BT1k = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies_B11k
    cos, sin = amplitude * jnp.cos(angles_BT1k), amplitude * jnp.sin(angles_BT1k)
    # (a, b) -> (a cos - b sin, b cos + a sin). Rolling by half swaps a and b; on a CPU it is four times faster than split and join.
    cos_BT1K, sin_BT1K = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    x_f32 = x_BTHK.astype(jnp.float32)
    return (x_f32 * cos_BT1K + jnp.roll(x_f32, half, axis=-1) * sin_BT1K).astype(x_BTHK.dtype)


def _frequencies(width: int, positions_BT: jax.Array, theta: float, scaling: RopeScaling | None) -> tuple[jax.Array, float]:
    """(frequencies, which broadcast to [B, 1, 1, k]; what cos and sin are multiplied with)."""
    exponents_k = jnp.arange(width // 2, dtype=jnp.float32) / (width // 2)
    plain_k = theta**-exponents_k
    if scaling is None:
        return plain_k, 1.0
    if scaling.kind == "linear":
        return plain_k / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain_k, scaling), 1.0
    if scaling.kind == "yarn":
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
        return _yarn(plain_k, width, theta, scaling), factor
    # Dynamic: the length of each row counts, so that a row does not depend on its batch.
    tokens_B = jnp.maximum(positions_BT.max(axis=1) + 1, scaling.original_tokens).astype(jnp.float32)
    growth_B = scaling.factor * tokens_B / scaling.original_tokens - (scaling.factor - 1)
    theta_B = theta * growth_B ** (width / (width - 2))
    return theta_B[:, None, None, None] ** -exponents_k, 1.0


def _llama3(plain_k: jax.Array, scaling: RopeScaling) -> jax.Array:
    # How far a wave is on its way from scaled in full (0) to untouched (1).
    waves_k = scaling.original_tokens * plain_k / (2 * math.pi)
    share_k = (waves_k - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share_k = jnp.clip(share_k, 0, 1)
    return (1 - share_k) * plain_k / scaling.factor + share_k * plain_k


def _yarn(plain_k: jax.Array, width: int, theta: float, scaling: RopeScaling) -> jax.Array:
    def dimension(turns: float) -> float:
        """The pair of features that turns so often over the original context."""
        return width * math.log(scaling.original_tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(scaling.beta_fast)), 0), min(math.ceil(dimension(scaling.beta_slow)), width - 1)
    # Where both fall together the ramp is a step, written as one that does not divide by 0.
    ramp_k = jnp.clip((jnp.arange(width // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3), 0, 1)
    return ramp_k * plain_k / scaling.factor + (1 - ramp_k) * plain_k


def sinusoid(positions_BT: jax.Array, width: int) -> jax.Array:
    """[B, T, D] float32: sin(p / 10000^(2i/D)) at feature 2i and its cos at 2i + 1 (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""
    frequencies = 10000.0 ** (-2 * jnp.arange((width + 1) // 2, dtype=jnp.float32) / width)
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(*positions_BT.shape, -1)[..., :width]


def relative_buckets(relative: jax.Array, *, bidirectional: bool, buckets: int, max_tokens: int) -> jax.Array:
    """int32, same shape: the bucket of each distance key - query (Raffel et al. 2019, arXiv:1910.10683, section 2.1 and its code).

    Bidirectional: the second half of the buckets is for keys after the query; else these share bucket 0. Of the buckets of one
    direction the first half hold one distance each, the others grow logarithmically up to `max_tokens`, from where on all share the last.
    """
    if bidirectional:
        buckets //= 2
    # A table over all distances that differ: a logarithm on the device may round differently at the borders of buckets.
    distances = np.arange(max_tokens + 1)
    exact = buckets // 2
    grown = np.log(np.maximum(distances, 1).astype(np.float32) / exact) / math.log(max_tokens / exact) * (buckets - exact)
    table = np.where(distances < exact, distances, np.minimum(exact + grown.astype(np.int32), buckets - 1)).astype(np.int32)
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    bucket = jnp.asarray(table)[jnp.minimum(distance, max_tokens)]
    return bucket + jnp.where(relative > 0, buckets, 0) if bidirectional else bucket
