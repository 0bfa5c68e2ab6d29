"""Answers drawn for training: several to each prompt, with the log-probability that each token had.

One compiled program for the whole run: prompts are padded to the longest one there is, and as many are drawn at once as make up a step.
The parameters are those of the training state as they lie, adapters and quantized kernels too. A prompt is read once, and its cache
repeated for its answers. Letters: B prompts, R answers (B x answers a prompt), T prompt length, N new tokens, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decode import batching, network
from jaxllm.ops import sampling
from jaxllm.parallel import processes
from jaxllm.types import Model, Params


class Program(NamedTuple):
    """What is fixed when it is compiled. Hashable, so static under jit.

    vocab_size: only ids below it are drawn; the probabilities are those over all rows that the model has, as it is trained.
    """

    network: network.Network
    settings: sampling.Settings
    vocab_size: int
    answers: int
    most_tokens: int
    stop_ids: tuple[int, ...]


class Drawn(NamedTuple):
    """Answers of R rows, on the host or the device.

    tokens_RN: ids, the one that ends an answer included, 0 behind it. lengths_R: how many they are. ended_R: False where the answer was cut
    off after most_tokens. log_p_RN: log-probability of each token when it was drawn, at the temperature; 0 behind the end.
    """

    tokens_RN: Any
    lengths_R: Any
    ended_R: Any
    log_p_RN: Any


class _State(NamedTuple):
    drawn: Drawn
    cache: Any
    logits_RV: jax.Array
    step: jax.Array


class Sampler:
    """draws answers of one model: so many to each prompt, at this temperature, of up to most_tokens tokens.

    longest: tokens of the longest prompt that will come. ValueError for one behind which the context has no room.
    """

    def __init__(
        self,
        model: Model,
        *,
        answers: int,
        most_tokens: int,
        temperature: float,
        stop_ids: Sequence[int],
        vocab_size: int,
        longest: int,
    ):
        network.check_decodes(model)
        context_tokens = model.config.context_tokens
        if longest + most_tokens > context_tokens:
            raise ValueError(
                f"answers of {most_tokens} tokens behind prompts of up to {longest}, with model.context_tokens = {context_tokens}.\n"
                f"  Accepted: {context_tokens} together.\n  Lower rl.max_new_tokens, or data.row_tokens, which leaves out longer prompts."
            )
        assert model.init_cache is not None and model.decode is not None  # check_decodes
        cache_tokens = batching.bucket(longest + most_tokens, batching.SMALLEST_TOKENS, context_tokens)
        found = network.Network(model.init_cache, None, model.decode, cache_tokens, model.config.vocab_size, None)
        settings = sampling.Settings(temperature=temperature)
        self._program = Program(found, settings, vocab_size, answers, most_tokens, tuple(stop_ids))
        self._longest = longest

    def draw(self, params: Params, prompts: Sequence[np.ndarray], rng: jax.Array) -> Drawn:
        """NumPy arrays, the answers to a prompt next to each other. What is drawn depends on the key and the place of the answer alone."""
        tokens_BT = np.zeros((len(prompts), self._longest), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        drawn: Drawn = processes.fetch(_draw(self._program, params, tokens_BT, lengths_B, rng))
        return drawn


@partial(jax.jit, static_argnames="program")
def _draw(program: Program, params: Params, tokens_BT: np.ndarray, lengths_B: np.ndarray, rng: jax.Array) -> Drawn:
    repeat = partial(jnp.repeat, repeats=program.answers, axis=0)
    nobody: Any = None
    prompts = batching.Prompts(tokens_BT, lengths_B, nobody, nobody)
    logits_BV, cache, _ = network.start(program.network, params, prompts)
    rows = len(lengths_B) * program.answers
    keys_R = jax.vmap(partial(jax.random.fold_in, rng))(jnp.arange(rows))
    shape = rows, program.most_tokens
    nothing = Drawn(jnp.zeros(shape, jnp.int32), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), jnp.zeros(shape, jnp.float32))
    state = _State(nothing, jax.tree.map(repeat, cache), repeat(logits_BV), jnp.zeros((), jnp.int32))

    def unfinished(state: _State) -> jax.Array:
        return (state.step < program.most_tokens) & ~jnp.all(state.drawn.ended_R)

    def body(state: _State) -> _State:
        tokens_R, drawn = _append(program, state, keys_R)
        # A row that is done appends nothing more to its cache.
        lengths_R = (~drawn.ended_R).astype(jnp.int32)
        logits_RV, cache = program.network.decode(params, tokens_R[:, None], lengths_R, state.cache)
        return _State(drawn, cache, logits_RV, state.step + 1)

    return jax.lax.while_loop(unfinished, body, state).drawn


def _append(program: Program, state: _State, keys_R: jax.Array) -> tuple[jax.Array, Drawn]:
    """One more token of each row that is not done."""
    drawn, step = state.drawn, state.step
    log_p_RV = jax.nn.log_softmax(sampling.filtered(state.logits_RV, program.settings), axis=-1)
    known_RV = log_p_RV[:, : program.vocab_size]
    tokens_R = jax.vmap(lambda key, log_p_V: jax.random.categorical(jax.random.fold_in(key, step), log_p_V))(keys_R, known_RV)
    tokens_R = jnp.where(drawn.ended_R, 0, tokens_R).astype(jnp.int32)
    log_p_R = jnp.take_along_axis(log_p_RV, tokens_R[:, None], axis=-1)[:, 0]
    return tokens_R, Drawn(
        drawn.tokens_RN.at[:, step].set(tokens_R),
        drawn.lengths_R + ~drawn.ended_R,
        drawn.ended_R | jnp.isin(tokens_R, jnp.array(program.stop_ids, jnp.int32)),
        drawn.log_p_RN.at[:, step].set(jnp.where(drawn.ended_R, 0, log_p_R)),
    )
