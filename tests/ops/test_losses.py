"""The chunked loss against a float64 oracle: value, every gradient, any cotangents, sums of parts, memory, sharding."""

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


def oracle(hidden_ND, kernel_VD, targets_N, weights_N, z_loss, dnll, dz):
    """((nll, z, correct), (d hidden, d kernel, d weights)) of dnll * nll + dz * z, in float64."""
    x, kernel, weights = (np.asarray(a, np.float64) for a in (hidden_ND, kernel_VD, weights_N))
    logits = x @ kernel.T
    exp = np.exp(logits - logits.max(1, keepdims=True))
    p = exp / exp.sum(1, keepdims=True)
    log_z = logits.max(1) + np.log(exp.sum(1))
    one_hot = np.eye(len(kernel))[np.asarray(targets_N)]
    nll, z = log_z - (logits * one_hot).sum(1), z_loss * log_z**2
    dlogits = weights[:, None] * (dnll * (p - one_hot) + dz * 2 * z_loss * log_z[:, None] * p)
    totals = (weights * nll).sum(), (weights * z).sum(), (weights * (logits.argmax(1) == np.asarray(targets_N))).sum()
    return totals, (dlogits @ kernel, dlogits.T @ x, dnll * nll + dz * z)


def run(arguments, *, dnll=1.0, dz=1.0, **how):
    """(totals, gradients for hidden, kernel and weights) of dnll * nll + dz * z."""
    hidden_ND, kernel_VD, targets_N, weights_N = arguments

    @jax.jit
    def both(hidden_ND, kernel_VD, weights_N, dnll, dz):
        totals, vjp = jax.vjp(lambda x, k, w: losses.cross_entropy(x, k, targets_N, w, **how), hidden_ND, kernel_VD, weights_N)
        # The third cotangent must not matter.
        return totals, vjp((dnll, dz, jnp.float32(1e3)))

    return both(hidden_ND, kernel_VD, weights_N, jnp.float32(dnll), jnp.float32(dz))


def assert_near(actual, expected, rtol):
    """Relative to the largest entry: sums of signed terms have no relative precision of their own."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize(("z_loss", "dnll", "dz"), [(0.0, 1.0, 1.0), (0.0, -0.3, 2.0), (0.1, 2.5, 2.5), (0.1, 2.0, -3.0)])
def test_totals_and_gradients_equal_the_oracle(chunk_tokens, z_loss, dnll, dz):
    arguments = make_arguments()
    totals, gradients = run(arguments, chunk_tokens=chunk_tokens, z_loss=z_loss, dnll=dnll, dz=dz)
    expected_totals, expected_gradients = oracle(*arguments, z_loss, dnll, dz)
    assert all(total.dtype == jnp.float32 and total.shape == () for total in totals)
    np.testing.assert_allclose([float(total) for total in totals], expected_totals, rtol=2e-6)
    assert_near(gradients, expected_gradients, 3e-6)


@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_bfloat16_hidden_has_float32_logits(chunk_tokens):
    hidden_ND, kernel_VD, targets_N, weights_N = make_arguments(dtype=jnp.bfloat16)
    totals, gradients = run((hidden_ND, kernel_VD, targets_N, weights_N), chunk_tokens=chunk_tokens, z_loss=0.1)
    rounded = kernel_VD.astype(jnp.bfloat16)  # what is multiplied
    expected_totals, expected_gradients = oracle(hidden_ND, rounded, targets_N, weights_N, 0.1, 1.0, 1.0)
    # Products of bfloat16 numbers are exact in float32: the totals know of no rounding but the inputs'.
    np.testing.assert_allclose([float(total) for total in totals], expected_totals, rtol=2e-6)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    assert_near(gradients, expected_gradients, 2**-7)


def test_kernel_gradient_is_summed_in_float32_over_bfloat16_chunks():
    # 2,000 equal tokens, one a chunk: in bfloat16 the sum would stop growing at 256 times a term.
    hidden_ND, targets_N, weights_N = jnp.ones((2000, 1)), jnp.zeros(2000, jnp.int32), jnp.ones(2000)
    kernel_VD = jnp.zeros((2, 1), jnp.bfloat16)
    _, gradients = run((hidden_ND, kernel_VD, targets_N, weights_N), chunk_tokens=1, z_loss=0.0)
    assert gradients[1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradients[1], np.float32), [[-1000], [1000]])


def test_remat_and_microbatches_add_up_to_the_whole():
    hidden_ND, kernel_VD, targets_N, weights_N = make_arguments(tokens=36)

    def loss(kernel_VD, batch):
        nll, z, _ = jax.checkpoint(partial(losses.cross_entropy, chunk_tokens=5, z_loss=0.1))(
            batch[0] @ mixing, kernel_VD, *batch[1:]
        )
        return nll + z

    @jax.jit
    def accumulate(kernel_VD, batches):
        def step(total, batch):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(kernel_VD, batch)), None

        return jax.lax.scan(step, (jnp.zeros(()), jnp.zeros_like(kernel_VD)), batches)[0]

    mixing = jnp.asarray(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)) / 4, jnp.float32)
    batches = jax.tree.map(lambda x: x.reshape(3, 12, *x.shape[1:]), (hidden_ND, targets_N, weights_N))
    value, gradient = accumulate(kernel_VD, batches)
    totals, gradients = oracle(np.asarray(hidden_ND, np.float64) @ np.asarray(mixing), kernel_VD, targets_N, weights_N, 0.1, 1, 1)
    np.testing.assert_allclose(value, totals[0] + totals[1], rtol=2e-6)
    assert_near([gradient], [gradients[1]], 3e-6)


@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_weights_of_zero_give_zeros_whatever_the_targets(chunk_tokens):
    hidden_ND, kernel_VD, targets_N, weights_N = make_arguments()
    totals, gradients = run((hidden_ND, kernel_VD, targets_N * 0 - 100, weights_N * 0), chunk_tokens=chunk_tokens, z_loss=0.1)
    assert [float(total) for total in totals] == [0, 0, 0]
    assert not np.any(gradients[0]) and not np.any(gradients[1])


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


def test_devices_add_up_the_kernel_gradient_once_and_agree_with_one_device():
    tokens, width, vocab, shards = 64, 8, 32, 4
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec("tensor")))
    arguments = make_arguments(tokens, width, vocab)

    def loss(hidden_ND, kernel_VD, targets_N, weights_N):
        nll, z, _ = losses.cross_entropy(hidden_ND, kernel_VD, targets_N, weights_N, chunk_tokens=4, z_loss=0.0, shards=shards)
        return nll + z

    step = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(rows, split, rows, rows), out_shardings=(rows, split))
    assert_near(step(*arguments), oracle(*arguments, 0.0, 1.0, 1.0)[1][:2], 3e-6)
    text = step.lower(*arguments).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    kernel_sum = re.compile(rf"f32\[{vocab // 2},{width}\]\S* all-reduce\(")
    assert len(kernel_sum.findall(text)) == len(kernel_sum.findall(entry)) == 1
    assert "while(" in entry
