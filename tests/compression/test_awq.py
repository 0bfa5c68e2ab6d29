"""AWQ's search for the scales of inputs, beside NumPy in float64 over tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.compression import awq
from jaxllm.transforms.affine import Grid


def nearest(kernel: np.ndarray, grid: Grid) -> np.ndarray:
    """Each weight to the nearest code of its group, float64 [I, O]."""
    parts = kernel.astype(np.float64).reshape(-1, grid.group, kernel.shape[1])
    low, high = (np.minimum(parts.min(1, keepdims=True), 0), np.maximum(parts.max(1, keepdims=True), 0))
    if grid.symmetric:
        high = np.maximum(high, -low)
        low = -high
    step = (high - low) / (2**grid.bits - 1)
    zero = 2 ** (grid.bits - 1) if grid.symmetric else np.rint(-low / step)
    # The largest weight lies in the middle of two codes, and goes to the outer one.
    codes = np.clip(np.rint(parts / step * (1 + 2.0**-20 * grid.symmetric)) + zero, 0, 2**grid.bits - 1)
    return ((codes - zero) * step).reshape(kernel.shape)


def test_candidates_are_powers_of_the_mean_input() -> None:
    """Times a number that makes 1 of the largest times the smallest; an input that is always 0 is taken for 1e-4."""
    mean = np.array([0.0, 1e-3, 0.5, 2.0, 300.0], np.float32)
    found = awq.candidates(jnp.asarray(mean))
    assert found.shape == (awq.STEPS, 5) and np.all(found[0] == 1)
    for step in (8, 19):
        s = np.maximum(mean.astype(np.float64) ** (step / 20), 1e-4)
        np.testing.assert_allclose(found[step], s / np.sqrt(s.max() * s.min()), rtol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_finds_the_least_error_of_the_outputs(symmetric: bool) -> None:
    rng, grid = np.random.default_rng(0), Grid(3, 16, symmetric)
    kernel = rng.normal(0, 0.05, (64, 32)).astype(np.float32)
    x = rng.normal(size=(400, 64)) * np.exp(rng.normal(0, 1.5, 64))
    scales = awq.candidates(jnp.asarray(np.abs(x).mean(0), jnp.float32))
    expected = []
    for s in np.asarray(scales, np.float64):
        expected.append(np.square(x @ (kernel - nearest(kernel * s[:, None], grid) / s[:, None])).sum())
    loss = awq.linear_loss(jnp.asarray(kernel), jnp.asarray(x.T @ x, jnp.float32), grid)
    # A weight that float32 puts on the other side of a middle changes a loss by less than this.
    np.testing.assert_allclose([loss(s) for s in scales], expected, rtol=2e-3)
    best = int(np.argmin(expected))
    assert best > 0 and expected[best] < 0.8 * expected[0]
    np.testing.assert_array_equal(awq.search(scales, loss), scales[best])


def test_scales_that_are_bad_for_one_kernel_are_left_out() -> None:
    """However good for the other; as are those of which a loss is NaN. The first row, which changes nothing, is always there."""
    scales = jnp.arange(5.0)[:, None]

    def of(*values: float) -> Callable[[jax.Array], jax.Array]:
        return lambda s_I: jnp.array(values)[s_I[0].astype(int)]

    first, second = of(4, 3, 5, 1, 4), of(4, 4, 0, np.nan, 4.5)
    np.testing.assert_array_equal(awq.harmless(scales, [first, second]), [[0], [1]])
    np.testing.assert_array_equal(awq.harmless(scales, [of(*[np.nan] * 5)]), [[0]])


def test_a_loss_that_is_nan_is_not_the_least() -> None:
    def loss(s_I: jax.Array) -> jax.Array:
        return jnp.where(s_I[0] == 1, jnp.nan, (s_I[0] - 2) ** 2)

    assert awq.search(jnp.arange(4.0)[:, None], loss) == 2
