"""Coarse distributions against float64 NumPy and finite differences: values, gradients, all tokens told apart, chunks, devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.ops import coarse

TOKENS, WIDTH, VOCAB = 13, 8, 29
CHUNKS = (0, 1, 5, 13, 100)
KINDS = ("forward", "reverse")


def make_arguments(seed=0, dtype=jnp.float32):
    """hidden_ND, kernel_VD, bias_V."""
    rng = np.random.default_rng(seed)
    hidden, kernel, bias = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    )
    return hidden.astype(dtype), kernel, bias


def targets():
    return jnp.asarray(np.random.default_rng(9).integers(0, VOCAB, TOKENS), jnp.int32)


def log_softmax(arrays, temperature=1.0):
    x, kernel, bias = (np.asarray(a, np.float64) for a in arrays)
    logits = (x @ kernel.T + bias) / temperature
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def outcomes(log_p, ids):
    """log p of the named tokens and of the rest, float64; without a rest the named ones alone."""
    named = np.take_along_axis(log_p, ids, 1)
    if ids.shape[1] == log_p.shape[1]:
        return named
    rest = np.exp(log_p)
    np.put_along_axis(rest, ids, 0, 1)
    return np.concatenate([named, np.log(rest.sum(1, keepdims=True))], 1)


def divergence(kind, log_p, log_q):
    first, second = (log_p, log_q) if kind == "forward" else (log_q, log_p)
    return (np.exp(first) * (first - second)).sum(1)


def oracle(kind, teacher, student, k, temperature, pull, hard):
    """sum over tokens of pull (KL + hard nll) in float64."""
    log_p = log_softmax(teacher, temperature)
    ids = np.argsort(-log_p, axis=1)[:, :k]
    kl = divergence(kind, outcomes(log_p, ids), outcomes(log_softmax(student, temperature), ids))
    return (pull * (kl - hard * log_softmax(student)[np.arange(TOKENS), np.asarray(targets())])).sum()


@partial(jax.jit, static_argnames=("kind", "k", "temperature", "chunk_tokens", "hard"))
def run(teacher, student, pull, *, kind, k, temperature, chunk_tokens, hard):
    """(the same, its gradients of the student's arrays)."""
    hidden, kernel, bias = teacher
    found = coarse.top(hidden, kernel, k, bias_V=bias, temperature=temperature, chunk_tokens=chunk_tokens)

    def loss(student):
        hidden, kernel, bias = student
        scores = coarse.scores(
            hidden, kernel, found.ids_NK, targets(), bias_V=bias, temperature=temperature, chunk_tokens=chunk_tokens
        )
        return jnp.sum(pull * (coarse.DIVERGENCES[kind](found.log_p_NO, scores.log_q_NO) - hard * scores.log_q_N))

    return jax.value_and_grad(loss)(student)


def slopes(function, arrays, step=1e-6):
    """Central differences in float64."""
    arrays = [np.asarray(array, np.float64) for array in arrays]
    found = [np.zeros_like(array) for array in arrays]
    for array, slope in zip(arrays, found, strict=True):
        for place in np.ndindex(array.shape):
            kept = array[place]
            both = []
            for sign in (1, -1):
                array[place] = kept + sign * step
                both.append(function(arrays))
            array[place], slope[place] = kept, (both[0] - both[1]) / (2 * step)
    return found


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("k", [1, 5, VOCAB])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_and_gradients_equal_the_oracle(kind, k, chunk_tokens):
    teacher, student = make_arguments(0), make_arguments(1)
    pull = np.random.default_rng(2).normal(size=TOKENS)
    given = {"kind": kind, "k": k, "temperature": 1.7, "hard": 0.3}
    found, gradients = run(teacher, student, jnp.asarray(pull, jnp.float32), chunk_tokens=chunk_tokens, **given)
    expected = partial(oracle, kind, teacher, k=k, temperature=1.7, pull=pull, hard=0.3)
    np.testing.assert_allclose(found, expected(student), rtol=0, atol=1e-6 * np.abs(pull).sum() * 5)
    for gradient, slope in zip(gradients, slopes(expected, student), strict=True):
        np.testing.assert_allclose(gradient, slope, rtol=0, atol=2e-6 * np.abs(slope).max())


@pytest.mark.parametrize("kind", KINDS)
def test_coarser_is_never_more_and_all_tokens_give_the_whole_divergence(kind):
    teacher, student, ones = make_arguments(0), make_arguments(1), jnp.ones(TOKENS)
    given = {"kind": kind, "temperature": 1.0, "chunk_tokens": 5, "hard": 0.0}
    found = [float(run(teacher, student, ones, k=k, **given)[0]) for k in (1, 4, VOCAB - 1, VOCAB)]
    assert 0 < found[0] < found[1] < found[2]
    # The rest of V - 1 tokens is the last one.
    np.testing.assert_allclose(found[2:], divergence(kind, log_softmax(teacher), log_softmax(student)).sum(), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 5, VOCAB])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_no_divergence_from_itself(kind, k):
    model, ones = make_arguments(), jnp.ones(TOKENS)
    found, gradients = run(model, model, ones, kind=kind, k=k, temperature=2.0, chunk_tokens=5, hard=0.0)
    assert abs(float(found)) < 1e-6
    assert all(np.abs(gradient).max() < 1e-5 for gradient in gradients)


