"""Norms against float64 NumPy, where float32 and bfloat16 are known to hurt."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops import norms

EPS = 1e-5


def make_arrays(offset=0.0, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 4, 16)) * 2 + offset, dtype)
    return x, jnp.asarray(rng.normal(size=16), jnp.float32), jnp.asarray(rng.normal(size=16), jnp.float32)


def rms(x, scale):
    """With the product of what is rounded to x.dtype, as LLaMA's own code has it."""
    x_f64 = np.asarray(x, np.float64)
    normed, scale = (np.asarray(y, x.dtype) for y in (x_f64 / np.sqrt((x_f64**2).mean(-1, keepdims=True) + EPS), scale))
    return np.asarray(normed, np.float64) * np.asarray(scale, np.float64)


def standard(x, scale, bias):
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS) * np.asarray(scale) + np.asarray(bias)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_equal_their_equations(dtype):
    """In bfloat16 the very numbers: everything before the roundings is computed in float32."""
    x, scale, bias = make_arrays(dtype=dtype)
    tolerance = 1e-6 if dtype == jnp.float32 else 0
    for actual, expected in (
        (norms.rmsnorm(x, scale, EPS), rms(x, scale)),
        (norms.layernorm(x, scale, bias, EPS), standard(x, scale, bias)),
        (norms.layernorm(x, scale, None, EPS), standard(x, scale, 0)),
    ):
        assert actual.dtype == dtype
        rounded = np.asarray(np.asarray(expected, dtype), np.float64)
        np.testing.assert_allclose(np.asarray(actual, np.float64), rounded, rtol=tolerance, atol=tolerance)


def test_eps_is_inside_the_root_and_counts_for_small_inputs():
    x = jnp.full((1, 16), 1e-3)
    np.testing.assert_allclose(norms.rmsnorm(x, jnp.ones(16), EPS), 1e-3 / np.sqrt(1e-6 + EPS), rtol=1e-6)
    both = x * jnp.tile(jnp.array([1, -1]), 8)
    np.testing.assert_allclose(norms.layernorm(both, jnp.ones(16), None, EPS), both / np.sqrt(1e-6 + EPS), rtol=1e-6)
    np.testing.assert_array_equal(norms.layernorm(x * 0, jnp.ones(16), None, EPS), 0)


def test_statistics_survive_a_large_mean_and_large_halves():
    x, scale, bias = make_arrays(offset=3000.0)
    np.testing.assert_allclose(norms.layernorm(x, scale, bias, EPS), standard(x, scale, bias), atol=1e-3)
    half = jnp.full((1, 16), 300, jnp.float16)  # its square is not a float16
    np.testing.assert_allclose(norms.rmsnorm(half, jnp.ones(16), EPS), 1, rtol=1e-3)
