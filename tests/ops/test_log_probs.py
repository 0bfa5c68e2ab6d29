"""Log-probabilities of targets against float64 NumPy: value, every gradient, what lies outside the vocabulary, memory, sharding."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.ops import losses

TOKENS, WIDTH, VOCAB = 37, 16, 29
CHUNKS = (0, 1, 7, 37, 100)  # all at once, one by one, odd, equal, larger


def make_arguments(tokens=TOKENS, width=WIDTH, vocab=VOCAB, dtype=jnp.float32):
    """hidden_ND, kernel_VD, bias_V, targets_N, dlog_p_N."""
    rng = np.random.default_rng(0)
    floats = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((tokens, width), (vocab, width), (vocab,))]
    targets_N = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
    return [floats[0].astype(dtype), floats[1] / 2, floats[2], targets_N, jnp.asarray(rng.normal(size=tokens), jnp.float32)]


def oracle(hidden_ND, kernel_VD, bias_V, targets_N, dlog_p_N):
    """(log p, gradients of sum(dlog_p log p) for hidden, kernel and bias) in float64."""
    x, kernel, bias, pull = (np.asarray(a, np.float64) for a in (hidden_ND, kernel_VD, bias_V, dlog_p_N))
    logits = x @ kernel.T + bias
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    dlogits = pull[:, None] * (np.eye(len(kernel))[np.asarray(targets_N)] - np.exp(log_p))
    return log_p[np.arange(len(x)), np.asarray(targets_N)], (dlogits @ kernel, dlogits.T @ x, dlogits.sum(0))


@partial(jax.jit, static_argnames="chunk_tokens")
def run(hidden_ND, kernel_VD, bias_V, targets_N, dlog_p_N, chunk_tokens):
    def log_probs(hidden_ND, kernel_VD, bias_V):
        return losses.log_probs(hidden_ND, kernel_VD, targets_N, bias_V=bias_V, chunk_tokens=chunk_tokens)

    log_p_N, vjp = jax.vjp(log_probs, hidden_ND, kernel_VD, bias_V)
    return log_p_N, vjp(dlog_p_N)


def assert_near(actual, expected, tolerance):
    """Relative to the largest entry: sums of signed terms have no relative precision of their own."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_log_probs_and_gradients_equal_the_oracle(chunk_tokens):
    arguments = make_arguments()
    log_p_N, gradients = run(*arguments, chunk_tokens)
    expected, slopes = oracle(*arguments)
    assert log_p_N.dtype == jnp.float32
    assert_near([log_p_N, *gradients], [expected, *slopes], 1e-6)


@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_bfloat16_hidden_has_float32_log_probs(chunk_tokens):
    arguments = make_arguments(dtype=jnp.bfloat16)
    log_p_N, gradients = run(*arguments, chunk_tokens)
    hidden_ND, kernel_VD, *rest = arguments
    expected, slopes = oracle(hidden_ND, kernel_VD.astype(jnp.bfloat16), *rest)
    np.testing.assert_allclose(log_p_N, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    assert_near(gradients, slopes, 2**-7)


@pytest.mark.parametrize("chunk_tokens", [0, 7])
@pytest.mark.parametrize("target", [VOCAB, -1])
def test_a_target_outside_the_vocabulary_is_not_a_number_and_can_be_taken_out(chunk_tokens, target):
    *floats, targets_N, _ = make_arguments()
    targets_N = targets_N.at[3].set(target)

    def total(hidden_ND, kernel_VD, bias_V, known_N):
        log_p_N = losses.log_probs(hidden_ND, kernel_VD, targets_N, bias_V=bias_V, chunk_tokens=chunk_tokens)
        return jnp.sum(jnp.where(known_N, log_p_N, 0.0))

    known_N = jnp.arange(TOKENS) != 3
    assert np.isnan(total(*floats, known_N | True))
    gradients = jax.grad(total, (0, 1, 2))(*floats, known_N)
    assert_near(gradients, oracle(*floats, targets_N.at[3].set(0), known_N)[1], 1e-6)


def test_oracle_gradients_are_the_slopes_of_its_values():
    *floats, targets_N, pull = make_arguments()
    direction = [np.random.default_rng(2).normal(size=x.shape) for x in floats]

    def side(step):
        moved = [np.asarray(x, np.float64) + step * d for x, d in zip(floats, direction, strict=True)]
        return np.sum(np.asarray(pull, np.float64) * oracle(*moved, targets_N, pull)[0])

    slope = sum(np.sum(g * d) for g, d in zip(oracle(*floats, targets_N, pull)[1], direction, strict=True))
    np.testing.assert_allclose(slope, (side(1e-5) - side(-1e-5)) / 2e-5, rtol=1e-7)


def test_logits_never_exist_at_once_and_a_frozen_head_has_no_gradient():
    tokens, width, vocab = 1024, 32, 2048

    def compile_gradient(chunk_tokens, wanted):
        def total(hidden_ND, kernel_VD, targets_N):
            return jnp.sum(losses.log_probs(hidden_ND, kernel_VD, targets_N, chunk_tokens=chunk_tokens) ** 2)

        shapes = [((tokens, width), jnp.float32), ((vocab, width), jnp.float32), ((tokens,), jnp.int32)]
        return jax.jit(jax.grad(total, wanted)).lower(*[jax.ShapeDtypeStruct(*shape) for shape in shapes]).compile()

    whole, chunked, frozen = (compile_gradient(*how) for how in ((0, (0, 1)), (64, (0, 1)), (64, (0,))))
    logits_bytes = 4 * tokens * vocab
    assert whole.memory_analysis().temp_size_in_bytes >= logits_bytes
    assert chunked.memory_analysis().temp_size_in_bytes < logits_bytes / 4
    # Of the products of a chunk, 2 C V D each, the one for the kernel falls away.
    assert chunked.cost_analysis()["flops"] - frozen.cost_analysis()["flops"] >= 2 * 64 * vocab * width


def test_a_vocabulary_spread_over_devices_is_never_brought_together():
    tokens, width, vocab = 64, 8, 32
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("tensor"))
    arguments = make_arguments(tokens, width, vocab)

    def total(hidden_ND, kernel_VD, bias_V, targets_N, pull):
        return jnp.sum(pull * losses.log_probs(hidden_ND, kernel_VD, targets_N, bias_V=bias_V, chunk_tokens=16))

    step = jax.jit(
        jax.grad(total, (0, 1, 2)), in_shardings=(whole, split, split, whole, whole), out_shardings=(whole, split, split)
    )
    assert_near(step(*arguments), oracle(*arguments)[1], 1e-6)
    kinds = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    moved = re.findall(rf"= (.*) (?:{kinds})\(", step.lower(*arguments).compile().as_text())
    sizes = {tuple(map(int, found.split(","))) for shapes in moved for found in re.findall(r"\[([\d,]+)\]", shapes)}
    assert sizes and all(np.prod(size) <= 16 * width for size in sizes), sizes  # a chunk of 16 tokens
