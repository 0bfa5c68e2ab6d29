"""Token ids that a model writes behind a prompt: one compiled prefill, then one compiled loop over the new tokens.

Both are compiled once for each (model, settings, bucket of shapes); how many tokens are asked for is data. Letters: B batch,
T prompt length, N new tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxllm.decode import batching
from jaxllm.ops import sampling
from jaxllm.types import Model, Params

LARGEST_SEED = 2**32 - 1


class Program(NamedTuple):
    """What is fixed when generation is compiled. Hashable, so static under jit.

    vocab_size: only ids below it are drawn; a model may have more rows than its tokenizer has tokens.
    """

    init_cache: Callable[[int, int], Any]
    decode: Callable[..., tuple[jax.Array, Any]]
    cache_tokens: int
    settings: sampling.Settings
    vocab_size: int


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


@partial(jax.jit, static_argnames="program")
def _start(program: Program, params: Params, prompts: batching.Prompts, stop_ids: jax.Array, seed: jax.Array) -> State:
    """The state after prefill and the first new token."""
    rows, length = prompts.tokens_BT.shape
    logits_BV, cache = program.decode(params, prompts.tokens_BT, prompts.lengths_B, program.init_cache(rows, program.cache_tokens))
    real_BT = jnp.arange(length) < prompts.lengths_B[:, None]
    seen_BV = jnp.zeros((rows, program.vocab_size), bool).at[jnp.arange(rows)[:, None], prompts.tokens_BT].max(real_BT)
    key = jax.random.key(seed)
    keys_B = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(prompts.streams_B2)
    state = State(
        cache,
        jnp.zeros((rows, program.cache_tokens), jnp.int32),
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
        logits_BV, cache = program.decode(params, last_B1, (~state.done_B).astype(jnp.int32), state.cache)
        return _append(program, state._replace(cache=cache), logits_BV)

    return jax.lax.while_loop(unfinished, body, state)


def _append(program: Program, state: State, logits_BV: jax.Array) -> State:
    """Draws one token a row. Its random numbers depend on the row's stream and on how many tokens stand before it, no more."""

    def draw(key: jax.Array, logits_V: jax.Array, seen_V: jax.Array) -> jax.Array:
        return sampling.sample(jax.random.fold_in(key, state.step), logits_V[None], program.settings, seen_V[None])[0]

    tokens_B = jax.vmap(draw)(state.keys_B, logits_BV[:, : program.vocab_size], state.seen_BV)
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
) -> list[list[int]]:
    """The new ids of each prompt (ids too, at least one), up to its first stop id, which is left out.

    A prompt's result does not depend on the other prompts; equal prompts get different samples. ValueError for a prompt that
    fills the model's context; one that leaves less room than `max_new_tokens` gets fewer, and a log line says so.
    """
    _check(model, prompts, max_new_tokens, seed)
    streams_N2 = batching.streams(prompts)
    out: list[list[int]] = [[]] * len(prompts)
    for chosen in batching.group([len(prompt) for prompt in prompts]):
        batch = batching.pad([prompts[index] for index in chosen], streams_N2[chosen], max_new_tokens, model.config.context_tokens)
        program = _program(model, batch, settings, vocab_size)
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
) -> Iterator[list[int]]:
    """All new ids so far: after the first one, then after every `chunk_tokens` more. The last is what `generate` gives."""
    _check(model, [prompt], max_new_tokens, seed)
    batch = batching.pad([prompt], batching.streams([prompt]), max_new_tokens, model.config.context_tokens)
    program = _program(model, batch, settings, vocab_size)
    return (rows[0] for rows in _run(program, params, batch, stop_ids, seed, chunk_tokens))


def _run(
    program: Program, params: Params, prompts: batching.Prompts, stop_ids: Sequence[int], seed: int, chunk_tokens: int
) -> Iterator[list[list[int]]]:
    """The rows' new ids after the first token, then after every `chunk_tokens` more until every row is done."""
    most = int(prompts.limits_B.max())
    state, until = _start(program, params, prompts, np.array(stop_ids, np.int32), np.uint32(seed)), 1
    while True:
        tokens_BN, counts_B, done_B = jax.device_get((state.tokens_BN, state.counts_B, state.done_B))
        yield [_strip(row[:count].tolist(), stop_ids) for row, count in zip(tokens_BN, counts_B, strict=True)]
        if done_B.all():
            return
        until = min(until + chunk_tokens, most)
        state = _continue(program, params, state, np.int32(until))


def _program(model: Model, prompts: batching.Prompts, settings: sampling.Settings, vocab_size: int) -> Program:
    longest = max(int((prompts.lengths_B + prompts.limits_B).max()), prompts.tokens_BT.shape[1])
    cache_tokens = batching.bucket(longest, batching.SMALLEST_TOKENS, model.config.context_tokens)
    return Program(model.init_cache, model.decode, cache_tokens, settings, vocab_size)


def _strip(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


def _check(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> None:
    """ValueError for what cannot be generated; a log line where the context ends before `max_new_tokens`."""
    context_tokens = model.config.context_tokens
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}.\n  Accepted: 1 or more.\n  Change max_new_tokens.")
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed = {seed}.\n  Accepted: 0 to {LARGEST_SEED}.\n  Change seed.")
    check_prompts(model, prompts)
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > context_tokens:
        logging.warning(
            "%d new tokens do not fit behind a prompt of %d tokens in the model's context of %d: stopping after %d.",
            max_new_tokens,
            longest,
            context_tokens,
            context_tokens - longest,
        )


def check_prompts(model: Model, prompts: Sequence[Sequence[int]]) -> None:
    """ValueError for a prompt without a token, and for one that leaves no room for a new token."""
    context_tokens = model.config.context_tokens
    for prompt in prompts:
        if not 0 < len(prompt) < context_tokens:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens, for a model with a context of {context_tokens} tokens.\n"
                f"  Accepted: 1 to {context_tokens - 1} tokens, so that there is room for a new one.\n  "
                + ("Shorten the prompt." if prompt else "Give a prompt, or use a tokenizer that has a bos token.")
            )
