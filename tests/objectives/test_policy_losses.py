"""Losses of policy gradients against the papers' equations in NumPy float64, their gradients by finite differences, and TRL's GRPO."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.objectives import policy_losses

GOLDEN = json.loads((Path(__file__).resolve().parent.parent / "golden" / "policy" / "expected.json").read_text())
GIVEN = {name: np.array(values) for name, values in GOLDEN["inputs"].items()}
LOW = 0.2


def total(log_p, weights, beta, high):
    """The loss of a batch, as the objective adds it up."""
    arrays = {name: jnp.asarray(GIVEN[name], jnp.float32) for name in ("old", "reference")}
    terms = policy_losses.clipped(log_p, arrays["old"], jnp.asarray(GIVEN["advantages"], jnp.float32)[:, None], LOW, high).loss
    if beta:
        terms += beta * policy_losses.kl(log_p, arrays["reference"])
    return jnp.sum(weights * terms)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_forms_of_grpo_equal_those_of_trl(name):
    form, beta, high = name.split()
    lengths = GIVEN["mask"].sum(1)
    shares = policy_losses.token_weights(form, lengths, GOLDEN["most_tokens"], GOLDEN["mean_tokens"])
    weights = jnp.asarray(shares[:, None] * GIVEN["mask"], jnp.float32)
    log_p = jnp.asarray(GIVEN["log_p"], jnp.float32)
    loss, gradient = jax.value_and_grad(total)(log_p, weights, float(beta), float(high))
    expected = GOLDEN["cases"][name]
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradient, expected["gradient"], rtol=0, atol=1e-6)
    assert np.abs(expected["gradient"]).max() > 1e-2


@pytest.mark.parametrize("scale", GOLDEN["advantages"])
def test_group_advantages_equal_those_of_trl(scale):
    found = policy_losses.group_advantages(np.array(GOLDEN["rewards"]), scale)
    np.testing.assert_allclose(found, GOLDEN["advantages"][scale], rtol=0, atol=1e-7)  # theirs are float32
    assert np.abs(found).max() > 0.1


def test_answers_that_are_alike_have_no_advantage():
    assert not policy_losses.group_advantages(np.ones((2, 4)), "group").any()


def numpy_clipped(log_p, old, advantages, low, high):
    """Schulman et al. 2017, eq. 7, in the words of the paper: the smaller of the two surrogates, to be maximized."""
    ratio = np.exp(log_p) / np.exp(old)
    bounded = np.where(ratio < 1 - low, 1 - low, np.where(ratio > 1 + high, 1 + high, ratio))
    return -np.where(ratio * advantages < bounded * advantages, ratio * advantages, bounded * advantages)


def numpy_kl(log_p, reference):
    """Shao et al. 2024, eq. 4."""
    ratio = np.exp(reference) / np.exp(log_p)
    return ratio - np.log(ratio) - 1


def numpy_value_loss(values, old_values, returns, clip):
    near = old_values + np.sign(values - old_values) * np.minimum(np.abs(values - old_values), clip)
    return 0.5 * np.max([(values - returns) ** 2, (near - returns) ** 2], axis=0)


def draws(names: str, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1, 40) for _ in names.split()]


CASES = {
    "clipped": (
        lambda x, old, a: policy_losses.clipped(x, old, a, 0.2, 0.3).loss,
        lambda x, old, a: numpy_clipped(x, old, a, 0.2, 0.3),
        2,
    ),
    "kl": (policy_losses.kl, numpy_kl, 1),
    "value": (
        lambda x, old, target: policy_losses.value_loss(x, old, target, 0.2)[0],
        lambda x, old, target: numpy_value_loss(x, old, target, 0.2),
        2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_papers(name):
    """Gradients: of the float64 oracle by central differences, away from where it bends."""
    mine, theirs, others = CASES[name]
    x, *beside = (0.5 * each for each in draws("x a b"[: 2 * others + 1], 3))
    value = mine(*(jnp.asarray(each, jnp.float32) for each in (x, *beside)))
    x, *beside = (np.float64(np.float32(each)) for each in (x, *beside))
    np.testing.assert_allclose(value, theirs(x, *beside), rtol=1e-6, atol=1e-6)
    h = 1e-5
    slope = (theirs(x + h, *beside) - theirs(x - h, *beside)) / (2 * h)
    gradient = jax.grad(lambda each: mine(each, *(jnp.asarray(other, jnp.float32) for other in beside)).sum())(
        jnp.asarray(x, jnp.float32)
    )
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-6)
    assert (np.abs(slope) > 1e-3).sum() >= 10


def test_the_clipped_share_is_where_the_gradient_is_gone():
    log_p, old, advantages = (jnp.asarray(each, jnp.float32) for each in draws("p old a", 5))
    found = policy_losses.clipped(log_p, old, advantages, 0.2, 0.3)
    gradient = jax.grad(lambda each: policy_losses.clipped(each, old, advantages, 0.2, 0.3).loss.sum())(log_p)
    np.testing.assert_array_equal(gradient == 0, found.low + found.high == 1)
    assert found.low.sum() > 2 and found.high.sum() > 2


def test_generalized_advantages_equal_their_sum():
    """Schulman et al. 2015, eq. 16, term by term."""
    rng = np.random.default_rng(0)
    rewards, values, lengths = rng.normal(size=(3, 6)), rng.normal(size=(3, 6)), np.array([6, 1, 4])
    gamma, decay = 0.9, 0.8
    found = policy_losses.generalized_advantages(rewards, values, lengths, gamma, decay)
    for row, length in enumerate(lengths):
        v = [*values[row, :length], 0.0]
        delta = [rewards[row, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected = [sum((gamma * decay) ** n * delta[t + n] for n in range(length - t)) for t in range(length)]
        np.testing.assert_allclose(found[row, :length], expected, rtol=0, atol=1e-12)
        assert not found[row, length:].any()


def test_with_a_decay_of_one_the_returns_are_what_comes():
    """gamma = lambda = 1: advantage + value = the sum of the rewards from there on (eq. 18 of the same)."""
    rng = np.random.default_rng(1)
    rewards, values, lengths = rng.normal(size=(2, 5)), rng.normal(size=(2, 5)), np.array([5, 3])
    returns = policy_losses.generalized_advantages(rewards, values, lengths, 1.0, 1.0) + values
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(returns[row, :length], rewards[row, :length][::-1].cumsum()[::-1], rtol=0, atol=1e-12)


def test_the_reward_comes_at_the_end_and_each_token_pays_for_its_divergence():
    ratios = np.array([[0.5, -0.25, 9.0], [1.0, 2.0, 4.0]])
    found = policy_losses.token_rewards(np.array([1.0, -1.0]), ratios, np.array([2, 3]), 0.1)
    np.testing.assert_allclose(found, [[-0.05, 1.025, 0], [-0.1, -0.2, -1.4]], rtol=0, atol=1e-15)


def test_whitened_advantages():
    advantages, lengths = np.random.default_rng(2).normal(3, 2, (4, 6)), np.array([6, 2, 1, 4])
    found = policy_losses.whitened(advantages, lengths)
    inside = found[np.arange(6) < lengths[:, None]]
    np.testing.assert_allclose([inside.mean(), inside.std()], [0, 1], atol=1e-7)
    assert np.count_nonzero(found) == lengths.sum()


@pytest.mark.parametrize(("found", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (0.0, 0.98)])
def test_the_kl_coefficient_follows_its_target(found, factor):
    assert policy_losses.adapted_coefficient(0.2, found, 6.0, 0.1) == pytest.approx(0.2 * factor, rel=1e-12)
