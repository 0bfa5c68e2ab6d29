"""Tokenizers in GGUF files: the ids of the tokenizer that the file was made from, on any text."""

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny_gguf
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxllm.data import tokenize
from jaxllm.data.tokenizers import file as tokenizer_file
from jaxllm.interop import gguf_file, gguf_tokenizer
from jaxllm.types import Tokenizer

TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "Grüße, 日本語 🙂\r\n\ttabs",
    "a\0b",
    "1234567 ½ ²",
    "don't WE'LL",
    "e\u0301",
    "<|end|>",
    "\u2581x",
]
CORPUS = ["the cat sat on the mat", "the dog, 12 years old, sat on 3 logs", "Grüße aus Köln", "naïve café 2024"] * 30


def described(values: dict[str, Any]) -> gguf_tokenizer.Described:
    found = gguf_tokenizer.read(gguf_file.File(Path("tiny.gguf"), values, {}))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2 has it, by the library's own trainer."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=["<|text|>"], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.encode_special_tokens = True
    return made


def written(made: tokenizers.Tokenizer, **changes: Any) -> dict[str, Any]:
    """What the converter writes for a tokenizer of transformers."""
    definition = json.loads(made.to_str())
    tokens = [made.id_to_token(index) for index in range(made.get_vocab_size())]
    merges = [" ".join(merge) for merge in definition["model"]["merges"]]
    special = {token["id"] for token in definition["added_tokens"]}
    kinds = [3 if index in special else 1 for index in range(len(tokens))]
    return tiny_gguf.tokenizer_values(**{"ggml.tokens": tokens, "ggml.merges": merges, "ggml.token_type": kinds}, **changes)


# One name for each set of rules, and one tokenizer with them.
NAMES = list({rules: name for name, rules in reversed(gguf_tokenizer.PRE.items())}.values())


@pytest.fixture(scope="module")
def byte_level(trained: tokenizers.Tokenizer) -> dict[str, Tokenizer]:
    return {pre: described(written(trained, **{"ggml.pre": pre})).tokenizer for pre in NAMES}


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from(TEXTS))
def test_byte_level_ids(trained: tokenizers.Tokenizer, byte_level: dict[str, Tokenizer], text: str) -> None:
    """Those of the tokenizer that was trained; with other rules the text comes back all the same (normalized by qwen2)."""
    assert byte_level["gpt-2"].encode(text) == trained.encode(text, add_special_tokens=False).ids
    nfc = tokenizers.normalizers.NFC().normalize_str(text)
    for pre, tokenizer in byte_level.items():
        assert tokenizer.decode(tokenizer.encode(text)) == (nfc if pre == "qwen2" else text), pre


