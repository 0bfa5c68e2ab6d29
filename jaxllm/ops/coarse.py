"""A distribution over a vocabulary as the log-probabilities of K tokens and of all others together, and the divergence of two of these.

Letters: N tokens, C tokens of one chunk, D width, V vocabulary, K tokens that are told apart, O = K + 1 outcomes: these, and the rest.

The rest is an outcome of its own. So p and q are distributions of the same O outcomes, their divergence is 0 where they are equal and
never below 0, and by the log-sum inequality it is at most that of the whole distributions, which it is for K = V. Cutting the K
probabilities off, or scaling them up to a sum of 1, has none of this.

    forward KL   sum over O of p (log p - log q)     Hinton et al. 2015, arXiv:1503.02531: the cross-entropy to p, less a constant
    reverse KL   sum over O of q (log q - log p)     Gu et al. 2023, arXiv:2306.08543, eq. 1; Agarwal et al. 2023, arXiv:2306.13649

p is the teacher's and has no gradient. With a temperature t both are of logits / t; gradients then are 1 / t^2 as large, which who adds
them to another loss makes up for (Hinton et al., section 2).

Logits are made and used up a chunk of tokens at a time, and again in the backward pass, as in `losses.log_probs`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.ops import vocabulary

# log p of the rest where all tokens are told apart: low enough that p is 0, finite, so that p log p is 0, too.
NOTHING = -1e30


class Top(NamedTuple):
    """ids_NK: int32, the likeliest tokens, most likely first. log_p_NO: float32, in nats, of these and then of the rest."""

    ids_NK: jax.Array
    log_p_NO: jax.Array


class Scores(NamedTuple):
    """float32 each: log_q_NO at the temperature, in nats, of K tokens and then of the rest; log_q_N of the target, and correct_N, 1 where
    that is the likeliest token, both at temperature 1. `correct_N` has no gradient."""

    log_q_NO: jax.Array
    log_q_N: jax.Array
    correct_N: jax.Array


class _Inputs(NamedTuple):
    """The arrays of `scores`, or their gradients. Integers have none."""

    hidden_ND: jax.Array
    kernel_VD: jax.Array
    bias_V: jax.Array | None
    ids_NK: Any
    targets_N: Any


class _Sums(NamedTuple):
    """[N] each: log-sums of exp of all logits, of logits / temperature, and of those of the rest (-inf if there is none)."""

    whole: jax.Array
    scaled: jax.Array
    rest: jax.Array


def top(
    hidden_ND: jax.Array, kernel_VD: jax.Array, tokens: int, *, bias_V: jax.Array | None, temperature: float, chunk_tokens: int
) -> Top:
    """The K = `tokens` likeliest of each distribution. [C, V] logits exist at once, C = chunk_tokens; all if that is 0."""

    def one(hidden_CD: jax.Array) -> Top:
        scaled_CV = vocabulary.logits(hidden_CD, kernel_VD, bias_V) / temperature
        ids_CK = jax.lax.top_k(scaled_CV, tokens)[1]
        return Top(ids_CK, _outcomes(scaled_CV, ids_CK)[0])

    if not chunk_tokens:
        return one(hidden_ND)
    return Top(*(vocabulary.join(hidden_ND.shape[0], x) for x in jax.lax.map(one, vocabulary.cut(chunk_tokens, hidden_ND))))


def scores(
    hidden_ND: jax.Array,
    kernel_VD: jax.Array,
    ids_NK: jax.Array,
    targets_N: jax.Array,
    *,
    bias_V: jax.Array | None,
    temperature: float,
    chunk_tokens: int,
) -> Scores:
    """What a model says of K tokens and the rest, and of the target. [C, V] float32 logits exist at once, C = chunk_tokens.

    chunk_tokens = 0 makes all [N, V] and leaves the gradient to autodiff. A target outside the vocabulary gives NaN. The ids of a row of
    ids_NK are distinct and in the vocabulary; else its numbers mean nothing, and are finite. Has no gradient of the gradient and no forward
    mode.
    """
    inputs = _Inputs(hidden_ND, kernel_VD, bias_V, ids_NK, targets_N)
    if chunk_tokens:
        return _chunked(inputs, temperature, chunk_tokens)
    return _score(inputs, temperature)[0]


def forward_kl(log_p_NO: jax.Array, log_q_NO: jax.Array) -> jax.Array:
    """[N], in nats: KL(p, q)."""
    return jnp.sum(jnp.exp(log_p_NO) * (log_p_NO - log_q_NO), axis=-1)


def reverse_kl(log_p_NO: jax.Array, log_q_NO: jax.Array) -> jax.Array:
    """[N], in nats: KL(q, p)."""
    return jnp.sum(jnp.exp(log_q_NO) * (log_q_NO - log_p_NO), axis=-1)


# By the value of distill.kl.
DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl}


def _are_named(ids_CK: jax.Array, size: int) -> jax.Array:
    """bool [C, V]: whether a token is one of the K."""
    rows_C1 = jnp.arange(ids_CK.shape[0])[:, None]
    return jnp.zeros((ids_CK.shape[0], size), bool).at[rows_C1, ids_CK].set(True)


def _outcomes(scaled_CV: jax.Array, ids_CK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log p [C, O], log-sums of all and of the rest [C])."""
    whole_C = jax.nn.logsumexp(scaled_CV, axis=-1)
    rest_C = jax.nn.logsumexp(jnp.where(_are_named(ids_CK, scaled_CV.shape[-1]), -jnp.inf, scaled_CV), axis=-1)
    named_CK = jnp.take_along_axis(scaled_CV, ids_CK, axis=-1, mode="clip") - whole_C[:, None]
    last_C1 = jnp.where(rest_C > -jnp.inf, rest_C - whole_C, NOTHING)[:, None]
    return jnp.concatenate([named_CK, last_C1], axis=-1), whole_C, rest_C


