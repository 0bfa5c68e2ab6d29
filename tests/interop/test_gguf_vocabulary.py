"""Tokenizers that go into GGUF files: read back they are what they were, and what llama.cpp has no word for is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from test_gguf_tokenizer import CORPUS, TEXTS, described, spm_model, spm_values

from jaxllm import config as schema
from jaxllm.data import tokenize
from jaxllm.data.tokenizers import char, huggingface, sentencepiece
from jaxllm.data.tokenizers import file as tokenizer_file
from jaxllm.data.tokenizers.added import Added
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.interop import gguf_file, gguf_tokenizer, gguf_vocabulary, gguf_write, tokenizer_files
from jaxllm.types import Tokenizer


def values_of(made: gguf_vocabulary.Made) -> dict[str, Any]:
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(made.entries))
    return gguf_file.metadata(head + b"".join(made.entries.values()))[0]


def again(tokenizer: Any, carried: dict[str, bytes] | None = None, rows: int = 0) -> Tokenizer:
    """The tokenizer after a way through a GGUF file."""
    return described(values_of(gguf_vocabulary.make(tokenizer, carried or {}, rows or tokenizer.vocab_size))).tokenizer


def train(kind: Any, vocab_size: int = 370, **options: Any) -> Any:
    config = schema.base()
    config.tokenizer.vocab_size = vocab_size
    return kind(config, lambda: CORPUS, **options)


BPE = train(sentencepiece.train_bpe)


@pytest.mark.parametrize("pre", gguf_tokenizer.PRE)
def test_byte_level_metadata_come_back(pre: str) -> None:
    """Tokens, types, merges, rules, ids and template, from nothing but the files that a Hugging Face directory would have."""
    kinds = [3, 4, *[1] * (len(tiny_gguf.TOKENS) - 2)]
    given = tiny_gguf.tokenizer_values(pre, **{"ggml.token_type": kinds})
    found = described(given)
    made = gguf_vocabulary.make(found.tokenizer, found.files, len(kinds))
    same = {name: known for name, known in gguf_tokenizer.PRE.items() if known == gguf_tokenizer.PRE[pre]}
    expected = given | {"tokenizer.ggml.pre": next(iter(same)), "tokenizer.ggml.add_eos_token": False}
    assert values_of(made) == expected
    assert bool(made.notes) == gguf_tokenizer.PRE[pre].nfc


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_metadata_come_back(prefix: bool) -> None:
    values, _ = spm_values(spm_model(add_dummy_prefix=prefix), **{"ggml.add_space_prefix": prefix})
    found = described(values)
    made = gguf_vocabulary.make(found.tokenizer, found.files, found.tokenizer.vocab_size)
    more = {"pre": "default", "add_bos_token": True, "add_eos_token": False, "remove_extra_whitespaces": False}
    assert values_of(made) == values | {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    assert made.notes == ()


def test_the_tokenizer_of_a_gguf_file_goes_out_as_it_came(tmp_path: Path) -> None:
    """Every key and type, also of what is not read here; only rows without a token get one."""
    odd = {
        "ggml.token_type": [3, 3, 5, *[1] * (len(tiny_gguf.TOKENS) - 3)],
        "ggml.eot_token_id": 2,
        "ggml.add_bos_token": None,
        "chat_template.other": "x",
    }
    path = tiny_gguf.write(tmp_path / "tiny.gguf", {}, tiny_gguf.model_values() | tiny_gguf.tokenizer_values(**odd))
    file = gguf_file.read(path)
    found = gguf_tokenizer.read(file)
    assert found is not None
    carried = found.files | {gguf_vocabulary.FILE: gguf_write.vocabulary(file)}
    given = {key: value for key, value in file.values.items() if key.startswith("tokenizer.")}
    count = len(tiny_gguf.TOKENS)
    assert values_of(gguf_vocabulary.make(found.tokenizer, carried, count)) == given
    (tmp_path / "alone.gguf").write_bytes(carried[gguf_vocabulary.FILE])
    assert gguf_file.read(tmp_path / "alone.gguf").values == given
    more = {"tokens": [*tiny_gguf.TOKENS, f"[PAD{count}]"], "token_type": [*odd["ggml.token_type"], 5]}
    expected = given | {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    assert values_of(gguf_vocabulary.make(found.tokenizer, carried, count + 1)) == expected


# As the tokenizer.json files of these models write it.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(regex: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **changes}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


SPLIT_ALONE = BYTE_LEVEL | {"use_regex": False}
SPELLED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt-2", {"pre_tokenizer": BYTE_LEVEL}),
    "llama3": ("llama-bpe", {"pre_tokenizer": sequence(split(GPT4), SPLIT_ALONE), "ignore_merges": True}),
    "llama3_cases": (
        "llama-bpe",
        {
            "pre_tokenizer": sequence(
                split(GPT4.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")),
                SPLIT_ALONE,
            ),
            "ignore_merges": True,
        },
    ),
    "llama3_merges": ("smaug-bpe", {"pre_tokenizer": sequence(split(GPT4), SPLIT_ALONE), "ignore_merges": False}),
    "qwen2": (
        "qwen2",
        {"pre_tokenizer": sequence(split(GPT4.replace("{1,3}", "")), SPLIT_ALONE), "normalizer": {"type": "NFC"}},
    ),
    "smollm2": ("smollm", {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL)}),
}
UNKNOWN: dict[str, dict[str, Any]] = {
    "groups of two digits": {"pre_tokenizer": sequence(split(GPT4.replace("1,3", "1,2")), SPLIT_ALONE)},
    "pieces of gpt-2": {"pre_tokenizer": BYTE_LEVEL, "ignore_merges": True},
    "lower case": {"pre_tokenizer": BYTE_LEVEL, "normalizer": {"type": "Lowercase"}},
    "a space before": {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
    "one piece": {"pre_tokenizer": SPLIT_ALONE},
    "cut away": {"pre_tokenizer": sequence(split(GPT4, behavior="Removed"), SPLIT_ALONE), "ignore_merges": True},
}


def byte_level(pre_tokenizer: Any, normalizer: Any = None, merges: Any = None, **model: Any) -> huggingface.HuggingFaceTokenizer:
    pairs = [merge.split(" ") for merge in tiny_gguf.MERGES] if merges is None else merges
    definition = {
        "added_tokens": [
            {"id": 0, "content": tiny_gguf.TOKENS[0], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False},
            # Above the vocabulary, with ids between that no token has.
            {"id": 300, "content": "<tool>", "special": False, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False},
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tiny_gguf.TOKENS)}, "merges": pairs, **model},
    }  # fmt: skip
    return huggingface.HuggingFaceTokenizer(json.dumps(definition).encode(), bos_id=None, eos_id=0, pad_id=0)


@pytest.mark.parametrize("name", SPELLED)
def test_rules_are_found_however_a_file_spells_them(name: str) -> None:
    pre, fields = SPELLED[name]
    values = values_of(gguf_vocabulary.make(byte_level(**fields), {}, 310))
    assert values["tokenizer.ggml.pre"] == pre
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == 310
    assert (tokens[0], kinds[0]) == (tiny_gguf.TOKENS[0], 3) and (tokens[300], kinds[300]) == ("<tool>", 4)
    assert (tokens[299], kinds[299]) == ("[PAD299]", 5) and (tokens[309], kinds[309]) == ("[PAD309]", 5)
    assert values["tokenizer.ggml.merges"] == tiny_gguf.MERGES


@pytest.mark.parametrize("name", UNKNOWN)
def test_rules_without_a_name_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"no name: [\s\S]*\n  Accepted: byte-level .*default; SentencePiece's[\s\S]*\n  Take a model"
    ):
        gguf_vocabulary.make(byte_level(**UNKNOWN[name]), {}, 310)
    # Where nothing is merged nothing depends on them.
    if name == "one piece":
        assert values_of(gguf_vocabulary.make(byte_level(**UNKNOWN[name], merges=[]), {}, 310))["tokenizer.ggml.pre"] == "gpt-2"


def through_a_directory(tokenizer: Any, path: Path) -> Tokenizer:
    """As it is read from the files that are written for transformers."""
    for name, data in tokenizer_files.make(tokenizer, 64, "decoder").files.items():
        (path / name).write_bytes(data)
    return tokenizer_file.load(ConfigDict({"tokenizer": {"path": str(path)}}), list)


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, Tokenizer]]:
    """(tokenizer, the same through GGUF), of our own kinds and of what their Hugging Face directories become."""
    own = [BPE, train(sentencepiece.train_bpe, extra=Added(mask=True, sentinels=3)), ByteTokenizer(Added(sentinels=2))]
    pairs = [(one, again(one, rows=one.vocab_size + 5)) for one in own]
    return pairs + [(one, again(through_a_directory(one, tmp_path_factory.mktemp("hf")))) for one in own[::2]]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from(TEXTS + CORPUS))
def test_ids_are_those_of_the_tokenizer(ways: list[tuple[Tokenizer, Tokenizer]], text: str) -> None:
    """U+2581 is a space wherever SentencePiece's vocabularies are used but here."""
    for tokenizer, found in ways:
        if "\u2581" not in text or isinstance(tokenizer, ByteTokenizer):
            assert found.encode(text) == tokenizer.encode(text)
            assert found.decode(tokenizer.encode(text)) == text
        assert (found.bos_id, found.eos_id, found.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def test_special_tokens_of_our_own() -> None:
    values = values_of(gguf_vocabulary.make(train(sentencepiece.train_bpe, extra=Added(mask=True, sentinels=2)), {}, 373))
    ids = {key.split(".")[-1]: value for key, value in values.items() if key.endswith("_token_id")}
    assert ids == {
        "bos_token_id": 2, "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 3, "mask_token_id": 370
    }  # fmt: skip
    assert values["tokenizer.ggml.tokens"][370:] == ["<mask>", "<extra_id_1>", "<extra_id_0>"]
    assert values["tokenizer.ggml.token_type"][:4] + values["tokenizer.ggml.token_type"][370:] == [3, 3, 3, 2, 3, 3, 3]
    assert (values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]) == (True, False)


