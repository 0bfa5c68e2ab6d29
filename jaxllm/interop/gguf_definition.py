"""A tokenizer.json in the words of a GGUF file, where they say the same; ValueError where they cannot."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxllm.data.tokenizers.sentencepiece import SPACE_MARK
from jaxllm.interop.gguf_tokenizer import BYTE, CONTROL, NORMAL, PRE, UNKNOWN, UNUSED, USER_DEFINED, Rules

KEY = "tokenizer.ggml"
# The rules that the pre-tokenizer ByteLevel has by itself.
(BYTE_LEVEL,) = PRE["gpt-2"].splits
# Other spellings of a part of a regular expression -> that of PRE.
SPELLINGS = {"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": "(?i:'s|'t|'re|'ve|'m|'ll|'d)"}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
PREFIX = {"type": "Prepend", "prepend": SPACE_MARK}


class Tokens(NamedTuple):
    """By id: texts (None for an id without a token), kinds (`tokenizer.ggml.token_type`), and scores where there are any."""

    texts: list[str | None]
    kinds: list[int]
    scores: list[float] | None = None


class Described(NamedTuple):
    """values: metadata besides the tokens. notes: lines for the user about what llama.cpp does in another way."""

    tokens: Tokens
    values: dict[str, Any]
    notes: tuple[str, ...] = ()


def refuse(what: str, change: str) -> ValueError:
    return ValueError(
        f"the tokenizer cannot go into a GGUF file: {what}.\n  Accepted: byte-level byte-pair encoding with the rules of"
        f" {', '.join(PRE)}; SentencePiece's byte-pair encoding with bytes; tokenizer.kind = 'byte'.\n  {change}, or write --format hf."
    )


def describe(definition: bytes) -> Described:
    """The tokenizer of a tokenizer.json."""
    values = json.loads(definition)
    model = values["model"]
    kind = model.get("type", "BPE")
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if kind != "BPE" or odd:
        what = f"a byte-pair encoding with {', '.join(odd)}" if kind == "BPE" else f"of the kind {kind}"
        raise refuse(f"its tokenizer.json is {what}", "Take a model with another tokenizer")
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    return (_ranked if model.get("byte_fallback") else _byte_level)(values, _tokens(values), pairs)


def sentencepiece(tokens: Tokens, *, prefix: bool, squeeze: bool = False, notes: tuple[str, ...] = ()) -> Described:
    """SentencePiece's byte-pair encoding. prefix: a space is put before a text. squeeze: spaces in a row become one."""
    if tokens.kinds.count(BYTE) != 256:
        raise refuse(
            "its SentencePiece model has no bytes for unknown characters, where llama.cpp ends with an error",
            "Take one that was trained with byte_fallback",
        )
    values = {"model": "llama", "pre": "default", "add_space_prefix": prefix, "remove_extra_whitespaces": squeeze}
    return Described(tokens, {f"{KEY}.{key}": value for key, value in values.items()}, notes)


