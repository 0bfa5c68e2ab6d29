"""Cleaned documents on disk between the steps of prepare, and their split into training and validation.

The source is read once, however often the documents are needed afterwards (to train the tokenizer, to pack each split), and
memory holds one document at a time.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jaxllm.data.documents import Document

HEADER = struct.Struct("<QQQ")
KEYS = 1 << 64

# Each call starts again at the first document.
Documents = Callable[[], Iterator[Document]]


class Spool:
    """A file of documents, each with a key: a hash of its text alone, uniform in 0 .. KEYS-1."""

    def __init__(self, path: Path, documents: Iterable[Document]):
        self.path, self.count, self.chars = path, 0, 0
        self.lowest, self.highest = KEYS, -1
        with open(path, "wb") as file:
            for text, *rest in documents:
                raw, beside = text.encode(), json.dumps(rest).encode()
                key = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
                file.write(HEADER.pack(key, len(raw), len(beside)))
                file.write(raw)
                file.write(beside)
                self.count += 1
                self.chars += len(text)
                self.lowest, self.highest = min(self.lowest, key), max(self.highest, key)

    def entries(self) -> Iterator[tuple[int, Document]]:
        """(key, document) in the order in which they were written."""
        with open(self.path, "rb") as file:
            while header := file.read(HEADER.size):
                key, size, beside = HEADER.unpack(header)
                text = file.read(size).decode()
                origin, target, pair, messages, answers, score, fields = json.loads(file.read(beside))
                target = tuple(target) if isinstance(target, list) else target
                yield key, Document(text, origin, target, pair, tuple(messages), tuple(map(tuple, answers)), score, fields)

    def documents(self) -> Iterator[Document]:
        return (document for _, document in self.entries())


def split(spool: Spool, by: str, validation_frac: float) -> dict[str, Documents]:
    """Documents of "train" and "validation"; `by` is documents or characters."""
    return _by_characters(spool, validation_frac) if by == "characters" else _by_documents(spool, validation_frac)


def _by_documents(spool: Spool, validation_frac: float) -> dict[str, Documents]:
    """A document is held out if its key lies below a bound, so that new documents never move old ones to the other side.

    The bound is moved only as far as it takes to leave each side one document. Equal texts land on the same side.
    """
    if spool.lowest >= spool.highest:
        raise ValueError(
            f"data.split_by = 'documents', but the source holds {spool.count:,} documents with one and the same text: none can be"
            " held out for validation.\n  Accepted: two different documents or more.\n"
            "  Give another document, or set data.validation_source; of plain text data.split_by=characters can hold out the end."
        )
    bound = min(max(int(validation_frac * KEYS), spool.lowest + 1), spool.highest)
    return {
        "train": lambda: (document for key, document in spool.entries() if key >= bound),
        "validation": lambda: (document for key, document in spool.entries() if key < bound),
    }


def _by_characters(spool: Spool, validation_frac: float) -> dict[str, Documents]:
    """The last characters are held out. The document that the border falls into becomes one on each side."""
    border = int(spool.chars * (1 - validation_frac))

    def part(start: int, stop: int) -> Iterator[Document]:
        before = 0
        for document in spool.documents():
            piece = document.text[max(start - before, 0) : max(stop - before, 0)]
            if piece:
                yield document._replace(text=piece)
            before += len(document.text)

    return {"train": lambda: part(0, border), "validation": lambda: part(border, spool.chars)}
