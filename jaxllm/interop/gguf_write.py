"""GGUF files written (format: docs/gguf.md of ggml, version 3): the metadata, then the tensors as they come, one at a time."""

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxllm.interop import gguf_file, safetensors

VERSION, ALIGNMENT = 3, 32
# --dtype -> the name that ggml has for it.
KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
# ggml's number of the type, its number for a whole file of it (general.file_type), numbers in a block, bytes of a block.
LAYOUTS = {"F32": (0, 0, 1, 4), "F16": (1, 1, 1, 2), "BF16": (30, 32, 1, 2), "Q8_0": (8, 7, 32, 34)}
# ggml's number of a metadata type, and how one value of it is packed.
SCALARS = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
# Of the elements of an array; whole numbers are signed there.
ELEMENTS = {int: (5, "<i4"), float: (6, "<f4")}


class Planned(NamedTuple):
    """A tensor to write. shape: rows first. kind: a key of LAYOUTS."""

    shape: tuple[int, ...]
    kind: str

    @property
    def size_bytes(self) -> int:
        _, _, block, block_bytes = LAYOUTS[self.kind]
        return int(np.prod(self.shape)) // block * block_bytes


def entry(key: str, value: Any) -> bytes:
    """The bytes of one line of metadata; whole numbers are stored as uint32, other ones as float32."""
    return _text(key) + _typed(value)


def vocabulary(file: gguf_file.File) -> bytes:
    """A GGUF file that holds nothing but the tokenizer of `file`, byte for byte."""
    entries = [bytes(data) for key, data in file.entries.items() if key.startswith("tokenizer.")]
    return _head(0, len(entries)) + b"".join(entries)


def write(path: Path, entries: list[bytes], tensors: Mapping[str, Planned], make: Callable[[str], np.ndarray]) -> None:
    """Writes the metadata `entries` and `make(name)` for every name of `tensors`, stored as planned; fsynced at the end.

    One tensor at a time is in memory. ValueError for a number that its type cannot hold.
    """
    with path.open("wb") as file:
        file.write(_head(len(tensors), len(entries)) + b"".join(entries))
        offset = 0
        for name, planned in tensors.items():
            axes = struct.pack(f"<I{len(planned.shape)}Q", len(planned.shape), *reversed(planned.shape))
            file.write(_text(name) + axes + struct.pack("<IQ", LAYOUTS[planned.kind][0], offset))
            offset += planned.size_bytes + -planned.size_bytes % ALIGNMENT
        _align(file)
        for name, planned in tensors.items():
            # A function of its own, so that one tensor is gone before the next one is made.
            _write_tensor(file, name, make(name), planned)
        file.flush()
        os.fsync(file.fileno())


def store(name: str, tensor: np.ndarray, kind: str) -> gguf_file.Stored:
    """The tensor as a file has it. Q8_0: blocks of 32 numbers of a row, 8 bits each, with a float16 scale."""
    if kind in gguf_file.FLOATS:
        cast = np.ascontiguousarray(safetensors.cast(name, tensor, gguf_file.FLOATS[kind].name))
        return gguf_file.Stored(tensor.shape, kind, cast.reshape(-1).view(np.uint8))
    from gguf import GGMLQuantizationType, quants  # noqa: PLC0415

    data = quants.quantize(np.ascontiguousarray(tensor, np.float32), GGMLQuantizationType[kind])
    return gguf_file.Stored(tensor.shape, kind, data.reshape(-1))


def _write_tensor(file: BinaryIO, name: str, tensor: np.ndarray, planned: Planned) -> None:
    stored = store(name, tensor, planned.kind)
    if stored.shape != planned.shape or len(stored.data) != planned.size_bytes:
        raise RuntimeError(f"tensor '{name}' has shape {stored.shape} and {len(stored.data)} bytes instead of {planned}")
    file.write(stored.data.data)
    _align(file)


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _head(tensors: int, entries: int) -> bytes:
    return gguf_file.MAGIC + struct.pack("<IQQ", VERSION, tensors, entries)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    """The number of the type and the value; of a list also the type and the number of its elements."""
    if isinstance(value, str):
        return struct.pack("<I", gguf_file.TEXT) + _text(value)
    if not isinstance(value, list):
        number, packed = SCALARS[type(value)]
        return struct.pack("<I", number) + struct.pack(packed, value)
    kind = type(value[0]) if value else str
    number, letters = ELEMENTS.get(kind, (gguf_file.TEXT, ""))
    data = b"".join(map(_text, value)) if kind is str else np.array(value, letters).tobytes()
    return struct.pack("<IIQ", gguf_file.ARRAY, number, len(value)) + data
