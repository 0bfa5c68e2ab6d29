"""Masks, sentinels and the starts of words, in every kind of tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm.data import tokenize
from jaxllm.data.tokenizers.words import word_starts

CORPUS = ["the quick brown fox jumps over the lazy dog, and the dog\nsleeps again and again\n" * 20]
KINDS = ("byte", "char", "bpe", "unigram")


def config_of(objective: str, kind: str, **fields: Any) -> ConfigDict:
    config = schema.base()
    config.train.objective = objective
    config.model.context_tokens = 64
    config.tokenizer.update({"kind": kind, "vocab_size": 290, **fields})
    return config


def made(objective: str, kind: str, **fields: Any) -> Any:
    return tokenize.make(config_of(objective, kind, **fields), lambda: CORPUS)


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_are_above_the_others_and_change_no_text(tmp_path: Path, kind: str) -> None:
    plain, text = made("causal_lm", kind), "the lazy dog\nsleeps"
    size = plain.vocab_size
    assert (plain.mask_id, plain.sentinel_ids) == (None, ())
    masked, spans, pairs = (made(objective, kind) for objective in ("masked_lm", "span_corruption", "seq2seq"))
    assert (masked.mask_id, masked.vocab_size, masked.sentinel_ids) == (size, size + 1, ())
    borders = 2 * (kind == "char")
    count = len(spans.sentinel_ids)
    assert count == 3  # 64 inputs: 70 tokens, of which 10 in 3 spans are hidden
    assert spans.vocab_size == size + borders + count
    assert spans.sentinel_ids == tuple(range(spans.vocab_size - 1, spans.vocab_size - 1 - count, -1))
    assert pairs.vocab_size == size + borders
    assert spans.eos_id is not None and spans.bos_id is not None
    prints = set()
    for tokenizer in (plain, masked, spans, pairs):
        assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        tokenizer.save(str(tmp_path / "saved"))
        again = tokenize.load(tmp_path / "saved")
        names = ("vocab_size", "bos_id", "eos_id", "pad_id", "mask_id", "sentinel_ids")
        assert [getattr(again, name) for name in names] == [getattr(tokenizer, name) for name in names]
        assert tokenize.fingerprint(again) == tokenize.fingerprint(tokenizer)
        prints.add(tokenize.fingerprint(tokenizer))
    assert len(prints) == (4 if kind == "char" else 3), "bos and eos are no news to the others"
    ids = plain.encode(text)
    assert masked.decode([*ids[:3], masked.mask_id, *ids[3:]]) == text
    first, second = spans.sentinel_ids[:2]
    hidden = [first, *ids[:2], second, first, spans.eos_id]
    assert spans.decode(hidden) == f"<extra_id_0>{plain.decode(ids[:2])}<extra_id_1><extra_id_0>"
    assert tokenize.special_ids(masked) >= {masked.mask_id}
    assert not tokenize.special_ids(masked) & set(ids)
    assert tokenize.start_id(spans) == spans.bos_id


@pytest.mark.parametrize("kind", KINDS)
def test_words_start_at_white_space(kind: str) -> None:
    tokenizer = made("masked_lm", kind)
    starts, text = word_starts(tokenizer), "the lazy dog\nsleeps"
    assert starts.shape == (tokenizer.vocab_size,)
    ids = tokenizer.encode(text)
    words: list[list[int]] = []
    for place, index in enumerate(ids):
        if place == 0 or starts[index]:
            words.append([])
        words[-1].append(index)
    assert [tokenizer.decode(word) for word in words] == ["the", " lazy", " dog", "\nsleeps"]


def wordpiece(folder: Path) -> None:
    """As BERT has it: words and, after ##, their rests; some vocabularies also hold letters that elsewhere are marks."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "##s", "##ing", "walk", ",", "\u0120", "##\u0120", "##er"]
    library = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({piece: place for place, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    library.decoder = tokenizers.decoders.WordPiece()
    library.add_special_tokens(pieces[:5])
    library.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    library.save(str(folder / "tokenizer.json"))


def test_a_wordpiece_vocabulary(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    tokenizer = made("masked_lm", "file", path=str(tmp_path))
    ids = tokenizer.encode("the dogs, walking")
    assert word_starts(tokenizer)[ids].tolist() == [True, True, False, True, True, False]
    assert (tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (4, 2, 3, 0)
    assert tokenize.special_ids(tokenizer) == {0, 2, 3, 4}
    tokenizer.save(str(tmp_path / "saved"))
    assert tokenize.load(tmp_path / "saved").mask_id == 4
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": None}))
    with pytest.raises(ValueError, match=r"has no mask token, which train.objective = 'masked_lm' needs\.\n  Accepted: one whose"):
        made("masked_lm", "file", path=str(tmp_path))


@pytest.mark.parametrize("count", [2, 3, 100])
def test_sentinels_of_a_file(tmp_path: Path, count: int) -> None:
    """As T5's file has them: <extra_id_0> is the topmost id; a space mark before each word, which is shown behind a sentinel."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581the", -1.0),
        ("\u2581dog", -2.0),
        ("s", -3.0),
        ("\u2581", -4.0),
    ]
    names = [f"<extra_id_{place}>" for place in range(count - 1, -1, -1)]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram([*pieces, *((name, 0.0) for name in names)], unk_id=2))
    library.pre_tokenizer, library.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    library.add_special_tokens([*(piece for piece, _ in pieces[:3]), *names])
    library.save(str(tmp_path / "tokenizer.json"))
    if count < 3:
        with pytest.raises(
            ValueError, match=r"has 2 sentinels, but a row has 3 hidden spans(.|\n)*<extra_id_2>(.|\n)*data.row_tokens"
        ):
            made("span_corruption", "file", path=str(tmp_path))
        return
    tokenizer = made("span_corruption", "file", path=str(tmp_path))
    assert tokenizer.sentinel_ids == tuple(range(6 + count, 6, -1))
    the, dog = tokenizer.encode("the dog")
    assert tokenizer.decode([the, tokenizer.sentinel_ids[0], dog, 5]) == "the<extra_id_0> dogs"
    assert word_starts(tokenizer)[[the, dog, 5, 6]].tolist() == [True, True, False, True]
    assert tokenize.start_id(tokenizer) == 0
    tokenizer.save(str(tmp_path / "saved"))
    assert tokenize.load(tmp_path / "saved").sentinel_ids == tokenizer.sentinel_ids


def test_sentinels_above_a_sentencepiece_model(tmp_path: Path) -> None:
    """T5's model file ends at 32,000; its tokenizer_config.json says that 100 sentinels follow."""
    with (tmp_path / "tokenizer.model").open("wb") as file:
        lines, special = iter(CORPUS[0].split("\n")), {"bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, vocab_size=34, minloglevel=2, **special
        )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 100, "bos_token": None}))
    tokenizer = made("span_corruption", "file", path=str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.sentinel_ids[0], tokenizer.sentinel_ids[-1]) == (134, 133, 34)
    ids = tokenizer.encode("the dog")
    assert tokenizer.decode([133, *ids, 132]) == "<extra_id_0> the dog<extra_id_1>"
    assert tokenize.start_id(tokenizer) == tokenizer.pad_id == 0
    starts = word_starts(tokenizer)
    assert starts[ids[0]] and not starts[34:].any()


def test_a_file_without_eos(tmp_path: Path) -> None:
    made("causal_lm", "char").save(str(tmp_path))
    with pytest.raises(ValueError, match="has no eos token, which train.objective = 'seq2seq' needs"):
        made("seq2seq", "file", path=str(tmp_path))
