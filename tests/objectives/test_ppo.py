"""PPO's objective against sequences one by one in NumPy float64, value head and all; 1 x 8 rows as 8 x 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny

from jaxllm.data import experience
from jaxllm.objectives.policy_losses import token_weights

SETTINGS = {
    "train__objective": "ppo",
    "chat__template": "plain",
    "model__init_std": 0.02,
    "rl__temperature": 0.8,
    "rl__clip": 0.2,
    "rl__clip_high": 0.3,
    "rl__value_clip": 0.25,
    "rl__value_coef": 0.4,
    "rl__max_new_tokens": 6,
}
ANSWERS, MOST, ROWS, WIDTH = 12, 6, tiny.ROWS, tiny.LENGTH


def experience_of():
    """(prompts, answers, lengths, what stands beside them a token, the batch) of 12 answers, one of them left out."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, tiny.VOCAB, 1 + number % 3) for number in range(ANSWERS)]
    lengths = np.array([1, 6, 2, 6, 5, 1, 1, 3, 6, 4, 1, 2])
    tokens = rng.integers(0, tiny.VOCAB, (ANSWERS, MOST))
    counted = np.where(np.arange(ANSWERS) == 3, 0, lengths)
    share = token_weights("dapo", counted, MOST, counted.sum() * 0.8) * (counted > 0)
    values = {"weights": share[:, None] * np.ones((ANSWERS, MOST)), "old": -3.9 + 0.3 * rng.normal(size=(ANSWERS, MOST))}
    values |= {name: 0.5 * rng.normal(size=(ANSWERS, MOST)) for name in ("advantages", "old_values", "returns")}
    layout, arrays = experience.lay(prompts, tokens, lengths, (ROWS, WIDTH), 0)
    values = {name: each.astype(np.float32).astype(np.float64) for name, each in values.items()}
    return prompts, tokens, lengths, values, arrays | {name: layout.spread(each) for name, each in values.items()}


@pytest.fixture(scope="module")
def parts():
    training = tiny.make(**SETTINGS)
    # Larger kernels than at the start, so that probabilities differ, and values that are not 0.
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, training.model.init(jax.random.key(1)))
    rng = np.random.default_rng(4)
    params["value"] = {"kernel": jnp.array(0.1 * rng.normal(size=(1, 32)), jnp.float32), "bias": jnp.array([0.2], jnp.float32)}
    return training, params


def test_the_head_begins_at_0_and_leaves_the_model_what_it_is():
    with_values, without = tiny.make(**SETTINGS), tiny.make(**(SETTINGS | {"train__objective": "grpo"}))
    ours, theirs = with_values.model.init(jax.random.key(2)), without.model.init(jax.random.key(2))
    head = ours.pop("value")
    assert head["kernel"].shape == (1, 32) and head["bias"].shape == (1,)
    assert not head["kernel"].any() and not head["bias"].any()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    tokens, more = np.arange(8)[None], {"value": jax.tree.map(lambda x: x + 1, head)}
    np.testing.assert_array_equal(with_values.model.apply(ours | more, tokens), without.model.apply(theirs, tokens))


def test_loss_and_gradient_of_the_values_are_those_of_sequences_alone(parts):
    training, params = parts
    prompts, tokens, lengths, given, batch = experience_of()
    names = ("loss", "value_loss", "clipped_low", "clipped_high", "drift", "value_clipped", "value_error")
    sums, slope, kernel = dict.fromkeys(names, 0.0), np.zeros(33), np.asarray(params["value"]["kernel"], np.float64)[0]
    for row in range(ANSWERS):
        n, ids = lengths[row], np.concatenate([prompts[row], tokens[row, : lengths[row]]])
        weights, old, advantages, old_values, returns = (each[row, :n] for each in given.values())
        hidden = np.asarray(training.model.hidden(params, jnp.array(ids[None])), np.float64)[0, len(prompts[row]) - 1 : -1]
        logits = np.asarray(training.model.apply(params, jnp.array(ids[None])), np.float64)[0, len(prompts[row]) - 1 : -1] / 0.8
        log_p = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(n), ids[-n:]]
        ratio, values = np.exp(log_p - old), hidden @ kernel + np.float64(np.float32(0.2))
        near = old_values + np.clip(values - old_values, -0.25, 0.25)
        squares, near_squares, counts = (values - returns) ** 2, (near - returns) ** 2, weights > 0
        value_losses = np.maximum(squares, near_squares) / 2
        policy = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.3) * advantages)
        sums["loss"] += (weights * (policy + 0.4 * value_losses)).sum()
        sums["value_loss"] += (weights * value_losses).sum()
        sums["clipped_low"] += (counts & (ratio < 0.8) & (advantages < 0)).sum()
        sums["clipped_high"] += (counts & (ratio > 1.3) & (advantages > 0)).sum()
        sums["drift"] += (counts * (ratio**-1 + np.log(ratio) - 1)).sum()
        sums["value_clipped"] += (counts & (near_squares > squares)).sum()
        sums["value_error"] += (counts * squares).sum()
        # Where the value that is cut off counts, its slope is 0, or that of the value where nothing is cut off.
        pulls = 0.4 * weights * np.where(near_squares > squares, 0, values - returns)
        slope += pulls @ np.concatenate([hidden, np.ones((n, 1))], 1)

    def total(params):
        mean, metrics = training.objective(params, batch, None)
        return mean.total, (mean, metrics)

    gradient, (mean, metrics) = jax.jit(jax.grad(total, has_aux=True))(params)
    assert mean.weight == 1 and metrics.keys() == sums.keys()
    for name, expected in sums.items():
        np.testing.assert_allclose(metrics[name].total, expected, rtol=1e-5, atol=1e-6, err_msg=name)
        assert metrics[name].weight == (1 if name in ("loss", "value_loss") else lengths.sum() - 6)
    assert min(sums["clipped_low"], sums["clipped_high"], sums["value_clipped"]) > 2
    found = np.concatenate([gradient["value"]["kernel"][0], gradient["value"]["bias"]])
    np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-6)
    assert np.abs(slope).max() > 0.01


def test_values_move_the_layers_too(parts):
    """Without an advantage all of the gradient is that of the values."""
    training, params = parts
    batch = experience_of()[-1]
    batch["advantages"] = np.zeros_like(batch["advantages"])
    gradient = jax.grad(lambda params: training.objective(params, batch, None)[0].total)(params)
    assert np.abs(gradient["embed"]["tokens"]).max() > 1e-3


def test_one_by_eight_rows_equal_eight_by_one():
    """In 1 and in 8 micro-batches, on 8 devices, and with all that can be shared out shared out."""
    batch, found = experience_of()[-1], []
    for more in (
        {},
        {"train__microbatches": 8},
        {"parallel__data": 8},
        {"parallel__data": 2, "parallel__fsdp": 2, "parallel__tensor": 2},
    ):
        settings = SETTINGS | {"optimizer__clip_norm": 0.0} | more
        training, step = tiny.make(**settings), tiny.compiled(**settings)
        state, metrics = step(training.create(), training.place(batch))
        found.append((jax.device_get(metrics), jax.device_get(state.opt_state)))
    (one, moments), *others = found
    assert one["weight"] == 1 and one["value_loss"] > 1e-3 and one["grad_norm"] > 0.01
    for metrics, theirs in others:
        for name in ("loss", "value_loss", "value_error", "value_clipped", "drift", "clipped_low", "grad_norm", "weight"):
            np.testing.assert_allclose(metrics[name], one[name], rtol=2e-5, atol=1e-7, err_msg=name)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-7), theirs, moments)
