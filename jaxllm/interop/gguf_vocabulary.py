"""The metadata of a tokenizer in a GGUF file: the inverse of `gguf_tokenizer.read`.

llama.cpp knows two kinds that can be ours: "gpt2", byte-level byte-pair encoding, whose rules it takes from a name
(`tokenizer.ggml.pre`), and "llama", SentencePiece's byte-pair encoding with bytes for unknown characters. Whatever is made here is read
back and compared with the tokenizer it was made from; a tokenizer from a GGUF file goes out as it came, byte for byte.
"""

import importlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.data import tokenize
from jaxllm.data.tokenizers import added, chat_template
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.data.tokenizers.huggingface import HuggingFaceTokenizer
from jaxllm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from jaxllm.interop import gguf_definition, gguf_file, gguf_tokenizer, gguf_write, tokenizer_files
from jaxllm.interop.gguf_definition import KEY, Described, Tokens, refuse
from jaxllm.interop.gguf_tokenizer import CONTROL, NORMAL, PRE, STOPS, UNKNOWN, UNUSED, USER_DEFINED
from jaxllm.types import Tokenizer

# Among the files that a run carries: the tokenizer of the GGUF file that it comes from, in a GGUF file of its own.
FILE = "vocabulary.gguf"
# Names of the special tokens in the metadata -> in tokenizer_config.json.
SPECIALS = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk", "mask": "mask"}
# Cut by one set of rules in this way and by another in that.
PROBE = (
    "Hello, world! I'm WE'LL  two   spaces\n\n\ttabs\r\n 1234567 3.14 x2y½² (a+b)*c=d_e; don't/do\\it #1\n\nfoo()  {bar: [1]}\n"
    "Grüße, naïve café, e\u0301, ЖЗ, 日本語のテキスト, 한국어, עברית, हिन्दी, 🙂👩‍🚀\u00a0\u3000…“quoted”—dash<tag>$5^2~|`\0 "
)


class Made(NamedTuple):
    """entries: key -> bytes of the line. notes: lines for the user about what llama.cpp does in another way."""

    entries: Mapping[str, bytes]
    notes: tuple[str, ...]


def make(tokenizer: Tokenizer | None, carried: Mapping[str, bytes], rows: int) -> Made:
    """The metadata; `rows` of the embedding without a token get a token that is not used, as llama.cpp wants one for each.

    carried: files of the model that this one comes from. ValueError for a tokenizer that llama.cpp lacks.
    """
    if tokenizer is None:
        raise refuse("the model has no tokenizer", "Fetch its tokenizer files")
    if FILE in carried:
        values, entries = gguf_file.metadata(carried[FILE])
        tokens = values[f"{KEY}.tokens"]
        kinds = values.get(f"{KEY}.token_type") or [NORMAL] * len(tokens)
        filled = _fill(Tokens(tokens, kinds, values.get(f"{KEY}.scores")), rows)
        changed = _entries(_lists(filled)) if len(tokens) < rows else {}
        return Made({**{key: bytes(data) for key, data in entries.items()}, **changed}, _notes(values))
    made = _tokens(tokenizer)
    tokens = _fill(made.tokens, rows)
    values = {**made.values, **_lists(tokens), **_special(tokenizer, tokens, _names(tokenizer, carried))}
    template = getattr(tokenizer, "template", None)
    values |= {"tokenizer.chat_template": template.text} if template else {}
    _check(tokenizer, values)
    notes = (*made.notes, *_notes(values))
    if unnamed := tokenize.stop_ids(tokenizer)[1 + len(STOPS) :]:
        notes += (
            f"a GGUF file names three tokens that end a text; these go without: {gguf_file.listed([str(i) for i in unnamed])}",
        )
    return Made(_entries(values), notes)


