"""Packed rows on disk: one memory-mapped file an array and an `index.json` with counts, sizes and content hashes.

A directory (one a split) holds, for N rows, one file NAME.bin an array: unsigned integers [N, width]. Which arrays there are, and
what they mean, is up to the objective (see examples/). `index.json` is written last: a directory without it was never finished.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 3
INDEX = "index.json"
AGAIN = "Run `python -m jaxllm.prepare --force` with the same config to prepare again."


# Rows in the order in which they are written: name -> array [rows, width].
Block = Mapping[str, np.ndarray]


class Column(NamedTuple):
    """One stored array: entries a row, and the unsigned type that holds them."""

    width: int
    dtype: np.dtype


@dataclass
class Totals:
    """What a split's rows were made of; whoever packs adds to it while its blocks are consumed.

    tokens: bos and eos included, padding not. weighted_tokens: predictions that count; where they are drawn anew each step, all that
    may be drawn. text_bytes: UTF-8 bytes of the text that these spell, where that can be said, else 0. cut: examples too long for a row.
    positions: what the model computes of all rows, and padding: those of them that hold no token.
    dropped: documents that were left out, by the reason.
    """

    documents: int = 0
    tokens: int = 0
    weighted_tokens: int = 0
    text_bytes: int = 0
    cut: int = 0
    positions: int = 0
    padding: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


FLAG = np.dtype(np.uint8)


def smallest_dtype(largest: int) -> np.dtype:
    """uint16 if it holds `largest`, else uint32."""
    return np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)


def write(
    directory: str | Path,
    blocks: Iterable[Block],
    columns: Mapping[str, Column],
    *,
    row_tokens: int,
    vocab_size: int,
    totals: Totals,
) -> "Shards":
    """The opened shards, after appending every block to the files of a new directory and writing the index."""
    directory = Path(directory)
    directory.mkdir(parents=True)
    digests = {name: hashlib.sha256() for name in columns}
    rows = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(directory / f"{name}.bin", "wb")) for name in columns}
        for block in blocks:
            for name, column in columns.items():
                data = np.ascontiguousarray(block[name], column.dtype).data
                digests[name].update(data)
                files[name].write(data)
            rows += len(next(iter(block.values())))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    index = {"format": FORMAT, "rows": rows, "row_tokens": row_tokens, "vocab_size": vocab_size}
    arrays = {
        name: {
            "width": column.width,
            "dtype": column.dtype.name,
            "bytes": (directory / f"{name}.bin").stat().st_size,
            "sha256": digests[name].hexdigest(),
        }
        for name, column in columns.items()
    }
    text = json.dumps(index | asdict(totals) | {"arrays": arrays}, indent=2) + "\n"
    with open(directory / INDEX, "w", encoding="utf-8") as listing:
        listing.write(text)
        listing.flush()
        os.fsync(listing.fileno())
    return Shards(directory)


class Shards:
    """Random access to the rows of one split. Opening checks the files' sizes; `verify` also their content."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        index = _read_index(self.directory / INDEX)
        self.row_tokens: int = index["row_tokens"]
        self.vocab_size: int = index["vocab_size"]
        self.documents: int = index["documents"]
        self.tokens: int = index["tokens"]
        self.weighted_tokens: int = index["weighted_tokens"]
        self.text_bytes: int = index["text_bytes"]
        self.cut: int = index["cut"]
        self.positions: int = index["positions"]
        self.padding: int = index["padding"]
        self.dropped: dict[str, int] = index["dropped"]
        self._rows: int = index["rows"]
        self._parts: dict[str, Any] = index["arrays"]
        self._arrays = {name: self._open(name) for name in self._parts}

    def __len__(self) -> int:
        return self._rows

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(part["bytes"] for part in self._parts.values())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a weighted target stands for: bits per byte = mean loss in nats / ln 2 / bytes_per_token.

        Exact over the whole split. The eos targets count in the loss and not in the bytes. 0 where targets are not text in order.
        """
        return self.text_bytes / max(self.weighted_tokens, 1)

    @property
    def filled_frac(self) -> float:
        """Share of the positions that hold a token."""
        return 1 - self.padding / max(self.positions, 1)

    @property
    def fingerprint(self) -> str:
        """Hash of the content: equal for equal rows."""
        return hashlib.sha256("".join(part["sha256"] for part in self._parts.values()).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """The counts, for the record of what was prepared."""
        names = ("row_tokens", *(each.name for each in fields(Totals)), "bytes", "fingerprint")
        return {"rows": len(self)} | {name: getattr(self, name) for name in names}

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """int32 [B, width] of these rows, by the name of the array."""
        return {name: array[indices].astype(np.int32) for name, array in self._arrays.items()}

    def verify(self) -> None:
        """Raises ValueError if a file's content is not what was written."""
        for name, part in self._parts.items():
            path = self.directory / f"{name}.bin"
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != part["sha256"]:
                raise ValueError(
                    f"'{path}' was damaged after it was written: its sha256 is {found}.\n  Accepted: {part['sha256']}.\n  {AGAIN}"
                )

    def _open(self, name: str) -> np.ndarray:
        path, part = self.directory / f"{name}.bin", self._parts[name]
        found = path.stat().st_size if path.exists() else None
        if found != part["bytes"]:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise ValueError(f"'{path}' {state}.\n  Accepted: {part['bytes']:,} bytes, as they were written.\n  {AGAIN}")
        dtype, shape = np.dtype(part["dtype"]), (self._rows, part["width"])
        return np.memmap(path, dtype, "r", shape=shape) if self._rows else np.zeros(shape, dtype)


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"no prepared shards in '{path.parent}': there is no {INDEX}.\n  Accepted: what prepare writes.\n  {AGAIN}"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON ({error}).\n  Accepted: the file as prepare wrote it.\n  {AGAIN}") from error
    if index.get("format") != FORMAT:
        raise ValueError(f"'{path}' has format {index.get('format')}.\n  Accepted: {FORMAT}.\n  {AGAIN}")
    return index
