"""The chunked and the plain loss against a float64 oracle: value, every gradient, any cotangents, penalties, memory, sharding."""

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
    rng = np.random.default_rng(0)
    hidden_ND = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    kernel_VD = jnp.asarray(rng.normal(size=(vocab, width)) * 0.5, jnp.float32)
    weights_N = jnp.asarray(rng.random(tokens) * (rng.random(tokens) < 0.8), jnp.float32)
    return hidden_ND, kernel_VD, jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32), weights_N


def make_bias(vocab=VOCAB):
    return jnp.asarray(np.random.default_rng(4).normal(size=vocab), jnp.float32)


def oracle(hidden_ND, kernel_VD, targets_N, weights_N, z_loss, dnll=1.0, dpenalty=1.0, *, bias_V=None, label_smoothing=0.0):
    """((nll, penalty, correct), gradients of dnll * nll + dpenalty * penalty), in float64.

    Of hidden, kernel, weights and, if there is one, bias. Smoothing is the whole cross-entropy against the smoothed targets
    (1 - e) 1[target] + e / V (Szegedy et al. 2016, section 7) minus nll.
    """
    x, kernel, weights = (np.asarray(a, np.float64) for a in (hidden_ND, kernel_VD, weights_N))
    logits = x @ kernel.T + (0 if bias_V is None else np.asarray(bias_V, np.float64))
    exp = np.exp(logits - logits.max(1, keepdims=True))
    p = exp / exp.sum(1, keepdims=True)
    log_z = logits.max(1) + np.log(exp.sum(1))
    one_hot = np.eye(len(kernel))[np.asarray(targets_N)]
    smoothed = (1 - label_smoothing) * one_hot + label_smoothing / len(kernel)
    nll, whole = (-(t * (logits - log_z[:, None])).sum(1) for t in (one_hot, smoothed))
    penalty = z_loss * log_z**2 + whole - nll
    dpenalty_dlogits = 2 * z_loss * log_z[:, None] * p + one_hot - smoothed
    dlogits = weights[:, None] * (dnll * (p - one_hot) + dpenalty * dpenalty_dlogits)
    totals = [(weights * a).sum() for a in (nll, penalty, logits.argmax(1) == np.asarray(targets_N))]
    gradients = [dlogits @ kernel, dlogits.T @ x, dnll * nll + dpenalty * penalty]
    return totals, gradients + ([] if bias_V is None else [dlogits.sum(0)])


def run(arguments, *, dnll=1.0, dpenalty=1.0, bias_V=None, **how):
    """(totals, gradients as those of the oracle) of dnll * nll + dpenalty * penalty."""
    hidden_ND, kernel_VD, targets_N, weights_N = arguments

    @jax.jit
    def both(moving, dnll, dpenalty):
        def totals_of(hidden_ND, kernel_VD, weights_N, bias_V=None):
            return losses.cross_entropy(hidden_ND, kernel_VD, targets_N, weights_N, bias_V=bias_V, **how)

        totals, vjp = jax.vjp(totals_of, *moving)
        # The third cotangent must not matter.
        return totals, vjp(losses.Totals(dnll, dpenalty, jnp.float32(1e3)))

    moving = (hidden_ND, kernel_VD, weights_N) + (() if bias_V is None else (bias_V,))
    return both(moving, jnp.float32(dnll), jnp.float32(dpenalty))