def _score(inputs: _Inputs, temperature: float) -> tuple[Scores, _Sums]:
    hidden_CD, kernel_VD, bias_V, ids_CK, targets_C = inputs
    logits_CV = vocabulary.logits(hidden_CD, kernel_VD, bias_V)
    log_q_CO, scaled_C, rest_C = _outcomes(logits_CV / temperature, ids_CK)
    whole_C = jax.nn.logsumexp(logits_CV, axis=-1)
    target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1, mode="clip")[:, 0] - whole_C
    known_C = (targets_C >= 0) & (targets_C < kernel_VD.shape[0])
    correct_C = jax.lax.stop_gradient((jnp.argmax(logits_CV, axis=-1) == targets_C).astype(jnp.float32))
    return Scores(log_q_CO, jnp.where(known_C, target_C, jnp.nan), correct_C), _Sums(whole_C, scaled_C, rest_C)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _chunked(inputs: _Inputs, temperature: float, chunk_tokens: int) -> Scores:
    return _forward(inputs, temperature, chunk_tokens)[0]


def _forward(inputs: _Inputs, temperature: float, chunk_tokens: int) -> tuple[Scores, tuple[_Inputs, _Sums]]:
    hidden_ND, kernel_VD, bias_V, ids_NK, targets_N = inputs

    def one(chunk: tuple) -> tuple[Scores, _Sums]:
        hidden_CD, ids_CK, targets_C = chunk
        return _score(_Inputs(hidden_CD, kernel_VD, bias_V, ids_CK, targets_C), temperature)

    found = jax.lax.map(one, tuple(vocabulary.cut(chunk_tokens, x) for x in (hidden_ND, ids_NK, targets_N)))
    found, sums = jax.tree.map(partial(vocabulary.join, hidden_ND.shape[0]), found)
    return found, (inputs, sums)


def _backward(temperature: float, chunk_tokens: int, residuals: tuple[_Inputs, _Sums], given: Scores) -> tuple[_Inputs]:
    (hidden_ND, kernel_VD, bias_V, ids_NK, targets_N), sums_N = residuals

    def body(sums: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
        dkernel_VD, dbias_V = sums
        hidden_CD, ids_CK, targets_C, found, dlog_q_CO, dlog_q_C = chunk
        logits_CV = vocabulary.logits(hidden_CD, kernel_VD, bias_V)
        dlogits_CV = _through_outcomes(logits_CV / temperature, ids_CK, found, dlog_q_CO) / temperature
        # d log q[target] = 1[target] - q.
        is_target_CV = jnp.arange(logits_CV.shape[-1]) == targets_C[:, None]
        dlogits_CV += dlog_q_C[:, None] * (is_target_CV - jnp.exp(logits_CV - found.whole[:, None]))
        dbias_V = None if dbias_V is None else dbias_V + dlogits_CV.sum(0)
        dhidden_CD, more_VD = vocabulary.through(dlogits_CV, hidden_CD, kernel_VD)
        return (dkernel_VD + more_VD, dbias_V), dhidden_CD

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (kernel_VD, bias_V))
    wanted = (hidden_ND, ids_NK, targets_N, sums_N, given.log_q_NO, given.log_q_N)
    (dkernel_VD, dbias_V), dhidden = jax.lax.scan(body, zeros, jax.tree.map(partial(vocabulary.cut, chunk_tokens), wanted))
    gradients = vocabulary.join(hidden_ND.shape[0], dhidden), dkernel_VD, dbias_V
    dhidden_ND, dkernel_VD, dbias_V = jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, residuals[0][:3])
    return (_Inputs(dhidden_ND, dkernel_VD, dbias_V, None, None),)


_chunked.defvjp(_forward, _backward)


def _through_outcomes(scaled_CV: jax.Array, ids_CK: jax.Array, sums: _Sums, dlog_q_CO: jax.Array) -> jax.Array:
    """[C, V]: the gradient of logits / temperature.

    d log q[k] = 1[k] - q for one of the K, d log q[rest] = q / q[rest] where a token is not one of them, - q.
    """
    named_CV = _are_named(ids_CK, scaled_CV.shape[-1])
    # exp of what is not in the rest might be infinite, and that times 0 no number.
    in_rest_CV = jnp.exp(jnp.where(named_CV, -jnp.inf, scaled_CV - jnp.where(sums.rest > -jnp.inf, sums.rest, 0.0)[:, None]))
    dscaled_CV = dlog_q_CO[:, -1:] * in_rest_CV - dlog_q_CO.sum(-1, keepdims=True) * jnp.exp(scaled_CV - sums.scaled[:, None])
    return dscaled_CV.at[jnp.arange(ids_CK.shape[0])[:, None], ids_CK].add(dlog_q_CO[:, :-1])
