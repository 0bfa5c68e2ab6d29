"""Float16 under the train step: the dynamic loss scale, on the linear regression."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import linear_regression as regression
import numpy as np
import pytest
from linear_regression import gradient, momentum, norm_of

from jaxllm.engine import state as states
from jaxllm.types import Mean


def half_squared_error(params, batch, rng):
    """squared_error whose every array, and so every cotangent, is float16."""
    low = jax.tree.map(lambda x: x.astype(jnp.float16), (params, batch["x"], batch["y"]))
    (params, x, y) = low
    error = x @ params["kernel"][:, None] + params["bias"] - y
    weight = jnp.sum(batch["weights"])
    mean = Mean(jnp.sum(batch["weights"] * (error**2).astype(jnp.float32)), weight)
    return mean, {"loss": mean}


@pytest.fixture(scope="module")
def half():
    return regression.make(
        objective=half_squared_error,
        **{
            "precision.compute": "float16",
            "precision.loss_scale": 2.0**20,
            "precision.loss_scale_growth_steps": 3,
            "train.trainable": "kernel|bias",
            "optimizer.clip_norm": 0.0,
        },
    )


def run_half(half, state, batches):
    step, _, place = half
    rows = []
    for batch in batches:
        state, metrics = step(state, place(batch))
        rows.append({name: value.item() for name, value in metrics.items() if name != "moved"})
    return state, rows


def with_scale(state, scale):
    return replace(state, loss_scale=jax.device_put(states.LossScale(jnp.float32(scale), jnp.int32(0)), state.step.sharding))


def test_loss_scale_halves_until_it_fits_then_doubles(half):
    state, rows = run_half(half, half[1](), [regression.batch()] * 16)
    scales = [row["loss_scale"] for row in rows]
    skipped = rows[-1]["skipped"]
    first = [row["finite"] for row in rows].index(True)
    assert first > 2  # 2^20 overflows float16 (65504) several times
    assert scales[:first] == [2.0 ** (19 - index) for index in range(first)]
    assert scales[first : first + 3] == [scales[first - 1]] * 2 + [2 * scales[first - 1]]
    assert all(row["skipped_in_a_row"] == 0 for row in rows)
    assert skipped == sum(not row["finite"] for row in rows)
    assert skipped >= first
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_scaled_gradient_equals_numpy_within_float16(half):
    state = with_scale(half[1](), 1024.0)
    expected, loss = gradient(jax.device_get(state.params), regression.batch())
    state, (row,) = run_half(half, state, [regression.batch()])
    # 2^-11 relative a rounding, a dozen of them along the way.
    np.testing.assert_allclose(row["loss"], loss, rtol=5e-3)
    np.testing.assert_allclose(row["grad_norm"], norm_of(expected), rtol=5e-3)
    np.testing.assert_allclose(momentum(state)["kernel"], expected["kernel"], rtol=0, atol=5e-3 * norm_of(expected))


def test_small_gradients_survive_only_by_the_scale(half):
    """Residuals of 1e-7 times 1/8 are below the smallest float16, 6e-8, unless scaled."""
    state = half[1]()
    batch = regression.batch()
    params = jax.device_get(state.params)
    batch |= {"x": np.zeros_like(batch["x"]), "weights": np.full_like(batch["weights"], 1e-9)}
    batch["y"][:] = params["bias"].astype(np.float16).astype(np.float32) + 0.5
    norms = {}
    for scale in (1.0, 2.0**12):
        _, (row,) = run_half(half, with_scale(half[1](), scale), [batch])
        norms[scale] = row["grad_norm"]
    assert norms[1.0] == 0
    np.testing.assert_allclose(norms[2.0**12], 8e-9, rtol=5e-2)


def test_below_one_the_data_is_to_blame(half):
    bad = regression.batch()
    bad["x"][0] = np.nan
    state, rows = run_half(half, with_scale(half[1](), 4.0), [bad] * 5)
    assert state.loss_scale.finite_steps == 0
    assert [row["loss_scale"] for row in rows] == [2, 1, 1, 1, 1]
    assert [row["skipped_in_a_row"] for row in rows] == [0, 0, 1, 2, 3]
    assert [row["skipped"] for row in rows] == [1, 2, 3, 4, 5]
