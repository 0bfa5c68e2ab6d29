"""Token ids that a model writes behind a prompt: one compiled prefill, then one compiled loop over the new tokens.

Both are compiled once for each (model, settings, bucket of shapes); how many tokens are asked for is data. Letters: B batch,
T prompt length, N new tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decode import batching, network
from jaxllm.decode.kept import Kept
from jaxllm.decode.network import Before, Network
from jaxllm.ops import sampling
from jaxllm.parallel import processes
from jaxllm.types import Model, Params

LARGEST_SEED = 2**32 - 1


class Program(NamedTuple):
    """What is fixed when generation is compiled. Hashable, so static under jit."""

    network: Network
    settings: sampling.Settings


class State(NamedTuple):
    """Everything the loop carries. `tokens_BN[:, :step]` is written; a row's own tokens are its first `counts_B`.

    limits_B and stop_ids do not change: a row is done after so many tokens, or after one of these.
    """

    cache: Any
    tokens_BN: jax.Array
    step: jax.Array
    counts_B: jax.Array
    done_B: jax.Array
    keys_B: jax.Array
    seen_BV: jax.Array
    limits_B: jax.Array
    stop_ids: jax.Array


@partial(jax.jit, static_argnames="program", donate_argnames="before")
def _start(
    program: Program, params: Params, prompts: batching.Prompts, stop_ids: jax.Array, seed: jax.Array, before: Before | None
) -> State:
    """The state after prefill and the first new token."""
    rows = len(prompts.lengths_B)
    logits_BV, cache, seen_BV = network.start(program.network, params, prompts, before)
    key = jax.random.key(seed)
    keys_B = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(prompts.streams_B2)
    state = State(
        cache,
        jnp.zeros((rows, program.network.cache_tokens), jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        prompts.limits_B == 0,
        keys_B,
        seen_BV,
        jnp.asarray(prompts.limits_B),
        stop_ids,
    )
    return _append(program, state, logits_BV)


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def _continue(program: Program, params: Params, state: State, until: jax.Array) -> State:
    """The state after `until` new tokens in all, or as soon as every row is done."""

    def unfinished(state: State) -> jax.Array:
        return (state.step < until) & ~jnp.all(state.done_B)

    def body(state: State) -> State:
        last_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BN, state.step - 1, 1, axis=1)
        # A row that is done appends nothing more to its cache.
        logits_BV, cache = program.network.decode(params, last_B1, (~state.done_B).astype(jnp.int32), state.cache)
        return _append(program, state._replace(cache=cache), logits_BV[:, : program.network.vocab_size])

    return jax.lax.while_loop(unfinished, body, state)


def _append(program: Program, state: State, logits_BV: jax.Array) -> State:
    """Draws one token a row. Its random numbers depend on the row's stream and on how many tokens stand before it, no more."""

    def draw(key: jax.Array, logits_V: jax.Array, seen_V: jax.Array) -> jax.Array:
        return sampling.sample(jax.random.fold_in(key, state.step), logits_V[None], program.settings, seen_V[None])[0]

    tokens_B = jax.vmap(draw)(state.keys_B, logits_BV, state.seen_BV)
    counts_B = state.counts_B + ~state.done_B
    return state._replace(
        tokens_BN=jax.lax.dynamic_update_slice_in_dim(state.tokens_BN, tokens_B[:, None], state.step, axis=1),
        step=state.step + 1,
        counts_B=counts_B,
        done_B=state.done_B | jnp.isin(tokens_B, state.stop_ids) | (counts_B >= state.limits_B),
        seen_BV=state.seen_BV.at[jnp.arange(tokens_B.size), tokens_B].set(True),
    )


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: sampling.Settings,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    vocab_size: int,
    seed: int,
    start_id: int | None = None,
) -> list[list[int]]:
    """The new ids of each prompt (ids too, at least one), up to its first stop id, which is left out.

    The encoder of an encoder-decoder reads the prompts, and its decoder begins with `start_id`, which no other model needs. A
    prompt's result does not depend on the other prompts; equal prompts get different samples. ValueError for a prompt that fills
    the model's context; one that leaves less room than `max_new_tokens` gets fewer, and a log line says so.
    """
    _check(model, prompts, max_new_tokens, seed)
    limits = network.limits(model, prompts, max_new_tokens)
    streams_N2 = batching.streams(prompts)
    out: list[list[int]] = [[]] * len(prompts)
    for chosen in batching.group([len(prompt) for prompt in prompts]):
        mine = [prompts[index] for index in chosen]
        batch = batching.pad(mine, streams_N2[chosen], [limits[index] for index in chosen], model.config.context_tokens)
        program = Program(network.make(model, batch, vocab_size, start_id), settings)
        for rows in _run(program, params, batch, stop_ids, seed, chunk_tokens=max_new_tokens):
            for index, row in zip(chosen, rows, strict=False):
                out[index] = row
    return out


def stream(
    model: Model,
    params: Params,
    prompt: Sequence[int],
    settings: sampling.Settings,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    vocab_size: int,
    seed: int,
    chunk_tokens: int,
    start_id: int | None = None,
    kept: Kept | None = None,
) -> Iterator[list[int]]:
    """All new ids so far: after the first one, then after every `chunk_tokens` more. The last is what `generate` gives.

    kept: of a decoder, what the call before has read; where this prompt begins alike it is not read again, which changes nothing but
    the rounding.
    """
    _check(model, [prompt], max_new_tokens, seed)
    limits, context_tokens = network.limits(model, [prompt], max_new_tokens), model.config.context_tokens
    streams_12 = batching.streams([prompt])
    batch = batching.pad([prompt], streams_12, limits, context_tokens)
    program = Program(network.make(model, batch, vocab_size, start_id), settings)
    if kept is None:
        return (rows[0] for rows in _run(program, params, batch, stop_ids, seed, chunk_tokens))
    before, read_tokens = kept.take(model, program.network, prompt)
    batch = batching.pad([prompt[read_tokens:]], streams_12, limits, context_tokens)
    return (rows[0] for rows in _run(program, params, batch, stop_ids, seed, chunk_tokens, before, kept))


def _run(
    program: Program,
    params: Params,
    prompts: batching.Prompts,
    stop_ids: Sequence[int],
    seed: int,
    chunk_tokens: int,
    before: Before | None = None,
    kept: Kept | None = None,
) -> Iterator[list[list[int]]]:
    """The rows' new ids after the first token, then after every `chunk_tokens` more until every row is done."""
    most = int(prompts.limits_B.max())
    state, until = _start(program, params, prompts, np.array(stop_ids, np.int32), np.uint32(seed), before), 1
    while True:
        if kept is not None:
            kept.hold(state.cache, state.tokens_BN, state.counts_B)
        tokens_BN, counts_B, done_B = processes.fetch((state.tokens_BN, state.counts_B, state.done_B))
        yield [strip(row[:count].tolist(), stop_ids) for row, count in zip(tokens_BN, counts_B, strict=True)]
        if done_B.all():
            return
        until = min(until + chunk_tokens, most)
        if kept is not None:
            kept.release()
        state = _continue(program, params, state, np.int32(until))


def strip(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Without a stop id at the end."""
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


def _check(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> None:
    """ValueError for what cannot be generated; a log line where the context ends before `max_new_tokens`."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed = {seed}.\n  Accepted: 0 to {LARGEST_SEED}.\n  Change seed.")
    network.check(model, prompts, max_new_tokens)
