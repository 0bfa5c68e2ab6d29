"""Shards: what is written is what is read, and every kind of damage is named."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from jaxllm.data import shards
from jaxllm.data.shards import FLAG, Block, Column, Shards, Totals

ROWS, ROW_TOKENS = 23, 6


def block(rows: int, vocab_size: int, seed: int = 0) -> Block:
    rng = np.random.default_rng(seed)
    segments = 1 + np.cumsum(rng.integers(0, 2, (rows, ROW_TOKENS)), axis=1)
    tokens = rng.integers(0, vocab_size, (rows, ROW_TOKENS + 1))
    return {"tokens": tokens, "segments": segments, "weights": rng.integers(0, 2, (rows, ROW_TOKENS))}


def columns(vocab_size: int) -> dict[str, Column]:
    ids, numbers = shards.smallest_dtype(vocab_size - 1), shards.smallest_dtype(ROW_TOKENS)
    return {"tokens": Column(ROW_TOKENS + 1, ids), "segments": Column(ROW_TOKENS, numbers), "weights": Column(ROW_TOKENS, FLAG)}


def write(directory: Path, vocab_size: int = 1000, seed: int = 0) -> tuple[Block, Shards]:
    whole = block(ROWS, vocab_size, seed)
    pieces = ({name: array[start : start + 5] for name, array in whole.items()} for start in range(0, ROWS, 5))
    totals = Totals(documents=4, tokens=150, weighted_tokens=50, text_bytes=600, cut=3)
    written = shards.write(directory, pieces, columns(vocab_size), row_tokens=ROW_TOKENS, vocab_size=vocab_size, totals=totals)
    return whole, written


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32"), (200_000, "uint32")])
def test_rows_come_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    whole, found = write(tmp_path / "train", vocab_size)
    indices = np.array([22, 0, 7, 7])
    rows = found.rows(indices)
    assert rows.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(rows[name], array[indices])
        assert rows[name].dtype == np.int32
    assert len(found) == ROWS
    assert (found.documents, found.tokens, found.weighted_tokens, found.text_bytes, found.cut) == (4, 150, 50, 600, 3)
    assert found.bytes_per_token == 600 / 50
    assert np.fromfile(tmp_path / "train" / "tokens.bin", dtype).size == ROWS * (ROW_TOKENS + 1)
    found.verify()


def test_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    prints = [write(tmp_path / name, seed=seed)[1].fingerprint for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(("name", "width"), [("tokens", 14), ("segments", 12), ("weights", 6)])
def test_shards_cut_short(tmp_path: Path, name: str, width: int) -> None:
    write(tmp_path / "train")
    path = tmp_path / "train" / f"{name}.bin"
    os.truncate(path, 100)
    text = f"'{path}' has 100 bytes.\n  Accepted: {ROWS * width:,} bytes, as they were written.\n  Run `python -m jaxllm.prepare --force`"
    with pytest.raises(ValueError, match=re.escape(text)):
        Shards(tmp_path / "train")
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(f"'{path}' is missing.\n  Accepted: {ROWS * width:,} bytes")):
        Shards(tmp_path / "train")


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    _, found = write(tmp_path / "train")
    path = tmp_path / "train" / "segments.bin"
    data = bytearray(path.read_bytes())
    data[77] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"'{path}' was damaged after it was written: its sha256 is ")):
        found.verify()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "there is no index.json"), ("{", "is not JSON"), (json.dumps({"format": 0}), "has format 0.\n  Accepted: 3")],
)
def test_a_bad_index_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    write(tmp_path / "train")
    path = tmp_path / "train" / "index.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=words):
        Shards(tmp_path / "train")


def test_an_interrupted_write_has_no_index(tmp_path: Path) -> None:
    def blocks() -> object:
        yield block(5, 10)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        shards.write(tmp_path / "train", blocks(), columns(10), row_tokens=ROW_TOKENS, vocab_size=10, totals=Totals())
    with pytest.raises(ValueError, match=r"there is no index\.json"):
        Shards(tmp_path / "train")