# By hand from the rules in llama.cpp's src/llama-vocab.cpp, which keep what lies between two matches; | is a border, ~ a newline.
WORDS = "I'm  hello123 4567!?~~ x", "We'LL see iPhones: über+中文か ¼,$x\r~ "
GPT2 = "I|'m| | hello|123| 4567|!?|~~| x", "We|'|LL| see| iPhones|:| über|+|中文か| ¼|,$|x|\r~ "
SMOLLM = "I|'m| | hello|1|2|3| |4|5|6|7|!?|~~| x", "We|'|LL| see| iPhones|:| über|+|中文か| |¼|,$|x|\r~ "
LLAMA3 = "I|'m| | hello|123| |456|7|!?~~| x", "We|'LL| see| iPhones|:| über|+中文か| |¼|,$|x|\r~| "
QWEN2 = "I|'m| | hello|1|2|3| |4|5|6|7|!?~~| x", LLAMA3[1]
TEKKEN = QWEN2[0], "We|'LL| see| i|Phones|:| über|+中文か| |¼|,$|x|\r~| "
GPT4O = "I'm| | hello|123| |456|7|!?~~| x", "We'LL| see| i|Phones|:| über|+中文か| |¼|,$|x|\r~| "
DEEPSEEK = LLAMA3[0], "We|'LL| see| iPhones|:| über|+|中文か| |¼|,$|x|\r~| "
SPLITS = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling mellum gigachat exaone4 a.x-4.0": GPT2,
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": SMOLLM,
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 smaug-bpe dbrx minicpm5": LLAMA3,
    "qwen2 deepseek-r1-qwen megrez kormo stablelm2 hunyuan solar-open grok-2": QWEN2,
    "seed-coder": ("I|'m| | hello|1|2|3| |4|5|6|7|!?|~~| x", LLAMA3[1]),
    "tekken": TEKKEN,
    "gpt-4o llama4": GPT4O,
    # Its class of signs has the letters a to z, too, so that they are cut from others.
    "deepseek-llm": (
        "I|'|m| | hello|123| |4567|!?|~|~| x",
        "We|'|LL| see| iPhones|:| ü|ber|+|中文か| |¼|,$|x|\r|~| ",
    ),
    "deepseek-coder": (
        "I|'|m| | hello|1|2|3| |4|5|6|7|!?|~|~| x",
        "We|'|LL| see| iPhones|:| über|+|中文か| |¼|,|$|x|\r|~| ",
    ),
    "deepseek-v3 hunyuan-dense": DEEPSEEK,
    "falcon": ("I|'|m| | hello|123| |456|7|!?|~~| x", "We|'|LL| see| iPhones|:| über|+|中文か| ¼|,$|x|\r~ "),
    "viking": ("I'm| | hello|1|2|3| |4|5|6|7|!?~~| x", "We'LL| see| iPhones:| über+中文か| |¼|,|$x|\r~ "),
    "default": ("I|'|m| | hello|123| |456|7|!?|~~| x", "We|'|LL| see| iPhones|:| über|+|中文か| |¼|,$|x|\r~ "),
}
EXPECTED = {name: splits for names, splits in SPLITS.items() for name in names.split()}


@pytest.mark.parametrize("pre", NAMES)
def test_rules_of_each_name(byte_level: dict[str, Any], pre: str) -> None:
    for words, expected in zip(WORDS, EXPECTED[pre], strict=True):
        text = words.replace("~", "\n")
        pieces = byte_level[pre].tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert "|".join(text[start:end] for _, (start, end) in pieces).replace("\n", "~") == expected


def test_names() -> None:
    """Names of equal rules are together, and what else llama.cpp and the tokenizers themselves do for a name."""
    assert EXPECTED.keys() == gguf_tokenizer.PRE.keys()
    for name, rules in gguf_tokenizer.PRE.items():
        same = next(other for other in NAMES if gguf_tokenizer.PRE[other] == rules)
        assert EXPECTED[name] == EXPECTED[same], name
    llama3 = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}
    having = {field: {name for name, rules in gguf_tokenizer.PRE.items() if getattr(rules, field)} for field in ("bos", "nfc")}
    assert having == {"bos": {*llama3, "tekken"}, "nfc": {"qwen2", "deepseek-r1-qwen"}}
    assert {name for name, rules in gguf_tokenizer.PRE.items() if rules.whole_tokens} == {*llama3, "tekken", "minicpm5"}


def test_letters_of_deepseek() -> None:
    """All Latin, Greek, Cyrillic and large Armenian letters that have a case, and beyond them no others."""
    ends = ([int(end, 16) for end in part.split("-")] for part in gguf_tokenizer.CASED.split())
    found = {code for pair in ends for code in range(pair[0], pair[-1] + 1)}
    cased = {code for code in range(0x20000) if unicodedata.category(chr(code)) in ("Lu", "Ll", "Lt")}
    assert found < cased
    assert {code for code in cased - found if code < 0x560} == set()


def test_whole_tokens_need_no_merges_with_llama3() -> None:
    """Llama 3 looks a piece up before it merges: "hex" has no merge, yet is a token."""
    tokens = [*tiny_gguf.TOKENS, "hex"]
    for pre, ids in (("llama-bpe", [len(tokens) - 1]), ("gpt-2", [tokens.index("he"), tokens.index("x")])):
        changes = {"ggml.tokens": tokens, "ggml.token_type": [1] * len(tokens), "ggml.pre": pre}
        assert described(tiny_gguf.tokenizer_values(**changes)).tokenizer.encode("hex") == ids