def llama2(pre_tokenizer: Any, normalizer: Any, change: Any = None) -> huggingface.HuggingFaceTokenizer:
    """A SentencePiece model as a tokenizer.json, with `change(definition)`."""
    definition = json.loads(tokenizer_files.make(BPE, 64, "decoder").files["tokenizer.json"])
    definition |= {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer}
    if change:
        change(definition)
    return huggingface.HuggingFaceTokenizer(json.dumps(definition).encode(), bos_id=2, eos_id=1, pad_id=0)


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, REPLACE]}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer", "prefix", "notes"),
    [
        (None, REPLACE, False, 0),
        (None, PREPEND, True, 0),
        (METASPACE, None, True, 1),
        (METASPACE | {"prepend_scheme": "never"}, None, False, 0),
    ],
)
def test_spaces_of_sentencepiece_in_a_tokenizer_json(pre_tokenizer: Any, normalizer: Any, prefix: bool, notes: int) -> None:
    tokenizer = llama2(pre_tokenizer, normalizer)
    made = gguf_vocabulary.make(tokenizer, {}, tokenizer.vocab_size)
    assert values_of(made)["tokenizer.ggml.add_space_prefix"] is prefix and len(made.notes) == notes
    found = described(values_of(made)).tokenizer
    for text in (*CORPUS[:4], "the  cat\nsat", "日本 x"):
        assert found.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(("others", "named", "notes"), [((), {}, 0), ((9,), {"eot": 9}, 0), ((9, 7, 8), {"eot": 9, "eom": 7}, 1)])
