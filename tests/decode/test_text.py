"""Text from ids: nothing is shown that could still change, nothing is lost, and the pieces join to the whole."""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import sentencepiece

from jaxllm import config
from jaxllm.data.tokenizers.added import Added
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_bpe
from jaxllm.decode import generate, marks, text
from jaxllm.ops.sampling import Settings
from jaxllm.types import Model

GREEDY = Settings(temperature=0)
TEXTS = ["plain", "Grüße 日本 🙂!", "real U+FFFD: \ufffd", "\ufffd at the start", "ends with \ufffd"]


class Context:
    context_tokens, head = 256, "lm"


def parrot(prompt_tokens: int, script: Sequence[int]) -> Model:
    """A model that writes `script` behind a prompt of `prompt_tokens` tokens, whatever they are."""
    script_N = jnp.array(script)

    def decode(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        cache = cache + lengths_B
        return jax.nn.one_hot(script_N[cache - prompt_tokens], ByteTokenizer.vocab_size), cache

    unused: Any = None
    return Model(
        "parrot", Context, unused, unused, unused, unused, (), unused, lambda rows, length: jnp.zeros(rows, jnp.int32), None, decode
    )


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
def test_bos_is_added_once_and_all_ends_are_known(monkeypatch: pytest.MonkeyPatch, bos_id: int | None, start: list[int]) -> None:
    seen: list[list[int]] = []

    def record(model: Any, params: Any, prompts: list[list[int]], *_: Any, **options: Any) -> list[list[int]]:
        seen.extend(prompts)
        assert options["stop_ids"] == (257, 10)
        return [[] for _ in prompts]

    def record_stream(model: Any, params: Any, prompt: list[int], *_: Any, **options: Any) -> Iterator[list[int]]:
        seen.append(prompt)
        return iter([[]])

    monkeypatch.setattr(generate, "generate", record)
    monkeypatch.setattr(generate, "stream", record_stream)
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(tokenizer, "bos_id", bos_id, raising=False)
    monkeypatch.setattr(tokenizer, "other_stop_ids", (10,), raising=False)
    text.complete(parrot(0, [0]), {}, tokenizer, ["ab", ""], GREEDY, max_new_tokens=1, seed=0)
    assert list(text.stream(parrot(0, [0]), {}, tokenizer, "ab", GREEDY, max_new_tokens=1, seed=0)) == []
    assert seen == [[*start, 97, 98], start, [*start, 97, 98]]


def test_an_encoder_reads_the_prompt_with_its_sentinels_and_eos() -> None:
    """And what the decoder writes is a text of its own. Bytes keep the space before a sentinel, pieces do not."""
    tokenizer = ByteTokenizer(Added(sentinels=2))
    first, second = tokenizer.sentinel_ids
    reader = dataclasses.replace(parrot(1, tokenizer.encode("out")), encode=lambda params, inputs, lengths, cache: cache)
    assert text.encode(reader, tokenizer, "a <extra_id_1> b") == text.Prompt([97, 32, second, 32, 98, 257], [])
    assert text.complete(reader, {}, tokenizer, ["ab"], GREEDY, max_new_tokens=3, seed=0) == ["out"]
    assert text.join(reader, "out") == " -> out"
    with pytest.raises(ValueError, match=r"<extra_id_2> in a prompt[\s\S]*Accepted: <extra_id_0> to <extra_id_1>"):
        text.encode(reader, tokenizer, "a <extra_id_2>")
    writer = parrot(1, [0])
    assert text.encode(writer, tokenizer, "<extra_id_0>").before == list(b"<extra_id_0>")
    assert text.encode(reader, ByteTokenizer(), "<extra_id_0>").ids == [*b"<extra_id_0>", 257]


def test_a_sentinel_takes_the_space_before_it() -> None:
    """As in training, where a hidden word took its space along: pieces begin with the space."""
    corpus = ["the quick brown fox jumps over the lazy dog"] * 20
    settings = config.base()
    settings.tokenizer.vocab_size = 300
    tokenizer = train_bpe(settings, lambda: corpus, Added(sentinels=1, mask=True))
    words = {word: tokenizer.encode(word) for word in ("the quick", " fox jumps", " dog")}
    marked = marks.encode(tokenizer, "the quick <extra_id_0> fox jumps", {"<extra_id_0>": tokenizer.sentinel_ids[0]})
    assert marked == [*words["the quick"], tokenizer.sentinel_ids[0], *words[" fox jumps"]]
    masked = marks.encode(tokenizer, "the quick [MASK] fox jumps<mask> dog", marks.masks(tokenizer))
    assert masked == [*words["the quick"], tokenizer.mask_id, *words[" fox jumps"], tokenizer.mask_id, *words[" dog"]]
    assert tokenizer.encode("the quick ") != words["the quick"], "the space would be a token of its own"


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
