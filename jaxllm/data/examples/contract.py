"""What every data side provides. Letters: N stored rows, B batch, T row length, S length of an encoder's row."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data.documents import CONVERSED, Document
from jaxllm.data.shards import Block, Column, Totals
from jaxllm.data.tokenizers.added import NONE, Added

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer


class MakeBatch(Protocol):
    """Turns stored arrays [B, ...] of the rows with these numbers [B] into the arrays of `types.Batch`.

    Noise depends on (seed, step, number of the row) alone.
    """

    def __call__(self, stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]: ...


class Array(NamedTuple):
    """An array [B, width] of a batch."""

    width: int
    dtype: type


class Piece(NamedTuple):
    """A piece of a text. trained: whether its tokens are predictions that count; None where there is nothing to tell apart."""

    text: str
    trained: bool | None = None


class Shown(NamedTuple):
    """A part of a row for a reader: what it is, and its text in pieces."""

    title: str
    pieces: Sequence[Piece]


# show(the arrays [T] of one row of a batch, tokenizer, names of the classes) -> what the model reads and what it is to predict.
Show = Callable[[Mapping[str, np.ndarray], "Tokenizer", tuple[str, ...]], Iterator[Shown]]


@dataclass(frozen=True)
class Examples:
    """The data side of one objective for one config.

    reads: what a document has besides its text: "text" (nothing), "target" (a second text), "label" or "labels" (one a word); or
        one of CONVERSED: "messages", those of a conversation, "pairs" or "labelled", its answers, too, or "prompts", its other fields.
    unit: what documents are called, where some are left out of the rows.
    added: special tokens that the tokenizer must have.
    recipe: the config values that the stored rows depend on, besides those of the text and the tokenizer.
    columns(vocab_size): the stored arrays by name.
    arrays: the arrays of a batch by name.
    pack(documents, tokenizer, labels, totals): blocks of stored rows. `labels` are the names of the classes.
    batch(tokenizer): what makes batches of stored rows.
    show: a row of a batch as text.
    spell(document): all that the tokenizer will have to encode of a document, if that is more than its texts.
    """

    columns: Callable[[int], Mapping[str, Column]]
    arrays: Mapping[str, Array]
    pack: Callable[[Iterable[Document], "Tokenizer", tuple[str, ...], Totals], Iterator[Block]]
    batch: Callable[["Tokenizer"], MakeBatch]
    show: Show
    reads: str = "text"
    unit: str = "conversations"
    added: Added = NONE
    recipe: Mapping[str, Any] = field(default_factory=dict)
    spell: Callable[[Document], list[str]] | None = None

    def texts(self, document: Document) -> list[str]:
        """All that the tokenizer will have to encode of a document."""
        if self.spell is not None:
            return self.spell(document)
        target = document.target if self.reads == "target" else None
        return [text for text in (document.text, document.pair, target) if isinstance(text, str)]

    @property
    def converses(self) -> bool:
        """Whether documents are conversations, which a chat template writes."""
        return self.reads in CONVERSED

    @property
    def tokens_a_row(self) -> int:
        """Positions that the model computes a row, padding included: those of the encoder, too."""
        return sum(array.width for name, array in self.arrays.items() if name in ("tokens", "inputs"))


def row_tokens(config: ConfigDict) -> int:
    """Tokens a row; with span_corruption tokens that the encoder reads."""
    return config.data.row_tokens or config.model.context_tokens


def decoder_arrays(width: int) -> dict[str, Array]:
    """What every objective's batch has."""
    integers = {name: Array(width, np.int32) for name in ("tokens", "targets", "segments", "positions")}
    return integers | {"weights": Array(width, np.float32)}


def encoder_arrays(width: int) -> dict[str, Array]:
    """What an encoder reads."""
    return {name: Array(width, np.int32) for name in ("inputs", "input_segments", "input_positions")}


def count_positions(segments_BT: np.ndarray) -> np.ndarray:
    """int32 [B, T]: distance to the first token of the same segment in the row."""
    place = np.arange(segments_BT.shape[1], dtype=np.int32)
    starts = np.diff(segments_BT, axis=1, prepend=-1) != 0
    return place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)


def shift_right(targets_BT: np.ndarray, positions_BT: np.ndarray, start_id: int) -> np.ndarray:
    """int32 [B, T]: what a decoder reads to predict the targets: at each segment's start `start_id`, else the target before."""
    return np.where(positions_BT == 0, start_id, np.roll(targets_BT, 1, axis=1)).astype(np.int32)


def spans(segments_T: np.ndarray) -> Iterator[tuple[int, slice]]:
    """(number, where it is in the row) of each segment but padding, in order."""
    for number in dict.fromkeys(segments_T[segments_T > 0].tolist()):
        places = np.flatnonzero(segments_T == number)
        yield number, slice(int(places[0]), int(places[-1]) + 1)
