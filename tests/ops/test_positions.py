"""Rotary positions against complex multiplication, and the property they exist for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.positions import rope

THETA = 10_000.0


def make_x(width=8, tokens=5, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, tokens, 3, width)), jnp.float32)


def test_pairs_are_multiplied_by_a_complex_phase():
    x, positions = np.asarray(make_x(), np.float64), np.array([[0, 1, 2, 3, 4], [0, 1, 0, 700, 8191]])
    # Su et al. 2021, eq. 14 and 15: (x_i + j x_i') e^(j m theta_i), theta_i = theta^(-2 i / K), pairs (i, i + K/2).
    phase = np.exp(1j * positions[:, :, None, None] * THETA ** (-2 * np.arange(4) / 8))
    turned = (x[..., :4] + 1j * x[..., 4:]) * phase
    # An angle of 8191 has an error of 2^-11 = 5e-4 in float32.
    atol = np.array([1e-6, 1e-6, 1e-6, 1e-4, 2e-3])[None, :, None, None]
    assert np.all(np.abs(rope(make_x(), positions, THETA) - np.concatenate([turned.real, turned.imag], -1)) < atol)


def test_products_depend_on_the_distance_only():
    q, k = make_x(seed=1), make_x(seed=2)
    positions = jnp.array([[0, 1, 2, 3, 4], [3, 9, 1, 0, 7]])

    @jax.jit
    def products(shift_q, shift_k):
        return jnp.einsum("bthk,bshk->bhts", rope(q, positions + shift_q, THETA), rope(k, positions + shift_k, THETA))

    np.testing.assert_allclose(products(40, 40), products(0, 0), atol=3e-5)
    assert np.abs(products(40, 41) - products(0, 0)).max() > 0.1


def test_angles_are_float32_under_bfloat16():
    x = make_x().astype(jnp.bfloat16)
    positions = jnp.full((2, 5), 257)  # bfloat16 would make it 256
    out = rope(x, positions, THETA)
    assert out.dtype == jnp.bfloat16
    exact = rope(x.astype(jnp.float32), positions, THETA)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match="even head width, not 7.\n  Accepted"):
        rope(make_x(width=7), jnp.zeros((2, 5), jnp.int32), THETA)
