"""Cross-entropy and log-probabilities of a vocabulary projection, without all of its logits at once.

Letters: N tokens, C tokens of one chunk, D width, V vocabulary.

    logits = hidden kernel^T + bias        log Z = logsumexp(logits)        log p = logits - log Z
    nll = -log p[target]
    penalty = z_loss (log Z)^2 + label_smoothing (mean over V of -log p, - nll)

The first penalty keeps the logits near 0 (Chowdhery et al. 2022, arXiv:2204.02311, section 5). With the second, of weight e,
nll + penalty is (1 - e) nll + e (cross-entropy to the uniform distribution), so the model gains nothing by certainty (Szegedy et
al. 2016, arXiv:1512.00567, section 7). nll alone stays what perplexity is made of.

The logits of N tokens are by far the largest array of a small model's step. Here a chunk of tokens makes its logits, uses them
up at once for the loss and for the gradients, and drops them; the backward pass only scales what is there already. Of `log_probs` the
forward pass cannot know with what each token's gradient will be multiplied, so that its backward pass makes the logits again.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.ops import vocabulary


class Totals(NamedTuple):
    """Float32 sums over tokens, each times its weight; minimize nll + penalty. `correct` has no gradient."""

    nll: jax.Array
    penalty: jax.Array
    correct: jax.Array


class _Inputs(NamedTuple):
    """The arrays of `cross_entropy`, or their gradients. Targets have none."""

    hidden_ND: jax.Array
    kernel_VD: jax.Array
    bias_V: jax.Array | None
    targets_N: Any
    weights_N: jax.Array


class _Pass(NamedTuple):
    """What one pass over the tokens gives. gradients: float32, of hidden_ND, kernel_VD and bias_V; None if not asked for."""

    totals: Totals
    nll_N: jax.Array
    penalty_N: jax.Array
    gradients: Any


class _How(NamedTuple):
    """The static arguments of `cross_entropy`."""

    chunk_tokens: int
    z_loss: float
    label_smoothing: float


def cross_entropy(
    hidden_ND: jax.Array,
    kernel_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    chunk_tokens: int,
    z_loss: float,
    label_smoothing: float = 0.0,
) -> Totals:
    """Totals(nll, penalty, correct): float32 sums over tokens, each times its weight; minimize nll + penalty.

    `penalty` includes its coefficients `z_loss` and `label_smoothing`. `correct` counts the tokens whose likeliest next token
    is the target and has no gradient. Logits are float32 whatever the dtype of hidden_ND, and [C, V] of them exist at once,
    C = chunk_tokens; 0 makes all [N, V] and leaves the gradient to autodiff.
    A target outside the vocabulary makes nll NaN, unless its weight is 0. Divide by the summed weights at the very end, not
    here: chunks, micro-batches and devices hold different numbers of tokens.
    """
    inputs = _Inputs(hidden_ND, kernel_VD, bias_V, targets_N, weights_N)
    how = _How(chunk_tokens, z_loss, label_smoothing)
    return _chunked(inputs, how) if chunk_tokens else _plain(inputs, how)


def _plain(inputs: _Inputs, how: _How) -> Totals:
    hidden_ND, kernel_VD, bias_V, targets_N, weights_N = inputs
    logits_NV = vocabulary.logits(hidden_ND, kernel_VD, bias_V)
    log_z_N = jax.nn.logsumexp(logits_NV, axis=-1)
    nll_N = log_z_N - jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1, mode="clip")[:, 0]
    penalty_N = how.z_loss * log_z_N**2
    if how.label_smoothing:
        penalty_N += how.label_smoothing * (jnp.mean(log_z_N[:, None] - logits_NV, axis=-1) - nll_N)
    nll_N = _refuse(nll_N, targets_N, weights_N, kernel_VD.shape[0])
    correct = jax.lax.stop_gradient(jnp.sum(weights_N * (jnp.argmax(logits_NV, axis=-1) == targets_N)))
    return Totals(jnp.sum(weights_N * nll_N), jnp.sum(weights_N * penalty_N), correct)


def _refuse(nll_N: jax.Array, targets_N: jax.Array, weights_N: jax.Array, vocab_size: int) -> jax.Array:
    """nll_N with NaN where a target that counts is not in the vocabulary: a wrong tokenizer must not look like a high loss."""
    return jnp.where((weights_N == 0) | ((targets_N >= 0) & (targets_N < vocab_size)), nll_N, jnp.nan)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _chunked(inputs: _Inputs, how: _How) -> Totals:
    return _scan(inputs, how, None).totals


def _forward(inputs: _Inputs, how: _How) -> tuple[Totals, tuple[_Inputs, _Pass]]:
    done = _scan(inputs, how, (1.0, 1.0))
    return done.totals, (inputs, done)


def _backward(how: _How, residuals: tuple[_Inputs, _Pass], cotangents: Totals) -> tuple[_Inputs]:
    inputs, done = residuals
    dnll, dpenalty = cotangents.nll, cotangents.penalty

    def scale() -> Any:
        return jax.tree.map(lambda x: x * dnll, done.gradients)

    def again() -> Any:
        return _scan(inputs, how, (dnll, dpenalty)).gradients

    # The forward pass made the gradient of nll + penalty. Who weighs the two differently pays for a second pass.
    gradients = jax.lax.cond(dnll == dpenalty, scale, again) if how.z_loss or how.label_smoothing else scale()
    dhidden_ND, dkernel_VD, dbias_V = jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, inputs[:3])
    dweights_N = (dnll * done.nll_N + dpenalty * done.penalty_N).astype(inputs.weights_N.dtype)
    return (_Inputs(dhidden_ND, dkernel_VD, dbias_V, None, dweights_N),)


_chunked.defvjp(_forward, _backward)


def _scan(inputs: _Inputs, how: _How, cotangents: tuple | None) -> _Pass:
    """One pass over the chunks. `cotangents` (of nll and penalty) asks for the gradients."""
    hidden_ND, kernel_VD, bias_V, targets_N, weights_N = inputs
    cut, join = partial(vocabulary.cut, how.chunk_tokens), partial(vocabulary.join, hidden_ND.shape[0])

    def body(carry: tuple, chunk: tuple) -> tuple[tuple, tuple]:
        totals, sums = carry
        hidden_CD, targets_C, weights_C = chunk
        *losses, dlogits_CV = _chunk(_Inputs(hidden_CD, kernel_VD, bias_V, targets_C, weights_C), how, cotangents)
        totals = Totals(*[total + jnp.sum(weights_C * x) for total, x in zip(totals, losses, strict=True)])
        if dlogits_CV is None:
            return (totals, None), (*losses[:2], None)
        dkernel_VD, dbias_V = sums
        if bias_V is not None:
            dbias_V += dlogits_CV.sum(0)
        dhidden_CD, more_VD = vocabulary.through(dlogits_CV, hidden_CD, kernel_VD)
        return (totals, (dkernel_VD + more_VD, dbias_V)), (*losses[:2], dhidden_CD)

    zero = jnp.zeros((), jnp.float32)
    sums = None if cotangents is None else jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (kernel_VD, bias_V))
    chunked = (cut(hidden_ND), cut(targets_N), cut(weights_N))
    (totals, sums), (nll, penalty, dhidden) = jax.lax.scan(body, (Totals(zero, zero, zero), sums), chunked)
    gradients = None if sums is None else (join(dhidden), *sums)
    return _Pass(totals, join(nll), join(penalty), gradients)


def _chunk(inputs: _Inputs, how: _How, cotangents: tuple | None) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """(nll_C, penalty_C, correct_C, dlogits_CV). Only reductions over V, no gather: V may be spread over devices."""
    hidden_CD, kernel_VD, bias_V, targets_C, weights_C = inputs
    logits_CV = vocabulary.logits(hidden_CD, kernel_VD, bias_V)
    ids_V = jnp.arange(logits_CV.shape[-1])
    is_target_CV = ids_V == targets_C[:, None]
    top_C1 = logits_CV.max(-1, keepdims=True)
    exp_CV = jnp.exp(logits_CV - top_C1)
    sum_C1 = exp_CV.sum(-1, keepdims=True)
    log_z_C1 = top_C1 + jnp.log(sum_C1)
    target_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=-1)
    nll_C = _refuse(log_z_C1[:, 0] - target_C, targets_C, weights_C, ids_V.size)
    penalty_C = how.z_loss * log_z_C1[:, 0] ** 2
    if how.label_smoothing:  # log Z cancels between the two cross-entropies
        penalty_C += how.label_smoothing * (target_C - logits_CV.mean(-1))
    # The first of equal maxima, as argmax; a plain minimum is the faster reduction.
    first_C = jnp.min(jnp.where(logits_CV == top_C1, ids_V, ids_V.size), axis=-1)
    losses = nll_C, penalty_C, (first_C == targets_C).astype(jnp.float32)
    if cotangents is None:
        return *losses, None
    dnll, dpenalty = cotangents
    # d nll = p - 1[target], d penalty = 2 z_loss log Z p + e (1[target] - 1/V), with p = exp / sum.
    smooth = how.label_smoothing * dpenalty
    p_factor_C1 = (dnll + 2 * how.z_loss * dpenalty * log_z_C1) / sum_C1
    dlogits_CV = exp_CV * p_factor_C1 - jnp.where(is_target_CV, dnll - smooth, 0)
    if how.label_smoothing:
        dlogits_CV -= smooth / ids_V.size
    return *losses, weights_C[:, None] * dlogits_CV


class _Scored(NamedTuple):
    """The arrays of `log_probs`, or their gradients. Targets have none."""

    hidden_ND: jax.Array
    kernel_VD: jax.Array
    bias_V: jax.Array | None
    targets_N: Any


def log_probs(
    hidden_ND: jax.Array, kernel_VD: jax.Array, targets_N: jax.Array, *, bias_V: jax.Array | None = None, chunk_tokens: int
) -> jax.Array:
    """float32 [N], in nats: log p of each target. Logits are float32, and [C, V] of them exist at once, C = chunk_tokens.

    chunk_tokens = 0 makes all [N, V] and leaves the gradient to autodiff. A target outside the vocabulary gives NaN, and what it adds to
    a gradient is finite: who has no use for it takes it out by `jnp.where`. The backward pass makes every chunk of logits again. Has no
    gradient of the gradient and no forward mode.
    """
    inputs = _Scored(hidden_ND, kernel_VD, bias_V, targets_N)
    if chunk_tokens:
        return _score_chunks(inputs, chunk_tokens)
    return _score(vocabulary.logits(hidden_ND, kernel_VD, bias_V), targets_N)[0]


def _score(logits_CV: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log p of the targets, log Z), [C] each. Only reductions over V, no gather: V may be spread over devices."""
    ids_V = jnp.arange(logits_CV.shape[-1])
    log_z_C = jax.nn.logsumexp(logits_CV, axis=-1)
    target_C = jnp.sum(jnp.where(ids_V == targets_C[:, None], logits_CV, 0), axis=-1)
    known_C = (targets_C >= 0) & (targets_C < ids_V.size)
    return jnp.where(known_C, target_C - log_z_C, jnp.nan), log_z_C


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _score_chunks(inputs: _Scored, chunk_tokens: int) -> jax.Array:
    return _score_forward(inputs, chunk_tokens)[0]


