"""AWQ's search for the scales of inputs, beside NumPy in float64 over tokens."""

from collections.abc import Callable

import gptq_paper as paper
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.compression import awq
from jaxllm.transforms.affine import Grid


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
    given = Grid(3, 16, symmetric)
    kernel, x = paper.correlated(64, 32)
    x *= np.exp(np.random.default_rng(1).normal(0, 1.5, 64)).astype(np.float32)
    scales = awq.candidates(jnp.asarray(np.abs(x).mean(0)))
    expected = []
    for s in np.asarray(scales):
        scaled = paper.round_groups(kernel * s[:, None], given).dense
        expected.append(paper.output_error(kernel - scaled / s[:, None].astype(np.float64), x))
    loss = awq.linear_loss(jnp.asarray(kernel), jnp.asarray(paper.second_moment(x)), given)
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
