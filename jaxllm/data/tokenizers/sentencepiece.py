"""SentencePiece tokenizers (Kudo & Richardson 2018, arXiv:1808.06226), trained here or loaded from a `tokenizer.model`.

Trained here they lose nothing: no normalization, no added or removed spaces, and a character outside the vocabulary becomes
its UTF-8 bytes. A newline and a tab are one token each (their bytes), and no piece crosses them.
"""

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain, islice
from typing import Any

import sentencepiece
from ml_collections import ConfigDict

from jaxllm.data.tokenizers import added, chat_template, files, located
from jaxllm.data.tokenizers.added import NONE, Added
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.data.tokenizers.located import Located

FILE = "tokenizer.model"
PAD, EOS, BOS, UNKNOWN = range(4)

# Fixed, because unigram training adds up floats thread by thread: another number would give other pieces.
TRAIN_THREADS = 2
TRAIN_BYTES = 10_000_000
PIECE_CHARS = 2048
# Characters that SentencePiece keeps for itself (U+2581 stands for a space, U+2585 for the unknown, tab for a border), and
# newline and NUL. No piece that is learnt contains one of them.
BORDERS = re.compile("[\n\t\r\0\u2581\u2585]+")
SPACE_MARK = "\u2581"
SPACE_MARKS = re.compile(f"({SPACE_MARK})")
PART_CHARS = 4096


class SentencePieceTokenizer:
    """A SentencePiece model and the ids of its special tokens.

    exact: the model was trained here. SentencePiece writes a space as U+2581, so it would read a real U+2581 as a space; an
    exact tokenizer encodes that one character by its bytes. A model from elsewhere keeps the ids it was made for. other_stop_ids:
    see `data.tokenize.stop_ids`.
    """

    def __init__(
        self,
        model: bytes,
        *,
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int,
        exact: bool,
        mask_id: int | None = None,
        extra: Added = NONE,
        other_stop_ids: tuple[int, ...] = (),
        template: ChatTemplate | None = None,
    ) -> None:
        self.model = model
        self.template = template
        self.processor = processor(model)
        self.pieces = self.processor.vocab_size()
        ids = added.place(extra, self.pieces, bos_id, eos_id)
        self.bos_id, self.eos_id, self.pad_id = ids.bos_id, ids.eos_id, pad_id
        self.mask_id = mask_id if ids.mask_id is None else ids.mask_id
        self.sentinel_ids, self.tokens, self.vocab_size = ids.sentinel_ids, ids.tokens, ids.vocab_size
        self.extra = extra._replace(borders=extra.borders and None in (bos_id, eos_id))
        self.exact, self.other_stop_ids = exact, other_stop_ids
        self.space_mark_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids: control pieces, the unknown one and those that were added by name."""
        made = self.processor
        ids = (index for index in range(self.pieces) if made.is_control(index) or made.is_unknown(index))
        return {made.id_to_piece(index): index for index in ids} | self.tokens

    @property
    def added_tokens(self) -> dict[str, int]:
        """The same: what else a text spells as one token, the library does not tell."""
        return self.special_tokens

    def encode_with_specials(self, text: str) -> list[int]:
        """As `encode`, but what spells a special token is that token. For text of which every such token is meant.

        What stands between two of them is encoded by itself, where a model that puts a space before a text puts one too.
        """
        return self.locate(text).ids

    def locate(self, text: str) -> Located:
        """The ids of `encode_with_specials` with their places."""
        files.utf8(text)
        return located.with_specials(text, self.special_tokens, self._locate)

    def _locate(self, text: str) -> Located:
        if not self.exact:
            return _places(self.processor, text)
        mark = Located(self.space_mark_ids, [(0, 1)] * len(self.space_mark_ids))
        return located.join((part, mark if part == SPACE_MARK else _places(self.processor, part)) for part in _parts(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Same ids as `encode`, by all processor cores."""
        for text in texts:
            files.utf8(text)
        if not self.exact:
            return self.processor.encode(texts, num_threads=os.cpu_count() or 1)
        parts = [list(_parts(text)) for text in texts]
        encoded = self.processor.encode(list(chain.from_iterable(parts)), num_threads=os.cpu_count() or 1)
        for index, part in enumerate(chain.from_iterable(parts)):
            if part == SPACE_MARK:
                encoded[index] = self.space_mark_ids
        rest = iter(encoded)
        return [list(chain.from_iterable(islice(rest, len(mine)))) for mine in parts]

    def decode(self, ids: list[int]) -> str:
        return added.spell(files.valid(ids, self.vocab_size), added.names(self.sentinel_ids), self._decode)

    def _decode(self, ids: list[int], first: bool) -> str:
        own = [index for index in ids if index < self.pieces and index != self.mask_id]
        text = self.processor.decode(own)
        # A model from elsewhere may take the space off the start of a text, which this is not.
        opens = own and not first and not self.exact and self.processor.id_to_piece(own[0]).startswith(SPACE_MARK)
        return f" {text}" if opens and not text.startswith(" ") else text

    def contents(self) -> dict[str, bytes]:
        ids: dict[str, Any] = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        record = {"kind": "sentencepiece", **ids, "exact": self.exact}
        if self.mask_id is not None and self.mask_id < self.pieces:
            record["mask_id"] = self.mask_id
        record |= {"other_stop_ids": self.other_stop_ids} if self.other_stop_ids else {}
        return files.contents(record | added.record(self.extra), {FILE: self.model, **chat_template.contents(self.template)})

    def save(self, directory: str) -> None:
        files.write(directory, self.contents())