def _score_forward(inputs: _Scored, chunk_tokens: int) -> tuple[jax.Array, tuple[_Scored, jax.Array]]:
    hidden_ND, kernel_VD, bias_V, targets_N = inputs

    def body(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden_CD, targets_C = chunk
        return None, _score(vocabulary.logits(hidden_CD, kernel_VD, bias_V), targets_C)

    _, found = jax.lax.scan(body, None, (vocabulary.cut(chunk_tokens, hidden_ND), vocabulary.cut(chunk_tokens, targets_N)))
    log_p_N, log_z_N = (vocabulary.join(hidden_ND.shape[0], x) for x in found)
    return log_p_N, (inputs, log_z_N)


def _score_backward(chunk_tokens: int, residuals: tuple[_Scored, jax.Array], dlog_p_N: jax.Array) -> tuple[_Scored]:
    (hidden_ND, kernel_VD, bias_V, targets_N), log_z_N = residuals

    def body(sums: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
        dkernel_VD, dbias_V = sums
        hidden_CD, targets_C, log_z_C, dlog_p_C = chunk
        p_CV = jnp.exp(vocabulary.logits(hidden_CD, kernel_VD, bias_V) - log_z_C[:, None])
        # d log p[target] = 1[target] - p.
        is_target_CV = jnp.arange(kernel_VD.shape[0]) == targets_C[:, None]
        dlogits_CV = dlog_p_C[:, None] * (is_target_CV - p_CV)
        dbias_V = None if dbias_V is None else dbias_V + dlogits_CV.sum(0)
        dhidden_CD, more_VD = vocabulary.through(dlogits_CV, hidden_CD, kernel_VD)
        return (dkernel_VD + more_VD, dbias_V), dhidden_CD

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (kernel_VD, bias_V))
    chunked = [vocabulary.cut(chunk_tokens, x) for x in (hidden_ND, targets_N, log_z_N, dlog_p_N)]
    (dkernel_VD, dbias_V), dhidden = jax.lax.scan(body, zeros, tuple(chunked))
    gradients = vocabulary.join(hidden_ND.shape[0], dhidden), dkernel_VD, dbias_V
    dhidden_ND, dkernel_VD, dbias_V = jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, residuals[0][:3])
    return (_Scored(dhidden_ND, dkernel_VD, dbias_V, None),)


_score_chunks.defvjp(_score_forward, _score_backward)
