"""Beam search (Sutskever et al. 2014, arXiv:1409.3215, section 3.2): the likeliest continuation among the few that are kept.

    score = sum of log p(token) / length ** length_penalty

where length counts the new tokens, the stop token included. Of the `num_beams` live beams' continuations the (1 + stop ids) x num_beams
likeliest are looked at, so that num_beams of them go on. One that ends, by a stop token or because nothing more fits, is kept if it is
among the first num_beams of these and among the num_beams best that ended so far. The semantics are those of Hugging Face transformers
5.23. One compiled program; how many tokens are asked for is data. Letters: B prompts, N beams, C candidates, L new tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decode import batching, network
from jaxllm.decode.generate import strip
from jaxllm.decode.network import Network
from jaxllm.types import Model, Params


@dataclass(frozen=True)
class Settings:
    """How to search.

    length_penalty: above 0 makes long texts better, below 0 short ones; 0 compares sums. early_stopping: True ends with the first
    num_beams texts that ended; False when no live beam, at its present length, scores better than the worst of these.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams = {self.num_beams}.\n  Accepted: 1 (greedy) or more.\n  Change num_beams.")


class Found(NamedTuple):
    """The best continuation of a prompt, without its stop token, and its score."""

    ids: list[int]
    score: float


class Beams(NamedTuple):
    """So many texts a prompt, best first. Scores are -inf where there is none."""

    tokens_BNL: jax.Array
    scores_BN: jax.Array
    counts_BN: jax.Array


class Rules(NamedTuple):
    """What decides the search besides the model, as arrays: other values compile nothing. limits_B: new tokens a prompt may get."""

    length_penalty: Any
    early_stopping: Any
    limits_B: Any
    stop_ids: Any


class State(NamedTuple):
    """What the loop carries. live: `scores` are sums of log p, all have `step` tokens. ended: `scores` are divided by the length."""

    cache: Any
    live: Beams
    ended: Beams
    step: jax.Array
    done_B: jax.Array