def assert_near(actual, expected, rtol):
    """Relative to the largest entry: sums of signed terms have no relative precision of their own."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=rtol * np.abs(b).max())


PENALTIES = [  # z_loss, label_smoothing, bias, cotangents of nll and penalty
    (0.0, 0.0, False, 1.0, 1.0),
    (0.0, 0.0, True, -0.3, 2.0),
    (0.1, 0.0, False, 2.5, 2.5),
    (0.0, 0.1, True, 2.5, 2.5),
    (0.1, 0.2, True, 2.0, -3.0),
]


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize(("z_loss", "label_smoothing", "biased", "dnll", "dpenalty"), PENALTIES)
def test_totals_and_gradients_equal_the_oracle(chunk_tokens, z_loss, label_smoothing, biased, dnll, dpenalty):
    arguments = make_arguments()
    extra = {"label_smoothing": label_smoothing, "bias_V": make_bias() if biased else None}
    totals, gradients = run(arguments, chunk_tokens=chunk_tokens, z_loss=z_loss, dnll=dnll, dpenalty=dpenalty, **extra)
    expected_totals, expected_gradients = oracle(*arguments, z_loss, dnll, dpenalty, **extra)
    assert all(total.dtype == jnp.float32 and total.shape == () for total in totals)
    # The penalty of smoothing is a difference of two cross-entropies: as precise as these.
    np.testing.assert_allclose([float(total) for total in totals], expected_totals, rtol=2e-6, atol=1e-6 * expected_totals[0])
    assert_near(gradients, expected_gradients, 3e-6)


def test_oracle_gradients_are_the_slopes_of_its_totals():
    arguments, extra = make_arguments(), {"bias_V": make_bias(), "label_smoothing": 0.2}
    rng = np.random.default_rng(2)
    moving = [np.asarray(arguments[0]), np.asarray(arguments[1]), np.asarray(arguments[3]), np.asarray(extra["bias_V"])]
    direction = [rng.normal(size=x.shape) for x in moving]

    def side(step):
        hidden, kernel, weights, bias = (x.astype(np.float64) + step * d for x, d in zip(moving, direction, strict=True))
        nll, penalty, _ = oracle(hidden, kernel, arguments[2], weights, 0.1, bias_V=bias, label_smoothing=0.2)[0]
        return 2.0 * nll - 3.0 * penalty

    gradients = oracle(*arguments, 0.1, 2.0, -3.0, **extra)[1]
    slope = sum(np.sum(g * d) for g, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(slope, (side(1e-5) - side(-1e-5)) / 2e-5, rtol=1e-7)


@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_bfloat16_hidden_has_float32_logits(chunk_tokens):
    hidden_ND, kernel_VD, targets_N, weights_N = make_arguments(dtype=jnp.bfloat16)
    extra = {"bias_V": make_bias(), "label_smoothing": 0.1}
    totals, gradients = run((hidden_ND, kernel_VD, targets_N, weights_N), chunk_tokens=chunk_tokens, z_loss=0.1, **extra)
    rounded = kernel_VD.astype(jnp.bfloat16)  # what is multiplied
    expected_totals, expected_gradients = oracle(hidden_ND, rounded, targets_N, weights_N, 0.1, **extra)
    # Products of bfloat16 numbers are exact in float32: the totals know of no rounding but the inputs'.
    np.testing.assert_allclose([float(total) for total in totals], expected_totals, rtol=2e-6)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32, jnp.float32]
    assert_near(gradients, expected_gradients, 2**-7)


def test_gradients_of_kernel_and_bias_are_summed_in_float32_over_bfloat16_chunks():
    # 2,000 equal tokens, one a chunk: in bfloat16 the sum would stop growing at 256 times a term.
    hidden_ND, targets_N, weights_N = jnp.ones((2000, 1)), jnp.zeros(2000, jnp.int32), jnp.ones(2000)
    kernel_VD, bias_V = jnp.zeros((2, 1), jnp.bfloat16), jnp.zeros(2, jnp.bfloat16)
    _, gradients = run((hidden_ND, kernel_VD, targets_N, weights_N), bias_V=bias_V, chunk_tokens=1, z_loss=0.0)
    assert gradients[1].dtype == gradients[3].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradients[1], np.float32), [[-1000], [1000]])
    np.testing.assert_array_equal(np.asarray(gradients[3], np.float32), [-1000, 1000])


def test_remat_and_microbatches_add_up_to_the_whole():
    hidden_ND, kernel_VD, targets_N, weights_N = make_arguments(tokens=36)

    def loss(kernel_VD, batch):
        loss = partial(losses.cross_entropy, chunk_tokens=5, z_loss=0.1, label_smoothing=0.1)
        totals = jax.checkpoint(loss)(batch[0] @ mixing, kernel_VD, *batch[1:])
        return totals.nll + totals.penalty

    @jax.jit
    def accumulate(kernel_VD, batches):
        def step(total, batch):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(kernel_VD, batch)), None

        return jax.lax.scan(step, (jnp.zeros(()), jnp.zeros_like(kernel_VD)), batches)[0]

    mixing = jnp.asarray(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)) / 4, jnp.float32)
    batches = jax.tree.map(lambda x: x.reshape(3, 12, *x.shape[1:]), (hidden_ND, targets_N, weights_N))
    value, gradient = accumulate(kernel_VD, batches)
    mixed = np.asarray(hidden_ND, np.float64) @ np.asarray(mixing)
    totals, gradients = oracle(mixed, kernel_VD, targets_N, weights_N, 0.1, label_smoothing=0.1)
    np.testing.assert_allclose(value, totals[0] + totals[1], rtol=2e-6)
    assert_near([gradient], [gradients[1]], 3e-6)


@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_weights_of_zero_give_zeros_whatever_the_targets(chunk_tokens):
    hidden_ND, kernel_VD, targets_N, weights_N = make_arguments()
    how = {"chunk_tokens": chunk_tokens, "z_loss": 0.1, "label_smoothing": 0.1, "bias_V": make_bias()}
    totals, gradients = run((hidden_ND, kernel_VD, targets_N * 0 - 100, weights_N * 0), **how)
    assert [float(total) for total in totals] == [0, 0, 0]
    assert not any(np.any(gradients[i]) for i in (0, 1, 3))


@pytest.mark.parametrize("chunk_tokens", [0, 7])
@pytest.mark.parametrize("target", [VOCAB, -1])
def test_target_outside_the_vocabulary_is_not_a_number(chunk_tokens, target):
    hidden_ND, kernel_VD, targets_N, weights_N = make_arguments()
    totals, _ = run(
        (hidden_ND, kernel_VD, targets_N.at[3].set(target), weights_N.at[3].set(1)), chunk_tokens=chunk_tokens, z_loss=0.0
    )
    assert np.isnan(totals[0])


@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_ties_count_as_argmax_counts_them(chunk_tokens):
    hidden_ND, kernel_VD, targets_N, weights_N = make_arguments()
    totals, _ = run((hidden_ND, kernel_VD * 0, targets_N, weights_N), chunk_tokens=chunk_tokens, z_loss=0.0)
    np.testing.assert_allclose(totals[2], np.asarray(weights_N)[np.asarray(targets_N) == 0].sum(), rtol=1e-6)


def compile_gradient(tokens, width, vocab, wanted, **how):
    def loss(hidden_ND, kernel_VD, targets_N, weights_N):
        return losses.cross_entropy(hidden_ND, kernel_VD, targets_N, weights_N, **how)[0]

    shapes = [((tokens, width), jnp.float32), ((vocab, width), jnp.float32), ((tokens,), jnp.int32), ((tokens,), jnp.float32)]
    return jax.jit(jax.grad(loss, wanted)).lower(*[jax.ShapeDtypeStruct(*shape) for shape in shapes]).compile()


def test_logits_never_exist_at_once_and_a_frozen_head_has_no_gradient():
    tokens, width, vocab = 1024, 32, 2048
    sizes = {
        (chunk, wanted): compile_gradient(tokens, width, vocab, wanted, chunk_tokens=chunk, z_loss=0.0).memory_analysis()
        for chunk, wanted in ((0, (0, 1)), (64, (0, 1)), (64, (0,)))
    }
    temporary = {key: size.temp_size_in_bytes for key, size in sizes.items()}
    logits_bytes = 4 * tokens * vocab
    assert temporary[0, (0, 1)] >= logits_bytes
    assert temporary[64, (0, 1)] < logits_bytes / 4
    # The compiler drops the [V, D] sum that nobody reads (beside some bytes of loop counters).
    assert temporary[64, (0,)] < temporary[64, (0, 1)] - 0.9 * 4 * vocab * width


def test_a_vocabulary_spread_over_devices_is_never_brought_together():
    """Vocabulary-parallel loss: numbers a token travel, and the gradient of the hidden states; no logits, no rows of the kernel."""
    tokens, width, vocab = 64, 8, 32
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("tensor"))
    arguments, bias_V = make_arguments(tokens, width, vocab), make_bias(vocab)

    def loss(hidden_ND, kernel_VD, bias_V, targets_N, weights_N):
        how = {"chunk_tokens": 16, "z_loss": 0.0, "label_smoothing": 0.1}
        totals = losses.cross_entropy(hidden_ND, kernel_VD, targets_N, weights_N, bias_V=bias_V, **how)
        return totals.nll + totals.penalty

    placed = (arguments[0], arguments[1], bias_V, *arguments[2:])
    step = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=(whole, split, split, whole, whole), out_shardings=(whole, split, split))
    dhidden, dkernel, _, dbias = oracle(*arguments, 0.0, bias_V=bias_V, label_smoothing=0.1)[1]
    assert_near(step(*placed), (dhidden, dkernel, dbias), 3e-6)
    kinds = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    moved = re.findall(rf"= (.*) (?:{kinds})\(", step.lower(*placed).compile().as_text())
    sizes = {tuple(map(int, found.split(","))) for shapes in moved for found in re.findall(r"\[([\d,]+)\]", shapes)}
    assert sizes and all(np.prod(size) <= 16 * width for size in sizes), sizes  # a chunk of 16 tokens