def _tokens(tokenizer: Any) -> Described:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece(tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return gguf_definition.describe(tokenizer.definition)
    if isinstance(tokenizer, ByteTokenizer):
        made = tokenizer_files.make(tokenizer, 0, "decoder").files["tokenizer.json"]
        return gguf_definition.describe(made)
    raise refuse(
        "llama.cpp has no tokenizer of characters: it would need the bytes of all others, and a token that ends a text, where it takes"
        " token 11 for one",
        "Train with tokenizer.kind = 'bpe' or 'byte'",
    )


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Described:
    """As the model file has them; tokens that were added above it (a mask, sentinels, those of a chat template) are special."""
    pb2: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = pb2.ModelProto.FromString(tokenizer.model)
    spec, trained = proto.normalizer_spec, proto.trainer_spec
    if trained.model_type != trained.BPE:
        raise refuse(
            "llama.cpp gives a SentencePiece model that is no byte-pair encoding (unigram) no bytes for what its pieces do not spell,"
            " such as a newline: its ids would be others",
            "Train with tokenizer.kind = 'bpe'",
        )
    if spec.precompiled_charsmap or not spec.escape_whitespaces or trained.treat_whitespace_as_suffix:
        raise refuse(
            f"the SentencePiece model changes characters ('{spec.name}') or places spaces in another way, which GGUF does not say",
            "Take a model with the normalization 'identity'",
        )
    pieces: list[Any] = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    named = {getattr(tokenizer, f"{name}_id"): text for name, text in added.NAMES.items()}
    named |= added.names(tokenizer.sentinel_ids) | {index: token for token, index in tokenizer.tokens.items()}
    pieces += [(named[index], 0.0, CONTROL) for index in range(len(pieces), tokenizer.vocab_size)]
    tokens, scores, kinds = (list(column) for column in zip(*pieces, strict=True))
    prefix, squeeze = bool(spec.add_dummy_prefix), bool(spec.remove_extra_whitespaces)
    return gguf_definition.sentencepiece(Tokens(tokens, kinds, scores), prefix=prefix, squeeze=squeeze)


def _fill(tokens: Tokens, rows: int) -> Tokens:
    """With a token that is not used for each id, or row of the embedding, without one; llama.cpp wants texts that differ."""
    missing = [None] * (rows - len(tokens.texts))
    texts = [f"[PAD{index}]" if text is None else text for index, text in enumerate([*tokens.texts, *missing])]
    twice = [text for text, count in Counter(texts).items() if count > 1]
    if twice:
        raise refuse(f"it has tokens twice: {gguf_file.listed(twice)}", "Take a tokenizer whose tokens differ")
    scores = None if tokens.scores is None else [*tokens.scores, *[0.0] * len(missing)]
    return Tokens([*texts], [*tokens.kinds, *[UNUSED] * len(missing)], scores)


def _lists(tokens: Tokens) -> dict[str, Any]:
    lists = {"tokens": tokens.texts, "token_type": tokens.kinds, "scores": tokens.scores}
    return {f"{KEY}.{name}": value for name, value in lists.items() if value is not None}


def _special(tokenizer: Tokenizer, tokens: Tokens, names: Mapping[str, str]) -> dict[str, Any]:
    """Ids of special tokens, and which of them stand around a text: bos where `generate` puts it, eos nowhere."""
    if tokenizer.eos_id is None:
        raise refuse(
            "no token of it ends a text (eos), and llama.cpp takes one of its own choice then",
            "Name an eos_token in tokenizer_config.json",
        )
    special = tokenize.special_ids(tokenizer)
    own = {name: getattr(tokenizer, f"{ours}_id", None) for name, ours in SPECIALS.items()}
    ids: dict[str, int | None] = {name: index for name, index in own.items() if index in special}
    # A bos that begins no text, and the unknown token, may be there by name alone.
    for name in ("bos", "unknown"):
        if ids.get(name) is None and names.get(f"{SPECIALS[name]}_token") in tokens.texts:
            ids[name] = tokens.texts.index(names[f"{SPECIALS[name]}_token"])
    if UNKNOWN in tokens.kinds:
        ids["unknown"] = tokens.kinds.index(UNKNOWN)
    ids |= dict(zip(STOPS, tokenize.stop_ids(tokenizer)[1:], strict=False))
    out: dict[str, Any] = {f"{KEY}.{name}_token_id": index for name, index in ids.items() if index is not None}
    return out | {f"{KEY}.add_bos_token": tokenizer.bos_id is not None, f"{KEY}.add_eos_token": False}


def _names(tokenizer: Tokenizer, carried: Mapping[str, bytes]) -> dict[str, str]:
    """Special tokens by their names in tokenizer_config.json, from that file or from what a chat template is given."""
    template = getattr(tokenizer, "template", None)
    settings = json.loads(carried.get(tokenizer_files.SETTINGS, b"{}"))
    return {**(template.names if template else {}), **chat_template.names(settings)}


def _check(tokenizer: Tokenizer, values: Mapping[str, Any]) -> None:
    """ValueError unless the metadata, read back, give the ids that the tokenizer gives."""
    described = gguf_tokenizer.read(gguf_file.File(Path("of the export"), values, {}))
    found = None if described is None else described.tokenizer.encode(PROBE)
    if found != tokenizer.encode(PROBE):
        raise refuse(
            f"as '{values[f'{KEY}.model']}' with the rules '{values[f'{KEY}.pre']}' it would give a text other ids",
            "Take a model with another tokenizer",
        )


def _notes(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What llama.cpp does in another way with such a tokenizer."""
    notes = []
    if values[f"{KEY}.model"] == "gpt2":
        if PRE[values.get(f"{KEY}.pre", "default")].nfc:
            notes.append("llama.cpp does not normalize text (NFC): characters that a text spells in parts get other ids there")
        return tuple(notes)
    if values.get(f"{KEY}.remove_extra_whitespaces"):
        notes.append("llama.cpp keeps spaces in a row, which this tokenizer makes one: such texts get other ids there")
    if values.get(f"{KEY}.add_space_prefix", True) and USER_DEFINED in (values.get(f"{KEY}.token_type") or []):
        notes.append("llama.cpp puts a space also behind tokens that a text spells, which this tokenizer does not")
    return tuple(notes)


def _entries(values: Mapping[str, Any]) -> dict[str, bytes]:
    return {key: gguf_write.entry(key, value) for key, value in values.items()}
