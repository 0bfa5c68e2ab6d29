"""Text from ids: nothing is shown that could still change, nothing is lost, and the pieces join to the whole."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import sentencepiece

from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from jaxllm.decode import generate, text
from jaxllm.ops.sampling import Settings
from jaxllm.types import Model

GREEDY = Settings(temperature=0)
TEXTS = ["plain", "Grüße 日本 🙂!", "real U+FFFD: \ufffd", "\ufffd at the start", "ends with \ufffd"]


class Context:
    context_tokens = 256


def parrot(prompt_tokens: int, script: Sequence[int]) -> Model:
    """A model that writes `script` behind a prompt of `prompt_tokens` tokens, whatever they are."""
    script_N = jnp.array(script)

    def decode(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        cache = cache + lengths_B
        return jax.nn.one_hot(script_N[cache - prompt_tokens], ByteTokenizer.vocab_size), cache

    unused: Any = None
    return Model("parrot", Context, unused, unused, unused, unused, unused, lambda rows, length: jnp.zeros(rows, jnp.int32), decode)


@pytest.mark.parametrize("expected", TEXTS)
def test_stream_joins_to_the_text(expected: str) -> None:
    """Chunks of 4 bytes cut characters of 2, 3 and 4 bytes apart; eos ends the text though more tokens were asked for."""
    tokenizer = ByteTokenizer()
    model = parrot(3, [*tokenizer.encode(expected), tokenizer.eos_id, *tokenizer.encode("never shown")])
    options: dict[str, Any] = {"max_new_tokens": 60, "seed": 0}
    pieces = list(text.stream(model, {}, tokenizer, "ab", GREEDY, **options))
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    assert text.complete(model, {}, tokenizer, ["ab"], GREEDY, **options) == [expected]


def test_a_character_cut_short_is_shown_at_the_end() -> None:
    tokenizer = ByteTokenizer()
    model = parrot(2, tokenizer.encode("ab€")[:-1])
    pieces = list(text.stream(model, {}, tokenizer, "x", GREEDY, max_new_tokens=4, seed=0))
    assert pieces == ["a", "b", "\ufffd"]


def test_settled_text_never_changes() -> None:
    tokenizer = ByteTokenizer()
    for whole in TEXTS:
        ids = tokenizer.encode(whole)
        detokenizer = text.Detokenizer(tokenizer, tokenizer.encode("é"))
        for count in range(len(ids) + 1):
            assert whole.startswith(detokenizer.settled(ids[:count]))
        assert detokenizer.text(ids) == whole


def test_spaces_of_sentencepiece_stay() -> None:
    """A model from elsewhere adds a space to the first word and takes it away again when it decodes."""
    model = io.BytesIO()
    words = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = SentencePieceTokenizer(model.getvalue(), bos_id=1, eos_id=2, pad_id=0, exact=False)
    whole = tokenizer.encode("the cat sat on the mat")
    prompt = tokenizer.encode("the cat")
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "sat on the mat", "decoded alone, the space is lost"
    assert text.Detokenizer(tokenizer, prompt).text(whole[len(prompt) :]) == " sat on the mat"
    assert text.Detokenizer(tokenizer, []).text(whole) == "the cat sat on the mat"


@pytest.mark.parametrize(("bos_id", "start"), [(256, [256]), (None, [])])
def test_bos_is_added_once(monkeypatch: pytest.MonkeyPatch, bos_id: int | None, start: list[int]) -> None:
    seen: list[list[int]] = []

    def record(model: Any, params: Any, prompts: list[list[int]], *_: Any, **options: Any) -> list[list[int]]:
        seen.extend(prompts)
        assert options["stop_ids"] == (257,)
        return [[] for _ in prompts]

    def record_stream(model: Any, params: Any, prompt: list[int], *_: Any, **options: Any) -> Iterator[list[int]]:
        seen.append(prompt)
        return iter([[]])

    monkeypatch.setattr(generate, "generate", record)
    monkeypatch.setattr(generate, "stream", record_stream)
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(tokenizer, "bos_id", bos_id, raising=False)
    text.complete(parrot(0, [0]), {}, tokenizer, ["ab", ""], GREEDY, max_new_tokens=1, seed=0)
    assert list(text.stream(parrot(0, [0]), {}, tokenizer, "ab", GREEDY, max_new_tokens=1, seed=0)) == []
    assert seen == [[*start, 97, 98], start, [*start, 97, 98]]


def test_prompts_that_cannot_be_continued_are_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the words of `complete`; the byte tokenizer adds bos, which takes one of the 256 places."""
    tokenizer, model = ByteTokenizer(), parrot(0, [0])
    text.check_prompts(model, tokenizer, ["", "a" * 254])
    for prompts, words in ((["a", "a" * 255], "a prompt of 256 tokens"), (["\ud800"], "lone surrogate")):
        for call in (text.check_prompts, lambda *given: text.complete(model, {}, *given[1:], GREEDY, max_new_tokens=1, seed=0)):
            with pytest.raises(ValueError, match=words):
                call(model, tokenizer, prompts)
    monkeypatch.setattr(tokenizer, "bos_id", None, raising=False)
    with pytest.raises(ValueError, match=r"a prompt of 0 tokens[\s\S]*use a tokenizer that has a bos token"):
        text.check_prompts(model, tokenizer, [""])
