"""Special tokens added by name, in every kind of tokenizer: above the others, kept, never spelled by a text; and where tokens stand."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import foreign_tokenizers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm.data import tokenize
from jaxllm.data.tokenizers import huggingface

CORPUS = ["the cat sat on the mat\n\tand the <x> was </y> näht 日本\u2581\n" * 20]
TOKENS = ("<x>", "</y>")
KINDS = ("byte", "char", "bpe", "unigram", "json", "model")


def config_of(kind: str, folder: Path, **fields: Any) -> ConfigDict:
    config = schema.base()
    config.tokenizer.update({"kind": kind, "vocab_size": 283, **fields})
    if kind in ("json", "model"):
        for name, data in (foreign_tokenizers.tokenizer_json if kind == "json" else foreign_tokenizers.llama2)().items():
            (folder / name).write_bytes(data)
        config.tokenizer.update({"kind": "file", "path": str(folder)})
    return config


def made(kind: str, folder: Path, **fields: Any) -> Any:
    return tokenize.make(config_of(kind, folder, **fields), lambda: CORPUS)


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tokenizer without and with the tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    return made(request.param, folder), made(request.param, folder, add_tokens=TOKENS)


def test_they_are_above_all_others_and_move_none(both: tuple[Any, Any], tmp_path: Path) -> None:
    plain, more = both
    assert [more.special_tokens[token] for token in TOKENS] == [plain.vocab_size, plain.vocab_size + 1]
    assert more.vocab_size == plain.vocab_size + 2
    names = ("bos_id", "eos_id", "pad_id", "mask_id", "sentinel_ids", "other_stop_ids", "template")
    assert [getattr(more, name) for name in names] == [getattr(plain, name) for name in names]
    more.save(str(tmp_path))
    again = tokenize.load(tmp_path)
    assert (again.special_tokens, again.vocab_size) == (more.special_tokens, more.vocab_size)
    assert tokenize.fingerprint(again) == tokenize.fingerprint(more) != tokenize.fingerprint(plain)
    assert tokenize.extend(again, TOKENS, again.template) is again


@pytest.mark.parametrize("start", ["", "a-model"])
def test_rows_that_a_model_lacks_are_told_unless_it_gets_them(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that begins with the model adds them, and says so itself."""
    said: list[str] = []
    monkeypatch.setattr(tokenize.logging, "warning", lambda words, *values: said.append(words % values))
    config = config_of("json", tmp_path, add_tokens=TOKENS)
    config.train.start = start
    grown = tokenize.make(config, list)
    words = f"{', '.join(TOKENS)} added to the tokenizer, which now has {grown.vocab_size} tokens: "
    assert [line.startswith(words) and "needs 2 more rows" in line for line in said] == [True] * (not start)


def test_a_text_never_spells_them(both: tuple[Any, Any]) -> None:
    plain, more = both
    text = "the <x> was </y>"
    assert more.encode(text) == plain.encode(text)
    first, second = (more.special_tokens[token] for token in TOKENS)
    meant = more.encode_with_specials("<x>the</y>")
    assert (meant[0], meant[-1]) == (first, second)
    assert more.decode(meant) == more.decode(meant[1:-1])
    assert more.encode_with_specials("the cat") == more.encode("the cat")


def test_they_can_be_added_to_what_was_saved(both: tuple[Any, Any], tmp_path: Path) -> None:
    _, more = both
    more.save(str(tmp_path))
    config = config_of("file", tmp_path, path=str(tmp_path), add_tokens=("<z>", "<x>"))
    again = tokenize.make(config, list)
    assert again.special_tokens == {**more.special_tokens, "<z>": more.vocab_size}


PIECES = st.sampled_from(["<x>", "</y>", "<", " ", "the", " cat", "\n", "\t", "é", "日本", "\u2581", "  "])


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(PIECES, max_size=12))
def test_tokens_are_where_their_characters_are(both: tuple[Any, Any], parts: list[str]) -> None:
    """Every character belongs to a token, in order; special tokens are where they are spelled, and the text between them comes back."""
    _, more = both
    text = "".join(parts)
    if not set(text.replace("<x>", "").replace("</y>", "")) <= set("".join(CORPUS)) and not hasattr(more, "processor"):
        text = "the <x>"
    ids, spans = more.locate(text)
    assert ids == more.encode_with_specials(text) and len(ids) == len(spans)
    assert all(0 <= start <= stop <= len(text) for start, stop in spans)
    assert all(one[0] <= other[0] and one[1] <= other[1] for one, other in pairwise(spans))
    assert {place for start, stop in spans for place in range(start, stop)} == set(range(len(text)))
    spelled = {more.special_tokens[token]: token for token in TOKENS}
    for index, (start, stop) in zip(ids, spans, strict=True):
        if index in spelled:
            assert text[start:stop] == spelled[index]
        elif stop - start > 1 and not text[start:stop].startswith((" ", "\u2581")) and (shown := more.decode([index]).strip()):
            assert text[start:stop].strip() == shown


def test_places_keep_the_spaces_that_a_post_processor_takes_off(tmp_path: Path) -> None:
    """As Llama 3's byte-level one does: a token that begins with a space would seem to begin behind it."""
    definition = json.loads(foreign_tokenizers.tokenizer_json(foreign_tokenizers.after_bytes)["tokenizer.json"])
    definition["post_processor"]["processors"][0]["trim_offsets"] = True
    made = huggingface.HuggingFaceTokenizer(json.dumps(definition).encode(), bos_id=None, eos_id=None, pad_id=0)
    assert made.locate("a cat").spans == [(0, 1), (1, 5)]
    assert made.tokenizer.encode("a cat", add_special_tokens=False).offsets == [(0, 1), (2, 5)]
