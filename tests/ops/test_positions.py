"""Rotary positions against complex multiplication, and the property they exist for; sinusoids and buckets against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.positions import RopeScaling, relative_buckets, rope, sinusoid

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


# --- Scaled frequencies. The first feature of a pair, where the pair is (1, 0), is cos(position * frequency). -----------


def frequencies(scaling, width=64, tokens=1):
    """The frequencies that `rope` turned by, from the angle at position 1 (all below pi). [width / 2], float64."""
    x = jnp.zeros((1, 1, 1, width)).at[..., : width // 2].set(1)
    # Dynamic scaling looks at the largest position, here that of a second token.
    x, positions = jnp.concatenate([x, x], axis=1), jnp.array([[1, max(tokens - 1, 1)]])
    turned = np.asarray(rope(x, positions, THETA, scaling), np.float64)[0, 0, 0]
    return np.arctan2(turned[width // 2 :], turned[: width // 2]), np.hypot(turned[width // 2 :], turned[: width // 2])


PLAIN = THETA ** (-np.arange(32) / 32)


def llama3(f, factor=8.0, low=1.0, high=4.0, old=8192):
    """parity.md's three cases, by the wavelength, one frequency at a time."""
    wave = 2 * math.pi / f
    if wave > old / low:
        return f / factor
    if wave < old / high:
        return f
    t = (old / wave - low) / (high - low)
    return (1 - t) * f / factor + t * f


def yarn(i, factor=4.0, fast=32, slow=1, old=2048, width=64):
    """Peng et al. 2023, eq. 17 to 23, with the ramp over the index of the pair as in the authors' code."""
    low = max(math.floor(width * math.log(old / (fast * 2 * math.pi)) / (2 * math.log(THETA))), 0)
    high = min(math.ceil(width * math.log(old / (slow * 2 * math.pi)) / (2 * math.log(THETA))), width - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return PLAIN[i] / factor * ramp + PLAIN[i] * (1 - ramp)


@pytest.mark.parametrize(
    ("scaling", "tokens", "expected", "amplitude"),
    [
        (None, 1, PLAIN, 1),
        (RopeScaling("linear", 4.0, 2048), 1, PLAIN / 4, 1),
        (RopeScaling("dynamic", 4.0, 2048), 2048, PLAIN, 1),
        # theta (4 x 2 - 3)^(64/62)
        (RopeScaling("dynamic", 4.0, 2048), 4096, (THETA * 5 ** (64 / 62)) ** (-np.arange(32) / 32), 1),
        (RopeScaling("llama3", 8.0, 8192), 1, [llama3(f) for f in PLAIN], 1),
        (RopeScaling("yarn", 4.0, 2048), 1, [yarn(i) for i in range(32)], 0.1 * math.log(4) + 1),
        (RopeScaling("yarn", 4.0, 2048, attention_factor=1.5), 1, [yarn(i) for i in range(32)], 1.5),
        # Over so long a context every pair turns more than once: the ramp ends behind the last one.
        (RopeScaling("yarn", 4.0, 10**6), 1, [yarn(i, old=10**6) for i in range(32)], 0.1 * math.log(4) + 1),
    ],
    ids=lambda value: value.kind if isinstance(value, RopeScaling) else None,
)
def test_scaled_frequencies(scaling, tokens, expected, amplitude):
    found, length = frequencies(scaling, tokens=tokens)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    np.testing.assert_allclose(length, amplitude, rtol=1e-6)


def test_dynamic_scaling_looks_at_each_row_alone():
    x, scaling = make_x(), RopeScaling("dynamic", 2.0, 4)
    positions = jnp.array([[0, 1, 2, 3, 3], [0, 1, 2, 3, 9]])
    both = rope(x, positions, THETA, scaling)
    for row in range(2):
        np.testing.assert_array_equal(both[row], rope(x[row : row + 1], positions[row : row + 1], THETA, scaling)[0])
    np.testing.assert_allclose(both[0], rope(x[:1], positions[:1], THETA)[0], atol=1e-6)


def test_sinusoids_are_those_of_the_paper():
    positions = np.array([[0, 1, 2, 99], [3, 0, 1000, 7]])
    found = np.asarray(sinusoid(jnp.asarray(positions), 10))
    for row, tokens in enumerate(positions):
        for place, position in enumerate(tokens):
            for i in range(5):  # Vaswani et al. 2017, section 3.5
                angle = position / 10000 ** (2 * i / 10)
                np.testing.assert_allclose(found[row, place, 2 * i : 2 * i + 2], [math.sin(angle), math.cos(angle)], atol=2e-4)


def bucket(relative, bidirectional, buckets, most):
    """parity.md's rule, one distance at a time, with exact powers instead of logarithms: bucket b starts where
    n >= exact (most / exact)^((b - exact) / (buckets - exact))."""
    if bidirectional:
        buckets //= 2
        first, n = (buckets if relative > 0 else 0), abs(relative)
    else:
        first, n = 0, max(-relative, 0)
    exact = buckets // 2
    if n < exact:
        return first + n
    starts = [exact * (most / exact) ** ((b - exact) / (buckets - exact)) for b in range(exact, buckets)]
    return first + exact + sum(n >= start - 1e-9 for start in starts) - 1


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20), (4, 3)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_of_relative_positions(bidirectional, buckets, most):
    relative = np.arange(-300, 301)
    found = relative_buckets(jnp.asarray(relative), bidirectional=bidirectional, buckets=buckets, max_tokens=most)
    expected = [bucket(int(each), bidirectional, buckets, most) for each in relative]
    np.testing.assert_array_equal(found, expected)
    assert set(expected) <= set(range(buckets))
