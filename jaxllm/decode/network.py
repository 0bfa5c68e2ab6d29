"""What generation runs of a model: the encoder if there is one, the first pass over a prompt, and how much fits.

A decoder continues its prompt. An encoder-decoder reads its prompt with the encoder, and its decoder begins with a start token.
Letters: B batch, T prompt length, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from jaxllm.decode import batching
from jaxllm.types import Model, Params


class Before(NamedTuple):
    """What stands before a prompt's tokens: a cache that holds it, and seen_BV, the tokens in it."""

    cache: Any
    seen_BV: Any


class Network(NamedTuple):
    """What is fixed when generation is compiled. Hashable, so static under jit.

    vocab_size: only ids below it are drawn; a model may have more rows than its tokenizer has tokens. start_id: what the decoder
    of an encoder-decoder reads first, else None.
    """

    init_cache: Callable[[int, int], Any]
    encode: Callable[..., Any] | None
    decode: Callable[..., tuple[jax.Array, Any]]
    cache_tokens: int
    vocab_size: int
    start_id: int | None


def make(model: Model, prompts: batching.Prompts, vocab_size: int, start_id: int | None) -> Network:
    """The network for prompts of this shape, with a cache for them and what they may get; ValueError without a start token."""
    check_decodes(model)
    if model.init_cache is None or model.decode is None or (model.encode is not None and start_id is None):
        raise ValueError(
            f"model '{model.name}' without a start_id.\n  Accepted: the id that its decoder reads first.\n"
            "  Pass data.tokenize.start_id(tokenizer)."
        )
    behind_B = prompts.limits_B + (prompts.lengths_B if model.encode is None else 1)
    longest = max(int(behind_B.max()), prompts.tokens_BT.shape[1] if model.encode is None else 1)
    cache_tokens = batching.bucket(longest, batching.SMALLEST_TOKENS, model.config.context_tokens)
    return Network(model.init_cache, model.encode, model.decode, cache_tokens, vocab_size, start_id if model.encode else None)


def start(
    network: Network, params: Params, prompts: batching.Prompts, before: Before | None = None
) -> tuple[jax.Array, Any, jax.Array]:
    """(logits_BV of the first new token, cache, seen_BV: the tokens that stand before it)."""
    tokens_BT, lengths_B = jnp.asarray(prompts.tokens_BT), jnp.asarray(prompts.lengths_B)
    rows, length = tokens_BT.shape
    if before is None:
        before = Before(network.init_cache(rows, network.cache_tokens), jnp.zeros((rows, network.vocab_size), bool))
    cache, seen_BV = before
    if network.encode is None or network.start_id is None:
        real_BT = jnp.arange(length) < lengths_B[:, None]
        seen_BV = seen_BV.at[jnp.arange(rows)[:, None], tokens_BT].max(real_BT)
        logits_BV, cache = network.decode(params, tokens_BT, lengths_B, cache)
    else:
        cache = network.encode(params, tokens_BT, lengths_B, cache)
        first_B1 = jnp.full((rows, 1), network.start_id, jnp.int32)
        seen_BV = seen_BV.at[:, network.start_id].set(True)
        logits_BV, cache = network.decode(params, first_B1, jnp.ones(rows, jnp.int32), cache)
    return logits_BV[:, : network.vocab_size], cache, seen_BV


def limits(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """New tokens that each prompt gets: `max_new_tokens`, or as many as still fit into the context."""
    return [min(max_new_tokens, _room(model, prompt)) for prompt in prompts]


def _room(model: Model, prompt: Sequence[int]) -> int:
    """New tokens that fit behind the prompt, or, of an encoder-decoder, behind the start token."""
    return int(model.config.context_tokens) - (len(prompt) if model.encode is None else 1)


def check(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """ValueError for what cannot be generated; a log line where the context ends before `max_new_tokens`."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}.\n  Accepted: 1 or more.\n  Change max_new_tokens.")
    check_prompts(model, prompts)
    longest: Sequence[int] = max(prompts, key=len, default=())
    if prompts and (room := _room(model, longest)) < max_new_tokens:
        logging.warning(
            "%d new tokens do not fit%s in the model's context of %d: stopping after %d.",
            max_new_tokens,
            f" behind a prompt of {len(longest)} tokens" if model.encode is None else "",
            model.config.context_tokens,
            room,
        )


def check_prompts(model: Model, prompts: Sequence[Sequence[int]]) -> None:
    """ValueError for a model that writes no text, for a prompt without a token, and for one that does not fit."""
    check_decodes(model)
    context_tokens = model.config.context_tokens
    # Behind a decoder's prompt there must be room for a new token.
    most = context_tokens - 1 if model.encode is None else context_tokens
    for prompt in prompts:
        if not 0 < len(prompt) <= most:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens, for a model with a context of {context_tokens} tokens.\n"
                f"  Accepted: 1 to {most} tokens{', so that there is room for a new one' if model.encode is None else ''}.\n  "
                + ("Shorten the prompt." if prompt else "Give a prompt, or use a tokenizer that has a bos token.")
            )


def check_decodes(model: Model) -> None:
    """ValueError for a model that writes no text: an encoder, or a head for classes."""
    if model.decode is None:
        raise ValueError(
            f"model '{model.name}' is an encoder, which writes no text.\n  Accepted: gpt, llama, t5, transformer.\n"
            "  To fill a [MASK] use python -m jaxllm.fill_mask, or load another model."
        )
    if model.config.head != "lm":
        raise ValueError(
            f"this model predicts classes (model.head = '{model.config.head}') and writes no text.\n  Accepted: model.head = 'lm'.\n"
            "  To use it try python -m jaxllm.classify, to measure it python -m jaxllm.evaluate, or load another model."
        )
