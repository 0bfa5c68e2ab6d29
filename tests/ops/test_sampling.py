"""The filters against NumPy versions of transformers' logits processors, and the draw against its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops import sampling
from jaxllm.ops.sampling import Settings

BATCH, VOCAB = 6, 50


def make_logits(batch=BATCH, vocab=VOCAB):
    rng = np.random.default_rng(0)
    return np.asarray(rng.normal(size=(batch, vocab)) * 3, np.float32), rng.random((batch, vocab)) < 0.3


def softmax(x):
    exp = np.exp(x - x.max())
    return exp / exp.sum()


def oracle(logits_V, seen_V, settings):
    """One row, in the order of transformers' `_get_logits_processor`, in float64."""
    x = np.asarray(logits_V, np.float64)
    x = np.where(seen_V, np.where(x < 0, x * settings.repetition_penalty, x / settings.repetition_penalty), x)
    x = x / settings.temperature
    if settings.top_k:
        x = np.where(x < np.sort(x)[-min(settings.top_k, x.size)], -np.inf, x)
    if settings.top_p < 1:
        order = np.argsort(-x, kind="stable")
        mass = np.cumsum(softmax(x)[order])
        x[order[1 + int(np.argmax(mass >= settings.top_p)) :]] = -np.inf
    if settings.min_p:
        x = np.where(softmax(x) < settings.min_p * softmax(x).max(), -np.inf, x)
    return x


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(temperature=0.3),
        Settings(top_k=1),
        Settings(top_k=7),
        Settings(top_k=10**9),
        Settings(top_p=1e-6),
        Settings(top_p=0.5),
        Settings(top_p=0.999),
        Settings(min_p=0.05),
        Settings(min_p=1.0),
        Settings(repetition_penalty=1.7),
        Settings(repetition_penalty=0.6, temperature=2.0, top_k=40, top_p=0.8, min_p=0.1),
    ],
    ids=str,
)
def test_filters_equal_transformers(settings):
    logits_BV, seen_BV = make_logits()
    actual = np.asarray(jax.jit(sampling.filtered, static_argnums=1)(logits_BV, settings, seen_BV))
    expected = np.stack([oracle(*row, settings) for row in zip(logits_BV, seen_BV, strict=True)])
    np.testing.assert_array_equal(np.isinf(actual), np.isinf(expected))
    np.testing.assert_allclose(actual[np.isfinite(actual)], expected[np.isfinite(expected)], rtol=1e-6)


def test_ties_stay_together_and_the_likeliest_always_stays():
    logits = jnp.array([[2.0, -1.0, 2.0, 0.0, -0.5, 2.0], [-7.0, -7.5, -9.0, -9.0, -8.0, -10.0]])
    kept = np.isfinite(sampling.keep_top_k(logits, 2))
    np.testing.assert_array_equal(kept, [[1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0]])
    kept = np.isfinite(sampling.keep_top_p(logits, 0.4))
    np.testing.assert_array_equal(kept, [[1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]])
    out = jnp.where(jnp.arange(6) < 2, logits, -jnp.inf)
    np.testing.assert_array_equal(sampling.keep_top_p(out, 0.999), out)


def test_draws_have_the_distribution_of_the_filtered_logits():
    logits_BV, _ = make_logits(batch=1, vocab=8)
    settings = Settings(temperature=1.5, top_k=5)
    draws = 20_000
    ids = np.asarray(sampling.sample(jax.random.key(0), jnp.broadcast_to(logits_BV, (draws, 8)), settings))
    expected = softmax(oracle(logits_BV[0], False, settings))
    shares = np.bincount(ids, minlength=8) / draws
    assert ids.dtype == np.int32 and np.all(shares[expected == 0] == 0)
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / draws))  # four standard deviations at most


def test_greedy_is_argmax_after_the_penalty():
    logits_BV = jnp.array([[1.0, 3.0, 2.9], [-1.0, -2.0, -1.1]])
    seen_BV = jnp.array([[False, True, False], [True, False, False]])
    rng = jax.random.key(0)
    assert sampling.sample(rng, logits_BV, Settings(temperature=0)).tolist() == [1, 0]
    assert sampling.sample(rng, logits_BV, Settings(temperature=0, repetition_penalty=1.2), seen_BV).tolist() == [2, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.2},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name} = {value}.\n  Accepted: .+\n  Change {name}."):
        Settings(**wrong)


def test_a_penalty_needs_the_tokens_seen():
    with pytest.raises(ValueError, match="repetition_penalty = 1.2 without seen_BV"):
        sampling.sample(jax.random.key(0), jnp.zeros((1, 4)), Settings(repetition_penalty=1.2))
