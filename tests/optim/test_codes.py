"""8-bit and bfloat16 numbers against tables made in NumPy float64, and what stochastic rounding is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.optim import codes


def table(decades):
    """Dettmers et al. 2021, section 2.2: 0, then in each decade 1, 2, 4, ... parts of [0.1, 1] times its power of ten; their middles."""
    values = [0.0]
    for decade in range(decades):
        parts = 2**decade
        values += [10.0 ** (decade - decades + 1) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
    return np.array(values)


SIGNED, POSITIVE = table(7), table(8)


def numbers(shape, seed=0):
    """Over five decades, some zeros, and a block of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 1, shape)
    x[rng.random(shape) < 0.05] = 0
    x[0, :16] = 0
    return x.astype(np.float32)


def coded(x, positive, seed=0, block=16):
    return jax.jit(codes.to_codes, static_argnums=(2, 3))(x, codes.noise(x.shape, seed), block, positive)


@pytest.mark.parametrize("positive", [False, True])
def test_codes_are_neighbours_in_the_table_of_the_paper(positive):
    x = numbers((6, 64))
    x = x**2 if positive else x
    found, scales = coded(x, positive)
    values = POSITIVE if positive else SIGNED
    assert (found.shape, found.dtype, scales.shape, scales.dtype) == (x.shape, "uint8" if positive else "int8", (6, 4), "float32")
    largest = np.abs(x.astype(np.float64)).reshape(6, 4, 16).max(-1)
    np.testing.assert_allclose(scales, largest / values[-1], rtol=1e-6)
    wide = np.repeat(np.asarray(scales, np.float64), 16, -1)
    code = np.asarray(found, np.int64)
    assert np.all(np.sign(code) == np.sign(x) * (code != 0))
    share = np.divide(np.abs(x), wide, out=np.zeros_like(wide), where=wide > 0)
    low = np.clip(np.searchsorted(values, share * (1 + 1e-5), side="right") - 1, 0, len(values) - 2)
    assert np.all((np.abs(code) == low) | (np.abs(code) == low + 1) | (positive & (x > 0) & (code == 1)))
    np.testing.assert_allclose(codes.from_codes(found, scales), np.sign(x) * values[np.abs(code)] * wide, rtol=1e-6)


@pytest.mark.parametrize(("positive", "steps"), [(False, 64), (True, 128)])
def test_errors_stay_below_a_step_of_the_highest_decade(positive, steps):
    """0.9 / 64 of a block's largest number, and 0.9 / 128 without a sign; the largest one itself is kept, as are zeros."""
    x = numbers((50, 256))
    x = x**2 if positive else x
    back = np.asarray(codes.from_codes(*coded(x, positive, block=256)))
    largest = np.abs(x).max(-1, keepdims=True)
    assert np.all(np.abs(back - x) <= 0.9 / steps / 0.99 * largest)
    np.testing.assert_allclose(np.abs(back).max(-1, keepdims=True), largest, rtol=1e-6)
    assert np.all(back[x == 0] == 0)
    assert not positive or np.all(back[x > 0] > 0)


@pytest.mark.parametrize("positive", [False, True])
def test_numbers_that_have_codes_are_kept_whatever_the_noise(positive):
    x = numbers((6, 64))
    first, scales = coded(x**2 if positive else x, positive)
    again, same = coded(np.asarray(codes.from_codes(first, scales)), positive, seed=1)
    np.testing.assert_array_equal(again, first)
    np.testing.assert_allclose(same, scales, rtol=1e-6)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "uint8"])