def _tokens(values: Mapping[str, Any]) -> Tokens:
    model, added = values["model"], values.get("added_tokens", [])
    size = max([*model["vocab"].values(), *(token["id"] for token in added)]) + 1
    texts: list[str | None] = [None] * size
    kinds = [UNUSED] * size
    for text, index in model["vocab"].items():
        texts[index], kinds[index] = text, NORMAL
    for token in added:
        texts[token["id"]], kinds[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return Tokens(texts, kinds)


def _byte_level(values: Mapping[str, Any], tokens: Tokens, pairs: list[tuple[str, ...]]) -> Described:
    normalizers, rules = _steps(values.get("normalizer")), None
    nfc = [step["type"] for step in normalizers] == ["NFC"]
    splits = _splits(_steps(values.get("pre_tokenizer")))
    if splits is not None and (nfc or not normalizers):
        rules = Rules(splits, whole_tokens=bool(values["model"].get("ignore_merges")), nfc=nfc)
    names = [name for name, known in PRE.items() if rules and known._replace(bos=False) == rules]
    if rules and not pairs and not nfc:
        names.append("gpt-2")  # without merges each byte is a token, however a text is cut
    if not names:
        raise refuse(
            f"the rules by which its tokenizer.json cuts a text have no name: {_short(values.get('normalizer'))},"
            f" {_short(values.get('pre_tokenizer'))}, ignore_merges {bool(values['model'].get('ignore_merges'))}",
            "Take a model with another tokenizer",
        )
    made = {"model": "gpt2", "pre": names[0], "merges": [" ".join(pair) for pair in pairs]}
    return Described(tokens, {f"{KEY}.{key}": value for key, value in made.items()})


def _splits(steps: list[Any]) -> tuple[str, ...] | None:
    """The regular expressions of a byte-level pre-tokenizer, one after another; None if it is more than these."""
    found: list[str] = []
    for index, step in enumerate(steps):
        kind, last = step["type"], index == len(steps) - 1
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert") and "Regex" in step["pattern"]:
            found.append(_canonical(step["pattern"]["Regex"]))
        elif kind == "Digits":
            found.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif kind == "ByteLevel" and last and not step["add_prefix_space"]:
            return (*found, BYTE_LEVEL) if step.get("use_regex", True) else tuple(found)
        else:
            return None
    return None


def _canonical(regex: str) -> str:
    for other, ours in SPELLINGS.items():
        regex = regex.replace(other, ours)
    return regex


def _steps(part: Any) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer: those of a sequence, one, or none."""
    if part is None:
        return []
    return part.get("normalizers") or part.get("pretokenizers") or [part] if part["type"] == "Sequence" else [part]


def _ranked(values: Mapping[str, Any], tokens: Tokens, pairs: list[tuple[str, ...]]) -> Described:
    """SentencePiece's encoding as a list of merges. There a piece has a score, whichever two parts it is put together from; so the
    merges of a piece must stand together, and all must be there."""
    prefix, notes = _spaces(values)
    order: dict[str, int] = {}
    last = None
    apart = []
    for pair in pairs:
        piece = "".join(pair)
        if piece != last and piece in order:
            apart.append(piece)
        order.setdefault(piece, len(order))
        last = piece
    unknown = values["model"].get("unk_token") or ""
    kinds = [UNKNOWN if text == unknown else BYTE if _is_byte(text) else kind for text, kind in zip(*tokens[:2], strict=True)]
    pieces = {text for text, kind in zip(tokens.texts, kinds, strict=True) if kind == NORMAL and text is not None}
    known = set(pairs)
    lacking = [cut for piece in pieces for cut in _cuts(piece, pieces) if cut not in known]
    if apart or lacking or values["model"].get("ignore_merges"):
        raise refuse(
            "the merges of its tokenizer.json are not those of a SentencePiece model"
            + (f" (missing: {' '.join(lacking[0])})" if lacking else f" (apart: {apart[0]})" if apart else ""),
            "Take a model with another tokenizer",
        )
    scores = [-float(order.get(text or "", 0)) for text in tokens.texts]
    return sentencepiece(Tokens(tokens.texts, kinds, scores), prefix=prefix, notes=notes)


def _cuts(piece: str, pieces: set[str]) -> Iterator[tuple[str, str]]:
    """Every two parts that a piece can be put together from."""
    for at in range(1, len(piece)):
        cut = piece[:at], piece[at:]
        if all(len(part) == 1 or part in pieces for part in cut):
            yield cut


def _spaces(values: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """(whether a space is put before a text, notes)"""
    normalizers, cutters = _steps(values.get("normalizer")), _steps(values.get("pre_tokenizer"))
    if not cutters and normalizers in ([SPACES], [PREFIX, SPACES]):
        return len(normalizers) == 2, ()
    meta = cutters[0] if len(cutters) == 1 else {}
    if normalizers or meta.get("type") != "Metaspace" or meta.get("split", True) or meta["replacement"] != SPACE_MARK:
        raise refuse(
            f"its tokenizer.json places spaces in another way: {_short(values.get('normalizer'))},"
            f" {_short(values.get('pre_tokenizer'))}",
            "Take a model with another tokenizer",
        )
    prefix = meta["prepend_scheme"] != "never"
    note = "llama.cpp puts a space before a text and behind special tokens also where this tokenizer finds one or needs none"
    return prefix, (note,) if prefix else ()


def _is_byte(text: str | None) -> bool:
    return text is not None and len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _short(part: Any) -> str:
    text = json.dumps(part)
    return text if len(text) <= 300 else f"{text[:300]}..."
