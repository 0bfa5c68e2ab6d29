"""Conversations with a model: the oldest turns make room for the answer, which ends with its turn."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny_gguf
from talker import ASK, tokenizer

from jaxllm.data.chat import encoding
from jaxllm.data.documents import Message
from jaxllm.decode import chat
from jaxllm.ops.sampling import Settings
from jaxllm.types import Model


def turns(count: int) -> list[Message]:
    return [{"role": ("user", "assistant")[index % 2], "content": f"message {index}"} for index in range(count)]


def test_the_oldest_turns_go_first() -> None:
    talker, system = tokenizer(), [{"role": "system", "content": "rules"}]
    whole = encoding.encode(talker, [*system, *turns(5)])
    assert chat.fit(talker, [*system, *turns(5)], len(whole) + 10, 10) == (whole, 0)
    assert chat.fit(talker, [*system, *turns(5)], len(whole) + 9, 10) == (encoding.encode(talker, [*system, *turns(5)[2:]]), 2)
    alone = encoding.encode(talker, [*system, turns(5)[4]])
    assert chat.fit(talker, [*system, *turns(5)], len(alone) + 1, 10) == (alone, 4), "less room for the answer, but some"
    assert chat.fit(talker, turns(3), len(encoding.encode(talker, [turns(3)[2]])) + 1, 10).dropped == 2
    twice = [turns(1)[0], turns(3)[2], turns(5)[4]]
    two = encoding.encode(talker, twice[1:])
    assert chat.fit(talker, twice, len(two) + 10, 10) == (two, 1), "a message that was never answered goes alone"
    greeted = encoding.encode(talker, turns(4)[2:3])
    assert chat.fit(talker, turns(4)[1:3], len(greeted) + 10, 10) == (greeted, 1), "only a system's message stays"
    with pytest.raises(ValueError, match=rf"are {len(alone)} tokens.\n  Accepted: up to {len(alone) - 1}, as the context"):
        chat.fit(talker, [*system, *turns(5)], len(alone), 1)


class Context:
    context_tokens, head = 256, "lm"


def parrot(prompt_tokens: int, script: Sequence[int]) -> Model:
    """A model that writes `script` behind a prompt of `prompt_tokens` tokens, whatever they are."""
    script_N = jnp.array(script)

    def decode(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        cache = cache + lengths_B
        return jax.nn.one_hot(script_N[cache - prompt_tokens], len(tiny_gguf.TOKENS)), cache

    unused: Any = None
    return Model(
        name="parrot", config=Context, axes=unused, init=unused, apply=unused, hidden=unused, stacks=(), head=unused, encode=None,
        init_cache=lambda rows, length: jnp.zeros(rows, jnp.int32), decode=decode,
    )  # fmt: skip


def test_an_answer_begins_with_its_first_word_and_ends_with_its_turn() -> None:
    talker = tokenizer("{% for m in messages %}{{ m.content + '<|text|>' }}{% endfor %}")
    prompt_ids = encoding.encode(talker, ASK)
    script = [*talker.encode(" \n\n hello é "), 0, *talker.encode("never shown")]
    pieces = list(
        chat.stream(parrot(len(prompt_ids), script), {}, talker, prompt_ids, Settings(temperature=0), max_new_tokens=40, seed=0)
    )
    assert "".join(pieces) == "hello é "
    assert len(pieces) > 1 and all(pieces)
