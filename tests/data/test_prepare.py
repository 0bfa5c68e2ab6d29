"""Prepare from text to shards: which documents end up where, and what the tokenizer sees of them."""

import json
import re
import string
from pathlib import Path

import pytest
from corpus import Lines, document, texts
from ml_collections import ConfigDict

from jaxllm.data import spool
from jaxllm.data.documents import Document
from jaxllm.data.prepare import prepare


def test_every_document_is_in_one_split(config: ConfigDict, tmp_path: Path) -> None:
    lines = Lines()
    prepared = prepare(config, tmp_path / "data", log=lines)
    train, validation = texts(prepared, "train"), texts(prepared, "validation")
    assert sorted(train + validation) == sorted(document(number) for number in range(40))
    assert len(train) == prepared.train.documents
    assert 3 <= len(validation) <= 14
    for split, parts in (("train", train), ("validation", validation)):
        shards = getattr(prepared, split)
        assert shards.text_bytes == len("".join(parts).encode())
        # The byte tokenizer has bos and eos: every byte and every eos is predicted.
        assert shards.weighted_tokens == shards.text_bytes + len(parts)
        assert shards.bytes_per_token == shards.text_bytes / shards.weighted_tokens
        shards.verify()
    assert re.search(r"train: \d+ rows of 16 tokens from \d+ documents", lines.text)
    assert prepared.record["documents"]["data.source"] == {
        "read": 40,
        "dropped": {},
        "kept": 40,
        "chars": len("".join(train + validation)),
    }
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["data.json", "lock", "tokenizer", "train", "validation"]


def test_new_documents_leave_the_old_ones_where_they_were(config: ConfigDict, tmp_path: Path) -> None:
    before = prepare(config, tmp_path / "data", log=Lines())
    held_out = set(texts(before, "validation"))
    with open(config.data.source, "a") as file:
        file.writelines(json.dumps({"text": document(number)}) + "\n" for number in range(40, 80))
    lines = Lines()
    after = prepare(config, tmp_path / "data", log=lines)
    assert f"'{config.data.source}' has changed" in lines.text
    assert held_out < set(texts(after, "validation"))
    assert len(texts(after, "train") + texts(after, "validation")) == 80


@pytest.mark.parametrize("frac", [1e-9, 0.5])
def test_each_side_gets_a_document(tmp_path: Path, frac: float) -> None:
    for number in range(20):
        pair = [Document(f"{letter} {number}", "", ("x", "y"), "é") for letter in "ab"]
        parts = spool.split(spool.Spool(tmp_path / "spool", pair), "documents", frac)
        assert sorted([*parts["train"](), *parts["validation"]()]) == pair
        assert len(list(parts["train"]())) == 1


@pytest.mark.parametrize("frac", [0.1, 0.25, 0.5])
def test_characters_are_cut_where_the_share_says(tmp_path: Path, frac: float) -> None:
    """As nanoGPT cuts: text[: int(n * (1 - frac))] for training, whatever documents the text consists of."""
    documents = ["abcd", "éfghij", "k", "lmnopqrstu"]
    whole = "".join(documents)
    parts = spool.split(spool.Spool(tmp_path / "spool", [Document(text, "") for text in documents]), "characters", frac)
    train, validation = ([document.text for document in parts[name]()] for name in ("train", "validation"))
    border = int(len(whole) * (1 - frac))
    assert "".join(train) == whole[:border]
    assert "".join(validation) == whole[border:]
    assert len(train) + len(validation) in (4, 5)


def test_char_split_covers_both_alphabets(config: ConfigDict, tmp_path: Path) -> None:
    """A character that only the held-out end has is still in the vocabulary; there is no bos and no eos to predict."""
    source = tmp_path / "text.txt"
    source.write_text("ab" * 45 + "xyzé" + "a" * 6)
    config.data.update({"source": str(source), "split_by": "characters", "validation_frac": 0.1, "cleaners": ()})
    config.tokenizer.kind = "char"
    prepared = prepare(config, tmp_path / "data", log=Lines())
    assert prepared.tokenizer.vocab_size == 6
    assert (prepared.train.tokens, prepared.validation.tokens) == (90, 10)
    assert (prepared.train.weighted_tokens, prepared.validation.weighted_tokens) == (89, 9)
    # Of "xyzéaaaaaa" all but the x, and the é has two bytes.
    assert prepared.validation.text_bytes == 10


def test_one_document_needs_no_other_setting(config: ConfigDict, tmp_path: Path) -> None:
    """A text file is taken as it is: nothing to hold out whole, so its end is; and that is said."""
    source = tmp_path / "text.txt"
    source.write_text("".join(document(number) for number in range(20)))
    config.data.source = str(source)
    lines = Lines()
    prepared = prepare(config, tmp_path / "data", log=lines)
    assert "".join(texts(prepared, "train") + texts(prepared, "validation")) == source.read_text()
    assert prepared.validation.text_bytes == pytest.approx(0.2 * source.stat().st_size, rel=0.05)
    assert "data.source is one document" in lines.text
    prepare(config, tmp_path / "data", log=(again := Lines()))
    assert again == []


def test_a_text_as_long_as_tinyshakespeare_is_split_as_nanogpt_splits_that(config: ConfigDict, tmp_path: Path) -> None:
    """1,115,394 characters, 65 different ones: nanoGPT counts 1,003,854 and 111,540 tokens."""
    letters = string.ascii_letters + "\n !$&',-.3:;?"
    source = tmp_path / "input.txt"
    source.write_text((letters * (1_115_394 // 65 + 1))[:1_115_394])
    config.data.update({"source": str(source), "split_by": "characters", "validation_frac": 0.1, "cleaners": (), "row_tokens": 64})
    config.tokenizer.kind = "char"
    prepared = prepare(config, tmp_path / "data", log=Lines())
    assert (prepared.train.tokens, prepared.validation.tokens, prepared.tokenizer.vocab_size) == (1_003_854, 111_540, 65)


def test_validation_source_is_used_whole(config: ConfigDict, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("held out by hand, all of it")
    config.data.validation_source = str(other)
    config.data.validation_frac = 0.0
    prepared = prepare(config, tmp_path / "data", log=Lines())
    assert texts(prepared, "validation") == ["held out by hand, all of it"]
    assert len(texts(prepared, "train")) == 40


def test_trained_tokenizer_sees_only_the_train_split(config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxllm.data import tokenize

    seen: list[str] = []
    make = tokenize.make
    monkeypatch.setattr(tokenize, "make", lambda config, texts: (seen.extend(texts()), make(config, texts))[1])
    prepared = prepare(config, tmp_path / "data", log=Lines())
    assert seen == texts(prepared, "train")