def search(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    vocab_size: int,
    start_id: int | None = None,
) -> list[Found]:
    """The best continuation found of each prompt; arguments and errors are those of `generate.generate`."""
    network.check(model, prompts, max_new_tokens)
    limits = network.limits(model, prompts, max_new_tokens)
    out = [Found([], 0.0)] * len(prompts)
    lengths, most_seqs = [len(prompt) for prompt in prompts], max(1, batching.MOST_SEQS // settings.num_beams)
    for chosen in batching.group(lengths, most_seqs):
        mine = [prompts[index] for index in chosen]
        batch = batching.pad(mine, batching.streams(mine), [limits[index] for index in chosen], model.config.context_tokens)
        parts = network.make(model, batch, vocab_size, start_id)
        stops = np.array(stop_ids, np.int32)
        rules = Rules(np.float32(settings.length_penalty), np.bool_(settings.early_stopping), batch.limits_B, stops)
        best = jax.device_get(_search(parts, settings.num_beams, params, batch, rules))
        for row, index in enumerate(chosen):
            ids = best.tokens_BNL[row, 0, : best.counts_BN[row, 0]].tolist()
            out[index] = Found(strip(ids, stop_ids), float(best.scores_BN[row, 0]))
    return out


@partial(jax.jit, static_argnames=("parts", "beams"))
def _search(parts: Network, beams: int, params: Params, prompts: batching.Prompts, rules: Rules) -> Beams:
    """The texts that ended, best first."""
    rows = prompts.lengths_B.size
    logits_BV, cache, _ = network.start(parts, params, prompts)
    none = Beams(
        jnp.zeros((rows, beams, parts.cache_tokens), jnp.int32),
        jnp.full((rows, beams), -jnp.inf),
        jnp.zeros((rows, beams), jnp.int32),
    )
    state = State(
        jax.tree.map(lambda array: jnp.repeat(array, beams, axis=0), cache),
        # All beams are the prompt, of which one is enough.
        none._replace(scores_BN=none.scores_BN.at[:, 0].set(0.0)),
        none,
        jnp.zeros((), jnp.int32),
        rules.limits_B == 0,
    )
    state = _advance(rules, state, jnp.repeat(logits_BV, beams, axis=0))

    def body(state: State) -> State:
        last_R1 = jax.lax.dynamic_index_in_dim(state.live.tokens_BNL, state.step - 1, axis=2).reshape(-1, 1)
        running_R = jnp.repeat(~state.done_B, beams).astype(jnp.int32)
        logits_RV, cache = parts.decode(params, last_R1, running_R, state.cache)
        return _advance(rules, state._replace(cache=cache), logits_RV[:, : parts.vocab_size])

    return jax.lax.while_loop(lambda state: ~jnp.all(state.done_B), body, state).ended


def _advance(rules: Rules, state: State, logits_RV: jax.Array) -> State:
    """One more token: R = B x N rows of logits. A prompt that is done keeps everything as it is."""
    (rows, beams), vocab, step = state.live.scores_BN.shape, logits_RV.shape[1], state.step + 1
    sums_BNV = state.live.scores_BN[:, :, None] + jax.nn.log_softmax(logits_RV.astype(jnp.float32)).reshape(rows, beams, vocab)
    count = min(max(2, 1 + rules.stop_ids.size) * beams, beams * vocab)
    sums_BC, places_BC = jax.lax.top_k(sums_BNV.reshape(rows, beams * vocab), count)
    parents_BC, tokens_BC = places_BC // vocab, places_BC % vocab
    ends_BC = jnp.isin(tokens_BC, rules.stop_ids) | (step >= rules.limits_B)[:, None]

    grown_BCL = jnp.take_along_axis(state.live.tokens_BNL, parents_BC[:, :, None], axis=1)
    grown_BCL = jax.lax.dynamic_update_index_in_dim(grown_BCL, tokens_BC, state.step, axis=2)
    candidates = Beams(grown_BCL, sums_BC, jnp.full_like(tokens_BC, step))

    first_C, length = jnp.arange(count) < beams, step**rules.length_penalty
    scores_BC = jnp.where(ends_BC & first_C, sums_BC / length, -jnp.inf)
    ending = candidates._replace(scores_BN=scores_BC)
    both = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=1), state.ended, ending)
    ended, _ = _best(both, beams)
    live, order_BN = _best(candidates._replace(scores_BN=jnp.where(ends_BC, -jnp.inf, sums_BC)), beams)

    full_B = jnp.all(ended.scores_BN > -jnp.inf, axis=1)
    hopeless_B = live.scores_BN[:, 0] / length <= ended.scores_BN[:, -1]
    done_B = (full_B & (rules.early_stopping | hopeless_B)) | (live.scores_BN[:, 0] == -jnp.inf)

    # A prompt that was done before keeps its beams.
    order_BN = jnp.take_along_axis(parents_BC, order_BN, axis=1)
    order_BN = jnp.where(state.done_B[:, None], jnp.arange(beams), order_BN)
    order_R = (jnp.arange(rows)[:, None] * beams + order_BN).reshape(-1)

    def keep(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(state.done_B.reshape(-1, *[1] * (old.ndim - 1)), old, new)

    return State(
        jax.tree.map(lambda array: array[order_R], state.cache),
        jax.tree.map(keep, state.live, live),
        jax.tree.map(keep, state.ended, ended),
        step,
        state.done_B | done_B,
    )


def _best(beams: Beams, count: int) -> tuple[Beams, jax.Array]:
    """The `count` best ones, best first, and where they were, [B, N]."""
    scores_BN, order_BN = jax.lax.top_k(beams.scores_BN, count)
    tokens_BNL = jnp.take_along_axis(beams.tokens_BNL, order_BN[:, :, None], axis=1)
    return Beams(tokens_BNL, scores_BN, jnp.take_along_axis(beams.counts_BN, order_BN, axis=1)), order_BN
