"""The files of a tokenizer in a directory of transformers: their names, and how those of our own tokenizers are made.

A tokenizer.json gives the ids that ours gives, with two exceptions: a text that spells a special token becomes that token, as it
always does in transformers; and a U+2581, which the vocabularies of SentencePiece use for a space, is read as a space.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.data import tokenize
from jaxllm.data.tokenizers import added as added_tokens
from jaxllm.data.tokenizers import huggingface
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.data.tokenizers.char import CharTokenizer
from jaxllm.data.tokenizers.huggingface import HuggingFaceTokenizer
from jaxllm.data.tokenizers.sentencepiece import SPACE_MARK, SentencePieceTokenizer
from jaxllm.types import Tokenizer

# Any of these is a whole tokenizer (vocab.json together with merges.txt).
DEFINITIONS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
SETTINGS = "tokenizer_config.json"
NAMES = (
    *DEFINITIONS,
    "merges.txt",
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Whether bos stands before a text and eos behind it, by the kind of the model: as it was trained, and as it reads prompts.
FRAMES = {"decoder": (True, False), "encoder": (True, True), "encoder_decoder": (False, True)}
# Score of pieces that no text is to be cut into: bytes and special tokens.
NEVER = -1e6


class Piece(NamedTuple):
    """A token of SentencePiece. learnt: it is neither special nor a byte."""

    text: str
    score: float
    learnt: bool


class Made(NamedTuple):
    """files: name -> bytes. notes: lines for the user."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


NOTHING = Made({})


