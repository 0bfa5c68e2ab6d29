"""Cross-entropy of a vocabulary projection, without all of its logits at once.

Letters: N tokens, C tokens of one chunk, D width, V vocabulary.

    nll = log Z - logit[target]        z = z_loss * (log Z)^2        log Z = logsumexp(logits)

z keeps the logits near 0 (Chowdhery et al. 2022, arXiv:2204.02311, section 5). The logits of N tokens are by far the largest
array of a small model's step. Here a chunk of tokens makes its logits, uses them up at once for the loss, for d hidden and for
d kernel, and drops them; the backward pass only scales what is there already.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Totals = tuple[jax.Array, jax.Array, jax.Array]


class _Pass(NamedTuple):
    """What one pass over the tokens gives: the three totals, the loss of each token, and the gradients (None if not asked for)."""

    totals: Totals
    nll_N: jax.Array
    z_N: jax.Array
    dhidden_ND: Any
    dkernel_VD: Any


class _How(NamedTuple):
    """The static arguments of `cross_entropy`."""

    chunk_tokens: int
    z_loss: float
    shards: int


def cross_entropy(
    hidden_ND: jax.Array,
    kernel_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    *,
    chunk_tokens: int,
    z_loss: float,
    shards: int = 1,
) -> Totals:
    """(nll_total, z_total, correct_total): float32 sums over tokens, each times its weight.

    `z_total` includes the coefficient `z_loss`; minimize nll_total + z_total. `correct_total` counts the tokens whose
    likeliest next token is the target and has no gradient. Logits are float32 whatever the dtype of hidden_ND, and [C, V]
    of them exist at once, C = chunk_tokens; 0 makes all [N, V] and leaves the gradient to autodiff.
    `shards` says that the tokens are spread over so many devices, in equal runs. Each device then has a chunk of its own and
    sums its own d kernel, and they add up once at the end; otherwise the compiler adds them up once a chunk.
    A target outside the vocabulary makes nll_total NaN, unless its weight is 0. Divide by the summed weights at the very
    end, not here: chunks, micro-batches and devices hold different numbers of tokens.
    """
    if chunk_tokens == 0:
        return _plain(hidden_ND, kernel_VD, targets_N, weights_N, z_loss)
    return _chunked(hidden_ND, kernel_VD, targets_N, weights_N, _How(chunk_tokens, z_loss, shards))


def _plain(hidden_ND: jax.Array, kernel_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array, z_loss: float) -> Totals:
    logits_NV = _logits(hidden_ND, kernel_VD)
    log_z_N = jax.nn.logsumexp(logits_NV, axis=-1)
    nll_N = log_z_N - jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1, mode="clip")[:, 0]
    nll_N = _refuse(nll_N, targets_N, weights_N, kernel_VD.shape[0])
    correct_total = jax.lax.stop_gradient(jnp.sum(weights_N * (jnp.argmax(logits_NV, axis=-1) == targets_N)))
    return jnp.sum(weights_N * nll_N), jnp.sum(weights_N * z_loss * log_z_N**2), correct_total


def _logits(hidden_ND: jax.Array, kernel_VD: jax.Array) -> jax.Array:
    return jnp.einsum("nd,vd->nv", hidden_ND, kernel_VD.astype(hidden_ND.dtype), preferred_element_type=jnp.float32)


def _refuse(nll_N: jax.Array, targets_N: jax.Array, weights_N: jax.Array, vocab_size: int) -> jax.Array:
    """nll_N with NaN where a target that counts is not in the vocabulary: a wrong tokenizer must not look like a high loss."""
    return jnp.where((weights_N == 0) | ((targets_N >= 0) & (targets_N < vocab_size)), nll_N, jnp.nan)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden_ND: jax.Array, kernel_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array, how: _How) -> Totals:
    return _scan(hidden_ND, kernel_VD, targets_N, weights_N, how, None).totals


def _forward(
    hidden_ND: jax.Array, kernel_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array, how: _How
) -> tuple[Totals, tuple]:
    done = _scan(hidden_ND, kernel_VD, targets_N, weights_N, how, (1.0, 1.0))
    return done.totals, (hidden_ND, kernel_VD, targets_N, weights_N, done)


def _backward(how: _How, residuals: tuple, cotangents: Totals) -> tuple:
    hidden_ND, kernel_VD, targets_N, weights_N, done = residuals
    dnll, dz, _ = cotangents

    def scale() -> tuple[jax.Array, jax.Array]:
        return done.dhidden_ND * dnll, done.dkernel_VD * dnll

    def again() -> tuple[jax.Array, jax.Array]:
        made = _scan(hidden_ND, kernel_VD, targets_N, weights_N, how, (dnll, dz))
        return made.dhidden_ND, made.dkernel_VD

    # The forward pass made the gradient of nll + z. Who weighs the two differently pays for a second pass.
    dhidden_ND, dkernel_VD = jax.lax.cond(dnll == dz, scale, again) if how.z_loss else scale()
    dweights_N = dnll * done.nll_N + dz * done.z_N
    return dhidden_ND.astype(hidden_ND.dtype), dkernel_VD.astype(kernel_VD.dtype), None, dweights_N.astype(weights_N.dtype)


_chunked.defvjp(_forward, _backward)


def _scan(
    hidden_ND: jax.Array, kernel_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array, how: _How, cotangents: tuple | None
) -> _Pass:
    """One pass over the chunks. `cotangents` (of nll_total and z_total) asks for the gradients, in float32. Letter P: shards."""
    tokens, shards = hidden_ND.shape[0], how.shards
    chunks = max(1, -(-tokens // (how.chunk_tokens * shards)))
    rows = -(-tokens // (chunks * shards)) * shards

    def cut(x_N: jax.Array) -> jax.Array:
        # A chunk is every chunks-th token and not a run of tokens: with the tokens spread over devices each keeps its share.
        padded = jnp.pad(x_N, [(0, rows * chunks - tokens)] + [(0, 0)] * (x_N.ndim - 1))
        return padded.reshape(rows, chunks, *x_N.shape[1:]).swapaxes(0, 1)

    def join(x_chunks: jax.Array) -> jax.Array:
        return x_chunks.swapaxes(0, 1).reshape(rows * chunks, *x_chunks.shape[2:])[:tokens]

    def part(x_CX: jax.Array) -> jax.Array:
        return x_CX.reshape(shards, rows // shards, -1)

    def body(carry: tuple, chunk: tuple) -> tuple[tuple, tuple]:
        totals, dkernel_PVD = carry
        hidden_CD, targets_C, weights_C = chunk
        nll_C, z_C, correct_C, dlogits_CV = _chunk(hidden_CD, kernel_VD, targets_C, weights_C, how.z_loss, cotangents)
        totals = tuple(total + jnp.sum(weights_C * x) for total, x in zip(totals, (nll_C, z_C, correct_C), strict=True))
        if dlogits_CV is None:
            return (totals, None), (nll_C, z_C, None)
        dhidden_CD = jnp.einsum("cv,vd->cd", dlogits_CV, kernel_VD.astype(dlogits_CV.dtype), preferred_element_type=jnp.float32)
        dkernel_PVD += jnp.einsum("pcv,pcd->pvd", part(dlogits_CV), part(hidden_CD), preferred_element_type=jnp.float32)
        return (totals, dkernel_PVD), (nll_C, z_C, dhidden_CD)

    zero = jnp.zeros((), jnp.float32)
    start = ((zero, zero, zero), None if cotangents is None else jnp.zeros((shards, *kernel_VD.shape), jnp.float32))
    (totals, dkernel_PVD), (nll, z, dhidden) = jax.lax.scan(body, start, (cut(hidden_ND), cut(targets_N), cut(weights_N)))
    gradients = (None, None) if dkernel_PVD is None else (join(dhidden), dkernel_PVD.sum(0))
    return _Pass(totals, join(nll), join(z), *gradients)


def _chunk(
    hidden_CD: jax.Array, kernel_VD: jax.Array, targets_C: jax.Array, weights_C: jax.Array, z_loss: float, cotangents: tuple | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """(nll_C, z_C, correct_C, dlogits_CV in hidden's dtype). Only reductions over V, no gather: V may be spread over devices."""
    logits_CV = _logits(hidden_CD, kernel_VD)
    ids_V = jnp.arange(logits_CV.shape[-1])
    is_target_CV = ids_V == targets_C[:, None]
    top_C1 = logits_CV.max(-1, keepdims=True)
    exp_CV = jnp.exp(logits_CV - top_C1)
    sum_C1 = exp_CV.sum(-1, keepdims=True)
    log_z_C1 = top_C1 + jnp.log(sum_C1)
    nll_C = log_z_C1[:, 0] - jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=-1)
    nll_C = _refuse(nll_C, targets_C, weights_C, ids_V.size)
    # The first of equal maxima, as argmax; a plain minimum is the faster reduction.
    first_C = jnp.min(jnp.where(logits_CV == top_C1, ids_V, ids_V.size), axis=-1)
    losses = nll_C, z_loss * log_z_C1[:, 0] ** 2, (first_C == targets_C).astype(jnp.float32)
    if cotangents is None:
        return *losses, None
    dnll, dz = cotangents
    # d nll = p - 1[target], d z = 2 z_loss log Z p, with p = exp / sum.
    p_factor_C1 = (dnll + 2 * z_loss * dz * log_z_C1) / sum_C1
    dlogits_CV = weights_C[:, None] * (exp_CV * p_factor_C1 - jnp.where(is_target_CV, dnll, 0))
    return *losses, dlogits_CV.astype(hidden_CD.dtype)