def test_the_mean_is_right(kind):
    """Over 2000 seeds: within 5 times the most that a mean of two neighbours spreads; numbers below the first code of uint8 aside."""
    x = numbers((2, 64))
    x = x**2 if kind == "uint8" else x

    def one(seed):
        noise = codes.noise(x.shape, seed)
        if kind == "bfloat16":
            return codes.to_bfloat16(x, noise).astype(jnp.float32)
        return codes.from_codes(*codes.to_codes(x, noise, 16, kind == "uint8"))

    drawn = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(2000)), np.float64)
    if kind == "bfloat16":
        steps, counted = 2.0**-7 * np.abs(x), np.ones(x.shape, bool)
    else:
        values = POSITIVE if kind == "uint8" else SIGNED
        wide = np.repeat(np.abs(x).reshape(2, 4, 16).max(-1) / values[-1], 16, -1) + 1e-30
        low = np.clip(np.searchsorted(values, np.abs(x) / wide) - 1, 0, len(values) - 2)
        steps, counted = (values[low + 1] - values[low]) * wide, (x == 0) | (np.abs(x) / wide > values[1])
    error = np.abs(drawn.mean(0) - x)
    assert np.all((error <= 5 * steps / 2 / 2000**0.5 + 1e-6 * np.abs(x))[counted | (kind == "int8")])
    assert np.mean(drawn.std(0) > 0) > 0.5


def test_bfloat16_takes_one_of_two_neighbours():
    x = np.float32([1.0, -1.0, 0.0, 1 + 2**-9, -3.3e-5, 1e-40, np.inf, np.float32(3.4e38)])
    found = codes.to_bfloat16(jnp.asarray(x), codes.noise(x.shape, 5))
    assert found.dtype == jnp.bfloat16
    down = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    up = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    got = np.asarray(found, np.float32)
    assert np.all((got == down) | (got == up))
    exact = x == down
    np.testing.assert_array_equal(got[exact], x[exact])


def test_noise_is_flat_and_differs_by_place_and_seed():
    noise = np.asarray(codes.noise((64, 64, 16), 3, 0, 1))
    counts = np.bincount(noise.ravel() >> 24, minlength=256)
    expected = noise.size / 256
    assert np.sum((counts - expected) ** 2 / expected) < 255 + 5 * (2 * 255) ** 0.5  # chi squared, mean + 5 deviations
    for other in (codes.noise((64, 64, 16), 3, 1, 1), codes.noise((64, 64, 16), 3, 0, 2)):
        assert abs(np.corrcoef(noise.ravel(), np.asarray(other).ravel())[0, 1]) < 5 / noise.size**0.5
    for axis in range(3):
        first, second = (np.take(noise, range(start, noise.shape[axis] - 1 + start), axis).ravel() for start in (0, 1))
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / first.size**0.5


@pytest.mark.parametrize("kind", ["bfloat16", "uint8"])
def test_nearest_rounding_freezes_a_second_moment_and_ours_does_not(kind):
    """v <- 0.999 v + 0.001 g^2 after the gradient has become 0.3 of what it was: v should fall to 0.09 + 0.91 x 0.999^3000."""
    values = np.linspace(0.2, 1, 256, dtype=np.float32)[None]
    values[0, -1] = 4  # the largest number of the block stays
    target = values * np.where(np.arange(256) == 255, 1, 0.09).astype(np.float32)
    grid, middles = (jnp.asarray(x, jnp.float32) for x in (POSITIVE, (POSITIVE[1:] + POSITIVE[:-1]) / 2))

    def to_nearest(v, step):
        del step
        if kind == "bfloat16":
            return v.astype(jnp.bfloat16).astype(jnp.float32)
        scale = v.max() / grid[-1]
        return grid[jnp.searchsorted(middles, v / scale)] * scale

    def ours(v, step):
        noise = codes.noise(v.shape, step)
        if kind == "bfloat16":
            return codes.to_bfloat16(v, noise).astype(jnp.float32)
        return codes.from_codes(*codes.to_codes(v, noise, 256, True))

    def fallen(rounding):
        run = jax.jit(lambda v: jax.lax.fori_loop(0, 3000, lambda step, v: rounding(0.999 * v + 0.001 * target, step), v))
        return np.asarray(run(values) / values)[0, :-1]

    assert np.median(fallen(to_nearest)) > 0.9
    assert np.mean(fallen(ours)) == pytest.approx(0.09 + 0.91 * 0.999**3000, rel=0.05)
