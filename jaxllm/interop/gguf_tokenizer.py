"""The tokenizer that a GGUF file describes in its metadata, as the files that other tools read it from.

Two kinds exist for LLaMA-family models: "gpt2", byte-level byte-pair encoding, which becomes a tokenizer.json; and "llama",
SentencePiece, which becomes a tokenizer.model. A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`), it does not hold it.
"""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging

from jaxllm.data.tokenizers import chat_template, files, huggingface, sentencepiece
from jaxllm.interop import gguf_file
from jaxllm.types import Tokenizer

# tokenizer.ggml.token_type, which has the numbers of SentencePiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
DIGIT, DIGITS, THREE_DIGITS = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Radford et al. 2019, section 2.2: a word, a number or signs, each with the space before it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# As in GPT-4's tokenizer: contractions in any case, newlines apart from other space. %s: a number.
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
GPT4 = rf"{CONTRACTION}|{WORD}|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACE}"
SEED_CODER = rf"{CONTRACTION}|{WORD}|{DIGIT}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACE}"
# As in GPT-4o's: a word also ends before a capital letter. %s: what may follow a word, twice, and a number.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LEAD = r"[^\r\n\p{L}\p{N}]?"
GPT4O = rf"{LEAD}{UPPER}*{LOWER}+%s|{LEAD}{UPPER}+{LOWER}*%s|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACE}"
DEEPSEEK = r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + SPACE
# Letters with two cases, as far as an older Unicode has them: hexadecimal code points, one or first-last.
CASED = """
    41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5 3F7-481
    48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45
    1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC
    1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E
    2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06
    FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"""
SIGNS = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
ASIAN, HAN_KANA = "4E00-9FA5 800-4E00 AC00-D7FF", "4E00-9FA5 3040-30FF"
FULL_STOPS = "2026 3002 FF0C 3001 964 6D4 60C"


def _points(hexadecimal: str) -> str:
    """These code points and ranges, as they are written between the brackets of a regular expression."""
    return re.sub("[0-9A-F]+", r"\\x{\g<0>}", hexadecimal).replace(" ", "").replace("\n", "")


class Rules(NamedTuple):
    """What `tokenizer.ggml.pre` stands for. splits: regular expressions that cut a text one after another; both what they match
    and what lies between stays. whole_tokens: a piece that is a token is not put together by merges. bos: added by default."""

    splits: tuple[str, ...]
    whole_tokens: bool = False
    bos: bool = False
    nfc: bool = False


