"""The objective of packed answers against sequences one by one in NumPy float64; 1 x 8 rows as 8 x 1; a bandit with a known optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny

from jaxllm.data import experience
from jaxllm.engine import answers as blocks
from jaxllm.objectives import policy, policy_losses
from jaxllm.objectives.policy_losses import group_advantages, token_weights

SETTINGS = {
    "train__objective": "grpo",
    "chat__template": "plain",
    "model__init_std": 0.02,
    "rl__temperature": 0.8,
    "rl__kl": 0.1,
    "rl__clip": 0.2,
    "rl__clip_high": 0.3,
    "rl__max_new_tokens": 6,
}
ANSWERS, GROUP, MOST, ROWS, WIDTH = 12, 4, 6, tiny.ROWS, tiny.LENGTH


def experience_of(form: str, seed: int = 0):
    """(prompts, answers, what stands beside them a token, the batch) of 12 answers of very different lengths, one of them left out."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, tiny.VOCAB, 1 + number // GROUP) for number in range(ANSWERS)]
    lengths = np.array([1, 6, 2, 6, 5, 1, 1, 3, 6, 4, 1, 2])
    tokens = rng.integers(0, tiny.VOCAB, (ANSWERS, MOST))
    counted = np.where(np.arange(ANSWERS) == 3, 0, lengths)
    share = token_weights(form, counted, MOST, counted.sum() * 0.8) * (counted > 0)
    values = {
        "weights": share[:, None] * np.ones((ANSWERS, MOST)),
        "old": -3.9 + 0.3 * rng.normal(size=(ANSWERS, MOST)),
        "reference": -3.9 + 0.3 * rng.normal(size=(ANSWERS, MOST)),
        "advantages": group_advantages(rng.normal(size=(ANSWERS // GROUP, GROUP)), "group").reshape(-1, 1) * np.ones(MOST),
    }
    layout, arrays = experience.lay(prompts, tokens, lengths, (ROWS, WIDTH), 0)
    return prompts, tokens, lengths, values, arrays | {name: layout.spread(each) for name, each in values.items()}


@pytest.fixture(scope="module")
def parts():
    training = tiny.make(**SETTINGS)
    # Larger kernels than at the start, so that probabilities differ.
    return training, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, training.model.init(jax.random.key(1)))


def log_p_alone(training, params, prompt, answer):
    """float64, of one sequence without padding or neighbours."""
    ids = np.concatenate([prompt, answer])
    logits = np.asarray(training.model.apply(params, jnp.array(ids[None])), np.float64)[0, len(prompt) - 1 : -1] / 0.8
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(answer)), answer]


@pytest.mark.parametrize("form", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_the_loss_is_that_of_sequences_alone(parts, form):
    training, params = parts
    prompts, tokens, lengths, values, batch = experience_of(form)
    sums = dict.fromkeys(("loss", "clipped_low", "clipped_high", "drift", "kl"), 0.0)
    for row in range(ANSWERS):
        n = lengths[row]
        weights, old, reference, advantages = (values[name][row, :n] for name in ("weights", "old", "reference", "advantages"))
        log_p = log_p_alone(training, params, prompts[row], tokens[row, :n])
        ratio = np.exp(log_p - old)
        kl = np.exp(reference - log_p) - (reference - log_p) - 1
        sums["loss"] += (weights * (0.1 * kl - np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.3) * advantages))).sum()
        counts = weights > 0
        sums["clipped_low"] += (counts & (ratio < 0.8) & (advantages < 0)).sum()
        sums["clipped_high"] += (counts & (ratio > 1.3) & (advantages > 0)).sum()
        sums["drift"] += (counts * (np.exp(old - log_p) - (old - log_p) - 1)).sum()
        sums["kl"] += (counts * kl).sum()
    mean, metrics = jax.jit(training.objective)(params, batch, None)
    assert mean.weight == 1
    assert metrics.keys() == sums.keys()
    for name, expected in sums.items():
        np.testing.assert_allclose(metrics[name].total, expected, rtol=1e-5, atol=1e-6, err_msg=name)
        assert metrics[name].weight == (1 if name == "loss" else lengths.sum() - 6)
    assert sums["clipped_low"] > 2 and sums["clipped_high"] > 2