def _parts(text: str) -> Iterator[str]:
    """Parts of a text that are encoded each by itself with the same result: cut around U+2581, and after a newline where a part
    grows beyond PART_CHARS (byte-pair encoding takes 3.5 times as long on a text of a million characters)."""
    for part in SPACE_MARKS.split(text):
        start = 0
        while start < len(part):
            end = part.find("\n", start + PART_CHARS) + 1 or len(part)
            yield part[start:end]
            start = end


def _places(processor: sentencepiece.SentencePieceProcessor, text: str) -> Located:
    """Ids and places, out of the library's message SentencePieceText (fields of its pieces: 2 id, 4 begin, 5 end, in bytes)."""
    message = processor.encode(text, out_type="serialized_proto")
    pieces = [dict(_fields(piece)) for number, piece in _fields(message) if number == 2]
    character = [place for place, letter in enumerate(text) for _ in letter.encode()] + [len(text)]
    # A character of several pieces belongs, for the library, to the last of them.
    spans = [(character[piece.get(4, 0)], character[piece.get(5, 0)]) for piece in pieces]
    return Located([piece.get(2, 0) for piece in pieces], spans)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message of Protocol Buffers: a whole number, or the bytes of a part."""
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        key = number()
        if key & 7 == 5:  # a float of four bytes: the score of the text
            place += 4
            continue
        value = number()
        if key & 7 == 2:
            yield key >> 3, message[place : place + value]
            place += value
        else:
            yield key >> 3, value


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The library's processor; ValueError if the bytes are no model."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise files.NotATokenizer(str(error)) from error


def restore(saved: files.Saved) -> SentencePieceTokenizer:
    record = {name: saved.record[name] for name in ("bos_id", "eos_id", "pad_id", "exact")}
    return SentencePieceTokenizer(
        saved.files[FILE],
        **record,
        mask_id=saved.record.get("mask_id"),
        extra=added.restore(saved.record),
        other_stop_ids=tuple(saved.record.get("other_stop_ids", ())),
        template=chat_template.restore(saved),
    )


def train_bpe(config: ConfigDict, texts: Callable[[], Iterable[str]], extra: Added = NONE) -> SentencePieceTokenizer:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909): the most frequent pair of pieces is merged, again and again."""
    return _train("bpe", config.tokenizer.vocab_size, texts(), extra)


def train_unigram(config: ConfigDict, texts: Callable[[], Iterable[str]], extra: Added = NONE) -> SentencePieceTokenizer:
    """Unigram language model (Kudo 2018, arXiv:1804.10959): pieces that the likelihood needs least are removed, again and again."""
    return _train("unigram", config.tokenizer.vocab_size, texts(), extra)


def _train(algorithm: str, vocab_size: int, texts: Iterable[str], extra: Added) -> SentencePieceTokenizer:
    sample = _sample(_pieces(texts), TRAIN_BYTES)
    if not sample:
        raise ValueError(files.EMPTY)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=algorithm,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            pad_id=PAD,
            eos_id=EOS,
            bos_id=BOS,
            unk_id=UNKNOWN,
            max_sentence_length=8 * PIECE_CHARS,
            num_threads=TRAIN_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_refused(algorithm, vocab_size, str(error))) from error
    return SentencePieceTokenizer(model.getvalue(), bos_id=BOS, eos_id=EOS, pad_id=PAD, exact=True, extra=extra)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts, cut at the characters that no piece may contain, none longer than PIECE_CHARS."""
    for line in chain.from_iterable(BORDERS.split(text) for text in texts):
        for start in range(0, len(line), PIECE_CHARS):
            yield line[start : start + PIECE_CHARS]


def _sample(pieces: Iterable[str], limit_bytes: int) -> list[str]:
    """Every 2^k-th piece, with the smallest k that keeps the sample within `limit_bytes` (as long as it has two pieces)."""
    kept: list[str] = []
    size, stride = 0, 1
    for index, piece in enumerate(pieces):
        if index % stride:
            continue
        kept.append(piece)
        size += len(piece.encode("utf-8"))
        while size > limit_bytes and len(kept) > 1:
            kept = kept[::2]
            stride *= 2
            size = sum(len(part.encode("utf-8")) for part in kept)
    return kept


def _refused(algorithm: str, vocab_size: int, reason: str) -> str:
    """SentencePiece's own words hold the bound that was broken."""
    most = re.search(r"set it to a value <= (\d+)", reason)
    least = re.search(r"required_chars\. \d+ vs (\d+)", reason)
    if most:
        what, accepted = "is more than this corpus has pieces for", f"up to {most[1]}"
    elif least:
        what, accepted = "does not hold the special tokens, the 256 bytes and the corpus's characters", f"{least[1]} or more"
    else:
        what, accepted = f"was refused by SentencePiece: {reason}", "a size that fits the corpus"
    return (
        f"tokenizer.vocab_size = {vocab_size} {what} ({algorithm}).\n  Accepted: {accepted}.\n"
        "  Set tokenizer.vocab_size, give more text, or use tokenizer.kind = 'byte'."
    )