# The names are those of llama.cpp's converter; what they mean is in its src/llama-vocab.cpp, and in the tokenizer.json that each was
# made from. Where the two differ the latter counts, as the model was trained with it: Qwen2 normalizes (NFC), words of Tekken and
# GPT-4o end by the Unicode categories of their letters, and \s is all white space.
_LLAMA3 = (GPT4 % THREE_DIGITS,)
_QWEN2 = (GPT4 % DIGIT,)
_NAMED = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling mellum gigachat exaone4 a.x-4.0": Rules((GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Rules((DIGIT, GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Rules(_LLAMA3, whole_tokens=True, bos=True),
    "smaug-bpe dbrx": Rules(_LLAMA3),
    "minicpm5": Rules((THREE_DIGITS, GPT4 % DIGITS), whole_tokens=True),
    "qwen2 deepseek-r1-qwen": Rules(_QWEN2, nfc=True),
    "megrez kormo stablelm2 hunyuan solar-open grok-2": Rules(_QWEN2),
    "seed-coder": Rules((SEED_CODER,)),
    "tekken": Rules((GPT4O % ("", "", DIGIT),), whole_tokens=True, bos=True),
    "gpt-4o llama4": Rules((GPT4O % (f"{CONTRACTION}?", f"{CONTRACTION}?", THREE_DIGITS),)),
    "deepseek-llm": Rules(
        (r"[\r\n]", rf"\s?[{_points(CASED)}]+", rf"\s?[{_points(SIGNS)}]+", r"\s+$", f"[{_points(ASIAN)}]+", DIGITS)
    ),
    "deepseek-coder": Rules((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{_points(ASIAN)}]+", DIGIT)),
    "deepseek-v3 hunyuan-dense": Rules((THREE_DIGITS, f"[{_points(HAN_KANA)}]+", DEEPSEEK)),
    "falcon": Rules((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")),
    "viking": Rules((rf" ?[^(\s|.,!?{_points(FULL_STOPS)})]+", DIGIT)),
    "default": Rules((r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, r"[0-9][0-9][0-9]")),
}
PRE = {name: rules for names, rules in _NAMED.items() for name in names.split()}
KINDS = ("gpt2", "llama")
# What ends a text besides eos: the end of a turn, and that of a message within one.
STOPS = ("eot", "eom")


class Described(NamedTuple):
    """tokenizer, and the files that carry it to other tools: name -> bytes."""

    tokenizer: Tokenizer
    files: dict[str, bytes]


def read(file: gguf_file.File) -> Described | None:
    """The tokenizer of the file, with its chat template; None if the file has none. ValueError for a kind or rules not known here.

    bos_id is None where the file says that no bos is added (`add_bos_token`): then none is in front of a prompt either.
    """
    kind = file.get("tokenizer.ggml.model", str, None)
    if kind is None or kind == "none":
        return None
    if kind not in KINDS:
        raise ValueError(_unknown(file, "tokenizer.ggml.model", kind, KINDS))
    tokens = file.get("tokenizer.ggml.tokens", list)
    kinds = file.get("tokenizer.ggml.token_type", list, None) or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise ValueError(_lengths(file, "tokenizer.ggml.token_type", len(kinds), len(tokens)))
    make = _byte_level if kind == "gpt2" else _sentencepiece
    return make(file, tokens, kinds)


def _byte_level(file: gguf_file.File, tokens: list[str], kinds: list[int]) -> Described:
    name = file.get("tokenizer.ggml.pre", str, None)
    if name is None:
        logging.warning("%s does not say tokenizer.ggml.pre: text is split by the 'default' rules, as llama.cpp does", file.path)
        name = "default"
    if name not in PRE:
        raise ValueError(_unknown(file, "tokenizer.ggml.pre", name, tuple(PRE)))
    special = _special(file, tokens, add_bos=PRE[name].bos)
    before = {} if special.bos_id is None else {special.names["bos_token"]: special.bos_id}
    definition = huggingface.framed(_definition(file, tokens, kinds, PRE[name]), before, {})
    template = _template(file, special.names)
    try:
        tokenizer = huggingface.HuggingFaceTokenizer(
            definition,
            bos_id=special.bos_id,
            eos_id=special.eos_id,
            pad_id=special.pad_id,
            other_stop_ids=special.other_stop_ids,
            template=template,
        )
    except files.NotATokenizer as error:
        raise ValueError(_damaged(file, error)) from error
    return Described(tokenizer, {huggingface.FILE: definition, **_settings(special, template, "PreTrainedTokenizerFast")})


def _definition(file: gguf_file.File, tokens: list[str], kinds: list[int], rules: Rules) -> bytes:
    """A tokenizer.json with these tokens, merges and rules."""
    twice = next((token for token, count in Counter(tokens).items() if count > 1), None)
    if twice is not None:
        raise ValueError(_damaged(file, f"token '{twice}' is there twice"))
    merges = [merge.split(" ", 1) for merge in file.get("tokenizer.ggml.merges", list)]
    splits = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in rules.splits]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if rules.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rules.whole_tokens,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(definition, ensure_ascii=False).encode()


def _sentencepiece(file: gguf_file.File, tokens: list[str], kinds: list[int]) -> Described:
    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise ValueError(_lengths(file, "tokenizer.ggml.scores", len(scores), len(tokens)))
    special = _special(file, tokens, add_bos=True)
    kinds = _one_unknown(kinds, special.given["unk"])
    model = b"".join(_pieces(tokens, scores, kinds)) + _trainer(special, kinds, len(tokens)) + _normalizer(file)
    template = _template(file, special.names)
    try:
        tokenizer = sentencepiece.SentencePieceTokenizer(
            model,
            bos_id=special.bos_id,
            eos_id=special.eos_id,
            pad_id=special.pad_id,
            exact=False,
            other_stop_ids=special.other_stop_ids,
            template=template,
        )
    except files.NotATokenizer as error:
        raise ValueError(_damaged(file, error)) from error
    return Described(tokenizer, {sentencepiece.FILE: model, **_settings(special, template, "LlamaTokenizer")})


def _one_unknown(kinds: Sequence[int], unknown: int | None) -> list[int]:
    """SentencePiece has a single token for what it does not know; converters also give that type to rows that only fill the table."""
    if unknown is None and UNKNOWN in kinds:
        unknown = kinds.index(UNKNOWN)
    return [UNKNOWN if index == unknown else UNUSED if kind == UNKNOWN else kind for index, kind in enumerate(kinds)]


def _pieces(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> Iterator[bytes]:
    """ModelProto.pieces (field 1): piece, score, type. Field numbers are those of sentencepiece_model.proto."""
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        yield _message(1, _bytes(1, token.encode()) + _tag(2, 5) + struct.pack("<f", score) + _number(3, kind))


def _trainer(special: "Special", kinds: Sequence[int], size: int) -> bytes:
    """ModelProto.trainer_spec (field 2): byte-pair encoding, which falls back to bytes if there are any."""
    ids = [(40, kinds.index(UNKNOWN) if UNKNOWN in kinds else None), (41, special.given["bos"]), (42, special.given["eos"])]
    fields = [(3, 2), (4, size), (35, int(BYTE in kinds)), *ids, (43, special.given["pad"])]
    return _message(2, b"".join(_number(number, -1 if value is None else value) for number, value in fields))


def _normalizer(file: gguf_file.File) -> bytes:
    """ModelProto.normalizer_spec (field 3): no change of characters; a space before the text unless the file says otherwise."""
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    squeeze = file.get("tokenizer.ggml.remove_extra_whitespaces", bool, False)
    return _message(3, _bytes(1, b"identity") + _number(3, int(prefix)) + _number(4, int(squeeze)) + _number(5, 1))


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(number: int, value: int) -> bytes:
    return _tag(number, 0) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _tag(number, 2) + _varint(len(value)) + value


_message = _bytes


class Special(NamedTuple):
    """given: ids as the file names them. names: {"bos_token": "<s>", ...}. bos_id: None where no bos is added to a text."""

    given: dict[str, int | None]
    names: dict[str, str]
    adds_bos: bool

    @property
    def bos_id(self) -> int | None:
        return self.given["bos"] if self.adds_bos else None

    @property
    def eos_id(self) -> int | None:
        return self.given["eos"]

    @property
    def pad_id(self) -> int:
        return self.given["pad"] or 0

    @property
    def other_stop_ids(self) -> tuple[int, ...]:
        ids = dict.fromkeys(self.given[name] for name in STOPS)
        return tuple(index for index in ids if index is not None and index != self.eos_id)


def _special(file: gguf_file.File, tokens: Sequence[str], add_bos: bool) -> Special:
    keys = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}
    keys |= {name: f"{name}_token_id" for name in STOPS}
    given = {name: file.get(f"tokenizer.ggml.{key}", int, None) for name, key in keys.items()}
    for name, index in given.items():
        if index is not None and not 0 <= index < len(tokens):
            raise ValueError(
                f"'{file.path}' says tokenizer.ggml.{keys[name]} = {index}.\n  Accepted: 0 to {len(tokens) - 1}, as it has"
                f" {len(tokens)} tokens.\n  Take another file of the model."
            )
    names = {f"{name}_token": tokens[index] for name, index in given.items() if index is not None and name not in STOPS}
    return Special(given, names, file.get("tokenizer.ggml.add_bos_token", bool, add_bos))


def _template(file: gguf_file.File, names: dict[str, str]) -> chat_template.ChatTemplate | None:
    text = file.get("tokenizer.chat_template", str, None)
    return None if text is None else chat_template.ChatTemplate(text, names)


def _settings(special: Special, template: chat_template.ChatTemplate | None, class_name: str) -> dict[str, bytes]:
    """tokenizer_config.json, generation_config.json and chat_template.jinja, as a Hugging Face directory has them."""
    settings: dict[str, Any] = {"tokenizer_class": class_name, "add_bos_token": special.adds_bos, "add_eos_token": False}
    settings |= {"clean_up_tokenization_spaces": False, **special.names}
    ids: dict[str, Any] = {
        f"{name}_token_id": special.given[name] for name in ("bos", "eos", "pad") if special.given[name] is not None
    }
    if special.eos_id is not None and special.other_stop_ids:
        ids["eos_token_id"] = [special.eos_id, *special.other_stop_ids]
    out = {"tokenizer_config.json": _json(settings), "generation_config.json": _json(ids)}
    if template is not None:
        out["chat_template.jinja"] = template.text.encode()
    return out


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _unknown(file: gguf_file.File, key: str, name: str, known: Sequence[str]) -> str:
    return (
        f"'{file.path}' says {key} = '{name}', whose rules are not known here.\n  Accepted: {', '.join(known)}.\n"
        "  Take the Hugging Face directory of the model, which holds its tokenizer.json."
    )


def _lengths(file: gguf_file.File, key: str, count: int, tokens: int) -> str:
    return (
        f"'{file.path}' has {count} entries in {key} for {tokens} tokens.\n  Accepted: one for each token.\n"
        "  The file is damaged: fetch it again."
    )


def _damaged(file: gguf_file.File, error: object) -> str:
    return (
        f"the tokenizer in '{file.path}' cannot be used: {error}.\n  Accepted: tokens that differ, with the merges or the scores that"
        " belong to them.\n  Take another file of the model, or its Hugging Face directory."
    )