def test_what_ends_a_text_besides_eos(others: tuple[int, ...], named: dict[str, int], notes: int) -> None:
    tokenizer = byte_level(BYTE_LEVEL)
    tokenizer.other_stop_ids = others
    made = gguf_vocabulary.make(tokenizer, {}, tokenizer.vocab_size)
    keys = {f"tokenizer.ggml.{name}_token_id": name for name in ("eot", "eom")}
    assert {name: values_of(made)[key] for key, name in keys.items() if key in values_of(made)} == named
    assert len(made.notes) == notes and tokenize.stop_ids(described(values_of(made)).tokenizer) == (tokenizer.eos_id, *others[:2])


def no_merge(definition: dict[str, Any]) -> None:
    del definition["model"]["merges"][10]


def mixed_merges(definition: dict[str, Any]) -> None:
    """Two pieces of two merges each, in turn."""
    definition["model"]["merges"].sort(key=lambda pair: len(pair[0]))


def no_bytes(definition: dict[str, Any]) -> None:
    del definition["model"]["vocab"]["<0x0A>"]


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (lambda: train(sentencepiece.train_unigram, 293), "no byte-pair encoding .unigram. no bytes for what its pieces do not spell"),
        (lambda: char.train(schema.base(), lambda: CORPUS), "llama.cpp has no tokenizer of characters"),
        (lambda: through(tokenizers.models.WordLevel({"a": 0})), "its tokenizer.json is of the kind WordLevel"),
        (lambda: llama2(None, REPLACE, no_merge), "not those of a SentencePiece model .missing: "),
        (lambda: llama2(None, REPLACE, mixed_merges), "not those of a SentencePiece model .apart: "),
        (lambda: llama2(None, REPLACE, no_bytes), "has no bytes for unknown characters"),
        (lambda: llama2(METASPACE | {"split": True}, None), "places spaces in another way"),
        (lambda: spm(model=spm_model(), eos_id=None), r"no token of it ends a text .eos."),
        (lambda: spm(model=spm_model(normalization_rule_name="nmt_nfkc")), "changes characters .'nmt_nfkc'."),
        (lambda: None, "the model has no tokenizer"),
    ],
)  # fmt: skip
def test_what_llama_cpp_lacks_is_refused(tokenizer: Any, words: str) -> None:
    made = tokenizer()
    with pytest.raises(
        ValueError, match=rf"the tokenizer cannot go into a GGUF file: .*{words}[\s\S]*\n  Accepted: .*\n  [A-Z].*hf\."
    ):
        gguf_vocabulary.make(made, {}, 10_000)


