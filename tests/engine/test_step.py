"""The rules of the train step, on a linear regression whose every number NumPy knows."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import linear_regression as regression
import numpy as np
import pytest
from linear_regression import gradient, momentum, norm_of

from jaxllm.transforms import tree


@pytest.fixture(scope="module")
def plain():
    return regression.make(**{"optimizer.clip_norm": 0.0, "train.ema_decay": 0.15, "train.trainable": "kernel|bias"})


def snapshot(values):
    return [np.array(leaf) for leaf in jax.tree.leaves(values)]


def test_gradient_loss_and_metrics_equal_numpy(plain):
    step, create, place = plain
    state = create()
    expected, loss = gradient(jax.device_get(state.params), regression.batch())
    state, metrics = step(state, place(regression.batch()))
    for name, value in expected.items():
        np.testing.assert_allclose(momentum(state)[name], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm_of(expected), rtol=1e-6)
    assert metrics["weight"] == regression.batch()["weights"].sum()
    assert metrics["lr"] == np.float32(regression.LR)
    assert (state.step, metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 0, 0)
    assert metrics["finite"]
    assert metrics["moved"].tolist() == [True, True]
    assert "noise" not in metrics


def test_the_learning_rate_is_that_of_the_step(plain):
    """The first one's is the first of the schedule, and as Adam's first update is the sign of the gradient, that is how far it goes."""
    step, create, place = plain
    state, rates = create(), []
    before = jax.device_get(state.params)
    for _ in range(3):
        state, metrics = step(state, place(regression.batch()))
        rates.append(float(metrics["lr"]))
        if len(rates) == 1:
            moved = np.abs(np.asarray(state.params["kernel"]) - before["kernel"])
            np.testing.assert_allclose(moved, regression.LR, rtol=1e-4)
    assert rates == pytest.approx([regression.LR, 2 * regression.LR, 3 * regression.LR])


@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_change_nothing(plain, microbatches):
    """With 8 each example is a micro-batch of its own, one of weight 0."""
    step, create, place = regression.make(
        **{"train.microbatches": microbatches, "optimizer.clip_norm": 0.0, "train.trainable": "kernel|bias"}
    )
    one, one_metrics = plain[0](plain[1](), plain[2](regression.batch()))
    many, metrics = step(create(), place(regression.batch()))
    for name in ("loss", "grad_norm", "weight"):
        np.testing.assert_allclose(metrics[name], one_metrics[name], rtol=1e-6)
    for name, value in momentum(one).items():
        np.testing.assert_allclose(momentum(many)[name], value, rtol=1e-6)


def test_clipping_equals_numpy():
    clip = 0.05
    step, create, place = regression.make(**{"optimizer.clip_norm": clip})
    state = create()
    expected, _ = gradient(jax.device_get(state.params), regression.batch())
    norm = norm_of(expected)
    assert norm > clip
    state, metrics = step(state, place(regression.batch()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)  # before clipping
    for name, value in expected.items():
        np.testing.assert_allclose(momentum(state)[name], value * clip / norm, rtol=1e-5)


def test_a_gradient_within_the_clip_norm_is_left_alone():
    step, create, place = regression.make(**{"optimizer.clip_norm": 1e3})
    state = create()
    expected, _ = gradient(jax.device_get(state.params), regression.batch())
    state, _ = step(state, place(regression.batch()))
    np.testing.assert_allclose(momentum(state)["kernel"], expected["kernel"], rtol=1e-5)


def test_a_parameter_without_gradient_did_not_move():
    step, create, place = regression.make()
    state, metrics = step(create(), place(regression.batch()))
    moved = dict(zip(tree.names(state.params), metrics["moved"].tolist(), strict=True))
    assert moved == {"kernel": True, "bias": True, "dead": False}


def test_average_follows_its_closed_form(plain):
    """ema_n = sum_i (1 - d_i) (d_{i+1} ... d_n) p_i + d_1 ... d_n p_0, with d = 1/10, 2/11 and so on, but at most 0.15."""
    step, create, place = plain
    state, decays = create(), [0.1, 0.15, 0.15, 0.15]
    history = [np.float64(state.params["kernel"])]
    for seed in range(4):
        state, _ = step(state, place(regression.batch(seed)))
        history.append(np.float64(state.params["kernel"]))
    expected = math.prod(decays) * history[0]
    expected += sum((1 - decays[i - 1]) * math.prod(decays[i:]) * history[i] for i in range(1, 5))
    np.testing.assert_allclose(state.ema["kernel"], expected, rtol=1e-6)
    assert np.abs(expected - history[-1]).max() > 0.01


def test_frozen_parameters_stay_bit_equal(plain):
    step, create, place = plain
    state = create()
    before = snapshot(state.frozen)
    state, _ = step(state, place(regression.batch()))
    assert len(before) == 1
    np.testing.assert_array_equal(before, snapshot(state.frozen))


@pytest.mark.parametrize("name", ["x", "weights"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_is_skipped_and_counted(plain, name, value):
    step, create, place = plain
    state, _ = step(create(), place(regression.batch()))
    kept = ("params", "opt_state", "ema")
    before = [snapshot(getattr(state, each)) for each in kept]
    bad = regression.batch(1)
    bad[name][0] = value
    if name == "weights":
        bad["y"][0] = 1e25  # a finite weight whose loss overflows
    for count in (1, 2):
        state, metrics = step(state, place(bad))
        assert not metrics["finite"]
        assert (state.step, metrics["skipped"], metrics["skipped_in_a_row"]) == (1 + count, count, count)
    for each, old in zip(kept, before, strict=True):
        for a, b in zip(old, snapshot(getattr(state, each)), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=each)
    state, metrics = step(state, place(regression.batch(1)))
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (2, 0)
    assert metrics["finite"]
    assert (np.asarray(state.params["kernel"]) != before[0][1]).all()


def test_a_step_without_weight_changes_nothing_and_says_so(plain):
    step, create, place = plain
    state, _ = step(create(), place(regression.batch()))
    before = snapshot((state.params, state.opt_state, state.ema))
    empty = regression.batch() | {"weights": np.zeros((regression.EXAMPLES, 1), np.float32)}
    state, metrics = step(state, place(empty))
    assert (metrics["weight"], metrics["loss"], metrics["skipped"], state.step) == (0, 0, 0, 2)
    assert metrics["finite"]
    for a, b in zip(before, snapshot((state.params, state.opt_state, state.ema)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_numbers_are_a_function_of_seed_step_and_microbatch():
    seen = {}
    for seed, microbatches in ((0, 1), (1, 1), (0, 2)):
        step, create, place = regression.make(**{"model.dropout_frac": 0.1, "seed": seed, "train.microbatches": microbatches})
        state = create()
        for index in range(3):
            state, metrics = step(state, place(regression.batch()))
            seen[seed, microbatches, index] = float(metrics["noise"])
        again, metrics = step(replace(state, step=jax.device_put(jnp.int32(1), state.step.sharding)), place(regression.batch()))
        assert float(metrics["noise"]) == seen[seed, microbatches, 1]
    assert len(set(seen.values())) == len(seen)