def make(tokenizer: Any, context_tokens: int, kind: str) -> Made:
    """The files from which transformers makes an equal tokenizer, or those that come closest and a note.

    kind: that of the model (models.architecture.Family.kind), which says what stands around a text.
    """
    if isinstance(tokenizer, SentencePieceTokenizer) and not tokenizer.exact:
        names = {
            name: tokenizer.processor.id_to_piece(index) for name, index in _ids(tokenizer).items() if index < tokenizer.pieces
        }
        note = "tokenizer.model is written without a tokenizer.json, which cannot express it exactly"
        return Made({"tokenizer.model": tokenizer.model, SETTINGS: _settings(tokenizer, names, context_tokens)}, (note,))
    if isinstance(tokenizer, HuggingFaceTokenizer):
        definition = tokenizer.definition
        names = {name: tokenizer.tokenizer.id_to_token(index) for name, index in _ids(tokenizer).items()}
    elif isinstance(tokenizer, SentencePieceTokenizer):
        definition, names = _finish(tokenizer, kind, *_sentencepiece(tokenizer))
    elif isinstance(tokenizer, ByteTokenizer):
        definition, names = _finish(tokenizer, kind, *_byte())
    elif isinstance(tokenizer, CharTokenizer):
        definition, names = _finish(tokenizer, kind, *_char(tokenizer))
    else:
        raise TypeError(f"a tokenizer of class {type(tokenizer).__name__} has no files")
    return Made({"tokenizer.json": definition, SETTINGS: _settings(tokenizer, names, context_tokens)})


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special ids that there are; a pad id that is also text is none."""
    special = tokenize.special_ids(tokenizer)
    found = {name: getattr(tokenizer, f"{name}_id") for name in added_tokens.NAMES}
    return {name: index for name, index in found.items() if index is not None and index in special}


def _settings(tokenizer: Any, names: Mapping[str, str], context_tokens: int) -> bytes:
    fast = not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.exact
    added = {} if fast else {str(index): _special_token(token) for token, index in tokenizer.tokens.items()}
    template = getattr(tokenizer, "template", None)
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if fast else "LlamaTokenizer",
        "model_max_length": context_tokens,
        "clean_up_tokenization_spaces": False,
        # A template may have tokens that nothing else uses.
        **(template.names if template else {}),
        **{f"{name}_token": token for name, token in names.items()},
        **({"chat_template": template.text} if template else {}),
        **({} if fast else {"add_bos_token": tokenizer.bos_id is not None}),
        **({"added_tokens_decoder": added} if added else {}),
    }
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _special_token(token: str) -> dict[str, Any]:
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def _finish(tokenizer: Any, kind: str, made: Any, named: Mapping[int, str]) -> tuple[bytes, dict[str, str]]:
    """(tokenizer.json, name of each special token) of the library's tokenizer `made`, after adding the special tokens.

    named: id -> spelling of the tokens that already have one.
    """
    tokenizers = huggingface.library()
    ids = _ids(tokenizer)
    special = {name: named.get(index, added_tokens.NAMES[name]) for name, index in ids.items()}
    spelled = {index: special[name] for name, index in ids.items()} | added_tokens.names(tokenizer.sentinel_ids)
    spelled |= {tokenizer.special_tokens[token]: token for token in tokenizer.extra.tokens}
    added = [tokenizers.AddedToken(spelled[index], special=True, normalized=False) for index in sorted(spelled)]
    # They get the ids above the vocabulary in this order, or those that they have.
    made.add_special_tokens(added)
    wrong = {text: made.token_to_id(text) for index, text in spelled.items() if made.token_to_id(text) != index}
    if wrong:
        raise ValueError(
            f"the special tokens {wrong} would get other ids.\n  Accepted: special tokens above or inside the vocabulary.\n"
            "  Train the tokenizer again."
        )
    around = zip(("bos", "eos"), FRAMES[kind], strict=True)
    before, after = ({special[name]: ids[name]} if wanted and name in ids else {} for name, wanted in around)
    return huggingface.framed(made.to_str().encode(), before, after), special


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[Any, dict[int, str]]:
    """Of one that was trained here: no normalization but a mark for each space, and bytes for unknown characters."""
    tokenizers = huggingface.library()
    pb2: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = pb2.ModelProto.FromString(tokenizer.model)
    kind, normal = proto.trainer_spec.model_type, proto.SentencePiece.NORMAL
    pieces = [Piece(piece.piece, piece.score, piece.type == normal) for piece in proto.pieces]
    made = (_unigram if kind == proto.trainer_spec.UNIGRAM else _bpe)(pieces, tokenizer.processor.unk_id())
    made.normalizer = tokenizers.normalizers.Replace(" ", SPACE_MARK)
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    return made, {index: piece.text for index, piece in enumerate(pieces) if tokenizer.processor.is_control(index)}


def _unigram(pieces: Sequence[Piece], unknown: int) -> Any:
    """Special tokens and bytes are so unlikely that no text is cut into them, and unknown characters are less likely still."""
    tokenizers = huggingface.library()
    scores = [(piece.text, piece.score if piece.learnt else NEVER) for piece in pieces]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unknown, byte_fallback=True))
    # No piece holds an unknown character, so they can be taken apart: else one would make "<s>" likelier than its letters.
    known = "".join(rf"\x{{{ord(piece.text):X}}}" for piece in pieces if piece.learnt and len(piece.text) == 1)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"[^{known}]"), "isolated")
    return made


def _bpe(pieces: Sequence[Piece], unknown: int) -> Any:
    """The earlier a piece was learnt (the higher its score), the earlier it is put together, from whichever two parts are at hand."""
    tokenizers = huggingface.library()
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    learnt = {piece.text for piece in pieces if piece.learnt}
    merges = [
        (piece.text[:cut], piece.text[cut:])
        for piece in sorted(pieces, key=lambda piece: -piece.score)
        for cut in range(1, len(piece.text))
        if piece.learnt and {piece.text[:cut], piece.text[cut:]} <= learnt
    ]
    model = tokenizers.models.BPE(vocabulary, merges, unk_token=pieces[unknown].text, byte_fallback=True, fuse_unk=True)
    return tokenizers.Tokenizer(model)


def _byte() -> tuple[Any, dict[int, str]]:
    """A byte-level vocabulary without merges: the library spells each byte as one visible character."""
    tokenizers = huggingface.library()
    visible = {byte: chr(byte) for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    hidden = (byte for byte in range(256) if byte not in visible)
    spelled = visible | {byte: chr(256 + order) for order, byte in enumerate(hidden)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE({text: byte for byte, text in spelled.items()}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made, {}


def _char(tokenizer: CharTokenizer) -> tuple[Any, dict[int, str]]:
    tokenizers = huggingface.library()
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(tokenizer.ids)))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    return made, {}
