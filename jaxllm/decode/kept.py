"""The cache of the last prompt, kept for one that begins alike: of a conversation only what is new is read."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decode.network import Before, Network
from jaxllm.models import cache
from jaxllm.parallel import processes
from jaxllm.types import Model


class _Read(NamedTuple):
    """The cache behind a prompt and what was written behind it, of which the last token is not in the cache yet."""

    prompt: list[int]
    cache: Any
    tokens_BN: jax.Array
    counts_B: jax.Array


class Kept:
    """What a decoder has read of one row: nothing at first. `generate.stream` takes it for its prompt and holds what came of it."""

    def __init__(self) -> None:
        self._prompt: list[int] = []
        self._read: _Read | None = None

    def take(self, model: Model, network: Network, prompt: Sequence[int]) -> tuple[Before, int]:
        """(what the model has read of the beginning of this prompt, with room for the rest; how many tokens that is). It is held no more.

        At least the last token is left to be read. Nothing is taken where keys depend on what stands behind them.
        """
        read, self._read, self._prompt = self._read, None, list(prompt)
        seen_BV = jnp.array(np.isin(np.arange(network.vocab_size), prompt)[None])
        if read is None or not model.config.keys_stay:
            return Before(network.init_cache(1, network.cache_tokens), seen_BV), 0
        tokens_BN, counts_B = processes.fetch((read.tokens_BN, read.counts_B))
        inside = [*read.prompt, *tokens_BN[0, : counts_B[0] - 1].tolist()]
        alike = len(os.path.commonprefix([inside, self._prompt[:-1]]))
        return Before(cache.cut(read.cache, jnp.array([alike]), network.cache_tokens), seen_BV), alike

    def hold(self, state: Any, tokens_BN: jax.Array, counts_B: jax.Array) -> None:
        """The cache `state` of the prompt that was taken for, with all but the last of its new tokens."""
        self._read = _Read(self._prompt, state, tokens_BN, counts_B)

    def release(self) -> None:
        """Holds nothing more, as the memory is about to be used again."""
        self._read = None