def test_special_tokens_are_single_ids_only_where_they_are_meant() -> None:
    tokenizer: Any = described(tiny_gguf.tokenizer_values()).tokenizer
    text = "<|start|>user\nhello<|end|>"
    assert tokenizer.special_tokens == {"<|text|>": 0, "<|start|>": 1, "<|end|>": 2}
    ids = tokenizer.encode_with_specials(text)
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 1 + len(tokenizer.encode("user\nhello")) + 1)
    assert not {0, 1, 2} & set(tokenizer.encode(text)), "also after special tokens were parsed"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(ids) == "user\nhello"


@pytest.mark.parametrize(
    ("changes", "bos_id"),
    [
        ({}, None),
        ({"ggml.add_bos_token": True}, 1),
        ({"ggml.add_bos_token": None}, None),
        ({"ggml.add_bos_token": None, "ggml.pre": "llama-bpe"}, 1),
        ({"ggml.add_bos_token": True, "ggml.bos_token_id": None}, None),
    ],
)
def test_bos_only_where_the_file_adds_one(changes: dict[str, Any], bos_id: int | None) -> None:
    tokenizer = described(tiny_gguf.tokenizer_values(**changes)).tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (bos_id, 2, 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("eot", "eom", "stop_ids"), [(7, None, (2, 7)), (2, 9, (2, 9)), (9, 7, (2, 9, 7)), (None, None, (2,))])
def test_what_ends_a_text(kind: str, eot: int | None, eom: int | None, stop_ids: tuple[int, ...], tmp_path: Path) -> None:
    """Also through the files of a Hugging Face directory, and none of these tokens gets a name in its settings."""
    changes = {"ggml.eos_token_id": 2, "ggml.eot_token_id": eot, "ggml.eom_token_id": eom}
    found = described(tiny_gguf.tokenizer_values(**changes) if kind == "gpt2" else spm_values(spm_model(), **changes)[0])
    for name, data in found.files.items():
        (tmp_path / name).write_bytes(data)
    again = tokenizer_file.load(ConfigDict({"tokenizer": {"path": str(tmp_path)}}), list)
    assert tokenize.stop_ids(found.tokenizer) == tokenize.stop_ids(again) == stop_ids
    assert not {"eot_token", "eom_token"} & json.loads(found.files["tokenizer_config.json"]).keys()


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_files_and_the_saved_tokenizer_are_the_same_one(tmp_path: Path, kind: str, add_bos: bool) -> None:
    """Through a Hugging Face directory and through a run: equal ids, special tokens and template, and the bos that begins a text."""
    changes = {"ggml.add_bos_token": add_bos}
    found = described(tiny_gguf.tokenizer_values(**changes) if kind == "gpt2" else spm_values(spm_model(), **changes)[0])
    assert (found.tokenizer.bos_id == 1) == add_bos
    for name, data in found.files.items():
        (tmp_path / name).write_bytes(data)
    config = ConfigDict({"tokenizer": {"path": str(tmp_path)}})
    found.tokenizer.save(str(tmp_path / "saved"))
    for other in (tokenizer_file.load(config, list), tokenize.load(tmp_path / "saved")):
        for text in TEXTS:
            assert other.encode(text) == found.tokenizer.encode(text)
        for name in ("bos_id", "eos_id", "pad_id", "vocab_size", "special_tokens"):
            assert getattr(other, name) == getattr(found.tokenizer, name), name
        template = other.template  # type: ignore[attr-defined]
        assert template.text == tiny_gguf.TEMPLATE
        expected = "<|end|>" if kind == "gpt2" else "</s>"
        assert template.names["eos_token"] == expected
    generation = json.loads(found.files["generation_config.json"])
    assert generation["eos_token_id"] == found.tokenizer.eos_id


def spm_model(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        control_symbols=["<|start|>", "<|end|>"],
        minloglevel=2,
        **{"normalization_rule_name": "identity", **options},
    )
    return model.getvalue()