def test_log_probabilities_of_a_padded_row_equal_those_of_the_row_alone(parts):
    """Also by the trainer's own pass, in which `old` and `reference` are made, and whatever stands in the padding and beside it."""
    training, params = parts
    prompts, tokens, lengths, values, batch = experience_of("grpo")
    layout, _ = experience.lay(prompts, tokens, lengths, (ROWS, WIDTH), 0)
    hidden = training.model.hidden(params, batch["tokens"], segments=batch["segments"], positions=batch["positions"])
    found = layout.gather(np.asarray(policy.log_probs(hidden, training.model.head(params), batch["targets"], 0.8, 16)), tokens)
    for row in range(ANSWERS):
        expected = log_p_alone(training, params, prompts[row], tokens[row, : lengths[row]])
        np.testing.assert_allclose(found[row, : lengths[row]], expected, rtol=0, atol=2e-6)
    score = blocks.make_score(training)
    scored, values = score(params, {name: batch[name] for name in ("tokens", "targets", "segments", "positions")})
    np.testing.assert_allclose(layout.gather(scored, tokens), found, rtol=0, atol=2e-6)
    assert not values.any()
    changed = dict(batch)
    changed["tokens"] = np.where(batch["segments"] == 0, 5, np.where(batch["segments"] == 2, 7, batch["tokens"])).astype(np.int32)
    other, _ = score(params, {name: changed[name] for name in ("tokens", "targets", "segments", "positions")})
    first = batch["segments"] == 1
    np.testing.assert_array_equal(other[first], scored[first])


@pytest.mark.parametrize("form", ["grpo", "dapo"])
def test_one_by_eight_rows_equal_eight_by_one(form):
    """The gradient of the whole batch, in 1 and in 8 micro-batches, and on 8 devices: the weights are shares of the whole."""
    batch = experience_of(form)[-1]
    found = []
    for more in ({}, {"train__microbatches": 8}, {"parallel__data": 8}):
        settings = SETTINGS | {"optimizer__clip_norm": 0.0} | more
        training, step = tiny.make(**settings), tiny.compiled(**settings)
        state, metrics = step(training.create(), training.place(batch))
        found.append((jax.device_get(metrics), jax.device_get(state.opt_state)))
    (one, moments), *others = found
    assert one["weight"] == 1 and abs(one["loss"]) > 1e-3 and one["grad_norm"] > 0.01
    for metrics, theirs in others:
        for name in ("loss", "kl", "drift", "clipped_low", "clipped_high", "grad_norm", "weight"):
            np.testing.assert_allclose(metrics[name], one[name], rtol=2e-5, atol=1e-7, err_msg=name)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-7), theirs, moments)


REWARDS = np.array([0.0, 1.0, 0.4, -1.0])
REFERENCE = np.array([0.4, 0.1, 0.2, 0.3])


def trained_bandit(beta: float, epochs: int = 2) -> np.ndarray:
    """The policy over four arms after many exact steps: every arm counts by how likely it was, as if infinitely many had been drawn."""

    def loss(theta, old, advantages):
        log_p = jax.nn.log_softmax(theta)
        terms = policy_losses.clipped(log_p, old, advantages, 0.2, 0.2).loss + beta * policy_losses.kl(log_p, jnp.log(REFERENCE))
        return jnp.sum(jnp.exp(old) * terms)

    @jax.jit
    def block(theta):
        old = jax.lax.stop_gradient(jax.nn.log_softmax(theta))
        advantages = REWARDS - jnp.sum(jnp.exp(old) * REWARDS)
        for _ in range(epochs):
            theta -= 0.5 * jax.grad(loss)(theta, old, advantages)
        return theta

    theta = jnp.log(REFERENCE)
    for _ in range(3000):
        theta = block(theta)
    return np.asarray(jax.nn.softmax(theta))


def test_the_first_gradient_is_that_of_the_expected_reward():
    """d E[r] / d theta_k = p_k (r_k - E[r]), at the policy that drew."""
    theta = jnp.array([0.3, -0.2, 0.1, 0.5])
    p = np.asarray(jax.nn.softmax(theta), np.float64)
    old = jax.nn.log_softmax(theta)

    def loss(theta):
        advantages = jnp.asarray(REWARDS - p @ REWARDS, jnp.float32)
        return jnp.sum(jnp.exp(old) * policy_losses.clipped(jax.nn.log_softmax(theta), old, advantages, 0.2, 0.2).loss)

    np.testing.assert_allclose(-jax.grad(loss)(theta), p * (REWARDS - p @ REWARDS), rtol=1e-5, atol=1e-7)


def test_a_bandit_finds_its_best_arm():
    assert trained_bandit(beta=0.0)[1] > 0.99


def test_a_bandit_that_is_held_back_finds_the_optimum_between():
    """With one update a block eq. 4's gradient is that of KL(reference | p): the optimum of E[r] - beta KL(reference | p) has
    p_k = beta reference_k / (lambda - r_k), with the lambda above all rewards that makes their sum 1; here by bisection."""
    beta, low, high = 0.5, REWARDS.max() + 1e-9, REWARDS.max() + 10
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (beta * REFERENCE / (middle - REWARDS)).sum() > 1 else (low, middle)
    optimum = beta * REFERENCE / (low - REWARDS)
    assert optimum.sum() == pytest.approx(1)
    found = trained_bandit(beta, epochs=1)
    np.testing.assert_allclose(found, optimum, rtol=0, atol=1e-4)
    assert 0.2 < optimum[1] < 0.9