def through(model: Any) -> huggingface.HuggingFaceTokenizer:
    return huggingface.HuggingFaceTokenizer(tokenizers.Tokenizer(model).to_str().encode(), bos_id=None, eos_id=0, pad_id=0)


def spm(model: bytes, eos_id: int | None = 2) -> sentencepiece.SentencePieceTokenizer:
    return sentencepiece.SentencePieceTokenizer(model, bos_id=1, eos_id=eos_id, pad_id=0, exact=False)


def test_a_file_that_would_give_other_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at the end finds what no rule above it foresaw."""
    tokenizer = byte_level(**SPELLED["gpt2"][1])
    monkeypatch.setitem(
        gguf_tokenizer.PRE, "gpt-2", gguf_tokenizer.PRE["gpt-2"]._replace(splits=(r"l+", *gguf_tokenizer.PRE["gpt-2"].splits))
    )
    monkeypatch.setattr(gguf_vocabulary, "PROBE", "hello")
    monkeypatch.setattr("jaxllm.interop.gguf_definition._splits", lambda steps: gguf_tokenizer.PRE["gpt-2"].splits)
    with pytest.raises(ValueError, match="as 'gpt2' with the rules 'gpt-2' it would give a text other ids"):
        gguf_vocabulary.make(tokenizer, {}, 310)