@pytest.mark.parametrize("chunk_tokens", [0, 5])
def test_the_rest_is_exact_where_it_is_next_to_nothing(chunk_tokens):
    """1 less the sum of the named probabilities would be 0, and the reverse divergence infinite."""
    hidden, kernel = jnp.ones((1, 1)), jnp.array([[30.0], [29.0], [-20.0], [-21.0]])
    found = coarse.top(hidden, kernel, 2, bias_V=None, temperature=1.0, chunk_tokens=chunk_tokens)
    expected = outcomes(log_softmax((hidden, kernel, np.zeros(4))), np.asarray(found.ids_NK))
    np.testing.assert_allclose(found.log_p_NO, expected, rtol=1e-5)
    assert found.ids_NK.tolist() == [[0, 1]] and expected[0, 2] < -49


def test_scores_of_the_target_are_those_of_temperature_1():
    student = make_arguments(1)
    ids = jnp.tile(jnp.arange(3), (TOKENS, 1))
    whole = targets().at[4].set(VOCAB)
    found = coarse.scores(*student[:2], ids, whole, bias_V=student[2], temperature=3.0, chunk_tokens=5)
    log_q = log_softmax(student)
    expected = log_q[np.arange(TOKENS), np.asarray(targets())]
    expected[4] = np.nan
    np.testing.assert_allclose(found.log_q_N, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found.correct_N, log_q.argmax(1) == np.asarray(whole))


def test_bfloat16_hidden_states_give_float32_numbers():
    (hidden, kernel, bias), ids = make_arguments(1, jnp.bfloat16), jnp.tile(jnp.arange(3), (TOKENS, 1))
    kernel = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    found = coarse.scores(hidden, kernel, ids, targets(), bias_V=bias, temperature=1.0, chunk_tokens=5)
    assert found.log_q_NO.dtype == jnp.float32
    expected = outcomes(log_softmax((hidden, kernel, bias)), np.asarray(ids))
    np.testing.assert_allclose(found.log_q_NO, expected, rtol=0, atol=1e-5)


def test_no_array_has_the_logits_of_all_tokens():
    tokens, width, vocab, chunk = 512, 8, 1024, 32

    def loss(hidden, kernel):
        ids = jnp.tile(jnp.arange(4), (tokens, 1))
        found = coarse.scores(hidden, kernel, ids, ids[:, 0], bias_V=None, temperature=1.0, chunk_tokens=chunk)
        return found.log_q_NO.sum()

    shapes = jnp.zeros((tokens, width)), jnp.zeros((vocab, width))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 2


@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x")], ids=["vocabulary", "width"])
def test_a_kernel_that_devices_share_has_the_same_numbers(spec):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    teacher, (hidden, kernel, bias) = make_arguments(0), make_arguments(1)
    # A vocabulary that divides.
    teacher, student = ((h, k[:28], b[:28]) for h, k, b in (teacher, (hidden, kernel, bias)))
    small = jnp.minimum(targets(), 27)

    @jax.jit
    def both(teacher, student):
        found = coarse.top(*teacher[:2], 5, bias_V=teacher[2], temperature=1.0, chunk_tokens=5)

        def loss(student):
            scores = coarse.scores(*student[:2], found.ids_NK, small, bias_V=student[2], temperature=1.0, chunk_tokens=5)
            return coarse.forward_kl(found.log_p_NO, scores.log_q_NO).sum() - scores.log_q_N.sum()

        return jax.value_and_grad(loss)(student)

    shared = [(h, jax.device_put(k, NamedSharding(mesh, spec)), b) for h, k, b in (teacher, student)]
    for one, other in zip(jax.tree.leaves(both(*shared)), jax.tree.leaves(both(teacher, student)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())