def spm_values(model: bytes, **changes: Any) -> tuple[dict[str, Any], sentencepiece.SentencePieceProcessor]:
    """What the converter writes for a SentencePiece model, and the library's own processor."""
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(library.vocab_size())
    kinds = [2 if library.is_unknown(i) else 3 if library.is_control(i) else 6 if library.is_byte(i) else 1 for i in ids]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [library.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [library.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": library.bos_id(),
        "tokenizer.ggml.eos_token_id": library.eos_id(),
        "tokenizer.ggml.unknown_token_id": library.unk_id(),
        "tokenizer.chat_template": tiny_gguf.TEMPLATE,
    }
    return values | {f"tokenizer.{key}": value for key, value in changes.items()}, library


PREFIXED, PLAIN = spm_values(spm_model()), spm_values(spm_model(add_dummy_prefix=False), **{"ggml.add_space_prefix": False})
PAIRS = [(described(values).tokenizer, library) for values, library in (PREFIXED, PLAIN)]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from(TEXTS))
def test_sentencepiece_ids(text: str) -> None:
    """Those of the model that the metadata came from, with and without a space in front of a text."""
    for tokenizer, library in PAIRS:
        ids = library.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == library.decode(ids)
    assert (PAIRS[0][0].bos_id, PAIRS[0][0].eos_id) == (1, 2)


def test_sentencepiece_has_a_single_unknown_token() -> None:
    """Converters give its type to rows without a token, too; and where no token has it, `unknown_token_id` says which one it is."""
    values, library = PREFIXED
    tokens, scores, kinds = (values[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    more = {"tokens": [*tokens, "[PAD340]"], "scores": [*scores, -1e4], "token_type": [*kinds, 2]}
    other = {"token_type": [3 if kind == 2 else kind for kind in kinds]}
    for changes in (more, other):
        tokenizer = described(values | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}).tokenizer
        for text in [*TEXTS, "[PAD340]"]:
            assert tokenizer.encode(text) == library.encode(text)


def test_letters_that_are_tokens_come_back() -> None:
    """DeepSeek's files have the letters of some bytes as tokens of their own: they are those letters, and no bytes."""
    values = tiny_gguf.tokenizer_values()
    letter = values["tokenizer.ggml.tokens"].index("ö")
    values["tokenizer.ggml.token_type"][letter] = 4
    found = described(values).tokenizer
    assert letter in found.encode("Köln")
    for text in ("Köln", "öö", "é ö", "Höhe öl"):
        assert found.decode(found.encode(text)) == text


def test_special_tokens_of_sentencepiece() -> None:
    tokenizer: Any
    tokenizer, library = PAIRS[0]
    start, end = (library.piece_to_id(piece) for piece in ("<|start|>", "<|end|>"))
    ids = tokenizer.encode_with_specials("<|start|>the cat<|end|>")
    assert ids == [start, *library.encode("the cat"), end]
    assert not {start, end} & set(tokenizer.encode("<|start|>the cat<|end|>"))
    assert set(tokenizer.special_tokens) == {"<unk>", "<s>", "</s>", "<|start|>", "<|end|>"}
    assert tokenizer.encode_with_specials("<unk>") == [library.unk_id()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ggml.pre": "kimi-k2"}, r"tokenizer.ggml.pre = 'kimi-k2', whose rules are not known here.\n  Accepted: gpt-2, phi-2"),
        ({"ggml.tokens": [*tiny_gguf.TOKENS[:-1], "he"]}, "tokenizer in 'tiny.gguf' cannot be used: token 'he' is there twice"),
        ({"ggml.model": "t5"}, r"tokenizer.ggml.model = 't5'[\s\S]*Accepted: gpt2, llama"),
        ({"ggml.eos_token_id": 5000}, r"eos_token_id = 5000.\n  Accepted: 0 to 271"),
        ({"ggml.token_type": [1, 1]}, "has 2 entries in tokenizer.ggml.token_type for 272 tokens"),
        ({"ggml.merges": None}, "does not say 'tokenizer.ggml.merges'"),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        described(tiny_gguf.tokenizer_values(**changes))


def test_a_file_that_does_not_name_its_rules_has_the_default_ones() -> None:
    tokenizer: Any = described(tiny_gguf.tokenizer_values(**{"ggml.pre": None})).tokenizer
    assert [part for part, _ in tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str("12345")] == ["123", "45"]
    assert gguf_tokenizer.read(gguf_file.File(Path("tiny.gguf"), {}, {})) is None
