"""Which tokens begin a word, whatever way a tokenizer has to say so."""

from typing import TYPE_CHECKING

import numpy as np

from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.data.tokenizers.char import CharTokenizer
from jaxllm.data.tokenizers.huggingface import HuggingFaceTokenizer
from jaxllm.data.tokenizers.sentencepiece import SentencePieceTokenizer

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

# Byte-level BPE spells bytes as characters: these are a space, a newline, a tab and a carriage return.
BYTE_LEVEL_BLANKS = "\u0120\u010a\u0109\u010d"
SPACE_MARK = "\u2581"
CONTINUES = "##"
BLANK_BYTES = ("<0x20>", "<0x0A>", "<0x09>", "<0x0D>")


def word_starts(tokenizer: "Tokenizer") -> np.ndarray:
    """bool [V]: whether a token begins a word: it has the mark of a space at its start, or lacks the mark of a word's rest (##).

    White space belongs to the word behind it. The first token of a text begins a word anyway, and a special token stands alone.
    """
    pieces = _pieces(tokenizer)
    # Some pieces of a byte-level vocabulary start with ##, too, and some of BERT's are single letters that look like marks.
    if sum(piece.startswith(CONTINUES) for piece in pieces) > sum(map(_opens, pieces)):
        return np.array([not piece.startswith(CONTINUES) for piece in pieces])
    return np.array([_opens(piece) for piece in pieces])


def _opens(piece: str) -> bool:
    return piece[:1].isspace() or piece.startswith((SPACE_MARK, *BYTE_LEVEL_BLANKS)) or piece in BLANK_BYTES


def _pieces(tokenizer: "Tokenizer") -> list[str]:
    """How the tokenizer itself spells each token; empty for one that has no spelling."""
    size = tokenizer.vocab_size
    made: object = tokenizer
    if isinstance(made, SentencePieceTokenizer):
        own = [made.processor.id_to_piece(index) for index in range(made.pieces)]
    elif isinstance(made, HuggingFaceTokenizer):
        own = [made.tokenizer.id_to_token(index) or "" for index in range(size)]
    elif isinstance(made, CharTokenizer):
        own = list(made.characters)
    elif isinstance(made, ByteTokenizer):
        own = [chr(byte) if byte < 128 else "" for byte in range(256)]
    else:
        own = [tokenizer.decode([index]) for index in range(size)]
    return own + [""] * (size - len(own))
