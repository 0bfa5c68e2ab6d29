"""A conversation turn after turn: what the model is given of it, what is taken back, answered again, forgotten and refused."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny_gguf
from talker import tokenizer

from jaxllm.data.chat import encoding
from jaxllm.data.documents import Message
from jaxllm.decode import chat
from jaxllm.decode.kept import Kept
from jaxllm.decode.talk import Talk
from jaxllm.ops.sampling import Settings
from jaxllm.types import Model

SCRIPT = {"hello": "hello world", "and 2\nlines?": "12 123", "é": "", "world": "o."}
END = 2
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + tiny_gguf.TEMPLATE


class Context:
    context_tokens, head, keys_stay = 256, "lm", True


def talk(seed: int = 0, template: str = tiny_gguf.TEMPLATE, system: str = "", max_tokens: int = 3, **settings: float) -> Talk:
    """With a model that answers anything with tokens at random."""

    def decode(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return jnp.zeros((1, len(tiny_gguf.TOKENS))), cache | {"lengths": cache["lengths"] + lengths_B}

    return Talk(model(decode), {}, tokenizer(template), Settings(**settings), system=system, max_tokens=max_tokens, seed=seed)


def scripted(ids: Sequence[int], system: str = "") -> Talk:
    """With a model that knows the whole conversation beforehand."""
    script_N = jnp.array(ids)

    def decode(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        at = cache["lengths"] + lengths_B
        return jax.nn.one_hot(script_N[at], len(tiny_gguf.TOKENS)), cache | {"lengths": at}

    return Talk(model(decode), {}, tokenizer(), Settings(temperature=0), system=system, max_tokens=40, seed=0)


def model(decode: Any) -> Model:
    unused: Any = None
    return Model(
        name="scripted", config=Context, axes=unused, init=unused, apply=unused, hidden=unused, stacks=(), head=unused, encode=None,
        init_cache=lambda rows, length: {"layers": [], "lengths": jnp.zeros(rows, jnp.int32)}, decode=decode,
    )  # fmt: skip


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """(ids, seed) of every prompt that generation was given."""
    out, stream = [], chat.generate.stream

    def spy(model: Model, params: Any, prompt: Sequence[int], *rest: Any, **options: Any) -> Any:
        out.append((list(prompt), options["seed"]))
        return stream(model, params, prompt, *rest, **options)

    monkeypatch.setattr(chat.generate, "stream", spy)
    return out


def test_the_model_reads_the_conversation_as_it_is_encoded(
    sent: list[tuple[list[int], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt is `encoding.encode` of the messages, and begins with the one before, the answer as it was written, and its end."""
    talker, seen, prompts, read_before, take = tokenizer(), [], [], [], Kept.take

    def spy(self: Kept, *given: Any) -> Any:
        before, count = take(self, *given)
        read_before.append(count)
        return before, count

    monkeypatch.setattr(Kept, "take", spy)
    messages: list[Message] = [{"role": "system", "content": "be brief"}]
    for question, answer in SCRIPT.items():
        messages.append({"role": "user", "content": question})
        prompts.append(encoding.encode(talker, messages))
        assert prompts[-1][: len(seen)] == seen, "the model has seen something else"
        seen = [*prompts[-1], *talker.encode(answer), END]
        messages.append({"role": "assistant", "content": answer})
    assert encoding.encode(talker, messages, add_generation_prompt=False)[: len(seen)] == seen
    conversation = scripted([*seen, 0], system="be brief")
    assert ["".join(conversation.ask(question).pieces) for question in SCRIPT] == list(SCRIPT.values())
    assert conversation.messages == messages
    assert sent == [(prompt, 0) for prompt in prompts]
    # Of each prompt only what is new is read: all but the one before and its answer, without the token that ended it.
    before = [0, *(len(prompt) + len(talker.encode(answer)) for prompt, answer in zip(prompts, SCRIPT.values(), strict=True))]
    assert read_before == before[:-1]


def test_an_answer_is_kept_without_the_space_around_it() -> None:
    """Templates that trim and those that do not then write the same of it."""
    talker = tokenizer()
    prompt = encoding.encode(talker, [{"role": "user", "content": "hello"}])
    conversation = scripted([*prompt, *talker.encode("\n hello world \n"), END])
    assert "".join(conversation.ask("hello").pieces) == "hello world \n"
    assert conversation.messages[1] == {"role": "assistant", "content": "hello world"}


def test_retry_and_undo(sent: list[tuple[list[int], int]]) -> None:
    """Another answer has another seed, and the next message the first one again; seeds begin anew at the end of their range."""
    conversation = talk(seed=2**32 - 1, temperature=1.0)
    answers = ["".join(conversation.ask("hello").pieces)]
    for _ in range(3):
        answers.append("".join(conversation.retry().pieces))
    assert len(set(answers)) == 4
    assert conversation.messages[1:] == [{"role": "assistant", "content": answers[-1].rstrip()}]
    list(conversation.ask("world").pieces)
    assert [seed for _, seed in sent] == [2**32 - 1, 0, 1, 2, 2**32 - 1]
    assert sent[0][0] == sent[3][0]
    # Tries are counted anew for each message, also for the one that is the last again.
    for _ in range(2):
        list(conversation.retry().pieces)
    assert conversation.undo() == "world"
    list(conversation.retry().pieces)
    assert [seed for _, seed in sent[5:]] == [0, 1, 0]
    assert (conversation.undo(), conversation.messages) == ("hello", [])
    for call in (conversation.undo, conversation.retry):
        with pytest.raises(ValueError, match=r"nothing has been asked yet.\n  Accepted"):
            call()
    assert "".join(conversation.ask("hello").pieces) == answers[0], "the seed of the first try"


def test_a_long_answer_leaves_room_for_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers may be longer than the context, of which then half is for the messages; an answer has all that is left."""
    stream, left = chat.stream, []

    def spy(*given: Any, **options: Any) -> Any:
        left.append(options["max_new_tokens"] + len(given[3]))
        return stream(*given, **options)

    monkeypatch.setattr(chat, "stream", spy)
    conversation = talk(temperature=1.0, max_tokens=1000)
    conversation.messages = [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y" * 20}]
    for count, dropped in ((20, 0), (80, 2)):
        question = "z" * count
        prompt = encoding.encode(tokenizer(), [*conversation.messages, {"role": "user", "content": question}])
        assert (conversation.ask(question).dropped, len(prompt) > 128) == (dropped, dropped > 0)
    assert left == [256, 256]


def test_a_tokenizer_without_a_template_is_not_used(sent: list[tuple[list[int], int]]) -> None:
    conversation = talk(temperature=1.0)
    with pytest.raises(ValueError, match="has no chat template"):
        conversation.use(model(None), {}, tokenizer(None))
    list(conversation.ask("hello").pieces)
    assert sent[0][0] == encoding.encode(tokenizer(), conversation.messages[:1])


def test_the_message_of_the_system() -> None:
    """It can change in the middle, stays when all else is forgotten, and is refused where the template has no place for it."""
    conversation = talk(system="be brief")
    list(conversation.ask("hello").pieces)
    conversation.set_system("be kind")
    assert [message["content"] for message in conversation.messages[:2]] == ["be kind", "hello"]
    with pytest.raises(ValueError, match=r"a message of the system contains '<\|end\|>'"):
        conversation.set_system("<|end|>")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be kind"}]
    conversation.set_system("")
    assert conversation.messages == []
    with pytest.raises(ValueError, match="does not accept this conversation: no system here"):
        talk(template=NO_SYSTEM, system="be brief")
