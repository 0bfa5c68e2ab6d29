"""A GGUF file opened: its metadata and its tensors, whatever model they are of (format: docs/gguf.md of ggml, versions 2 and 3).

The package gguf knows the storage types and dequantizes them. Its own reader is not used: it takes 8 seconds for the metadata of a
vocabulary of 49152 tokens, and says little about a file that is cut short.
"""

import difflib
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAGIC, VERSIONS = b"GGUF", (2, 3)
# How weights may be stored, by the names of ggml. What is not a float is a block of a row with its scales.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Numbers of metadata types -> NumPy's letters; 8 is a text and 9 an array.
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
TEXT, ARRAY = 8, 9
MOST_AXES = 4
LISTED = 8
_REQUIRED = object()


class Stored(NamedTuple):
    """A tensor in the file. shape: rows first, as NumPy counts (ggml counts backwards). data: its bytes, mapped from the file."""

    shape: tuple[int, ...]
    kind: str
    data: np.ndarray

    def load(self) -> np.ndarray:
        """Its numbers: float16 and bfloat16 as stored, everything else in float32."""
        if self.kind in FLOATS:
            return np.array(self.data).view(FLOATS[self.kind]).reshape(self.shape)
        from gguf import GGMLQuantizationType, quants  # noqa: PLC0415

        rows = self.data.reshape(*self.shape[:-1], -1)
        return quants.dequantize(rows, GGMLQuantizationType[self.kind]).reshape(self.shape)


class File(NamedTuple):
    """An open file. values: metadata by its key. entries: their bytes, as `gguf_write` writes them: key, type and value."""

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    entries: Mapping[str, memoryview] = MappingProxyType({})

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value of `key`; ValueError if it is of another kind, or not there and without a default."""
        value = self.values.get(key, default)
        if value is _REQUIRED:
            raise ValueError(
                f"'{self.path}' does not say '{key}'.\n  Accepted: a GGUF file with the metadata of its model.\n"
                "  Convert the model again with a newer converter, or take another file."
            )
        if value is default or isinstance(value, kind) or (kind is float and isinstance(value, int)):
            return value
        raise ValueError(
            f"'{self.path}' says '{key}' = {_short(value)}, a {type(value).__name__}.\n  Accepted: one {kind.__name__}"
            " for the whole model.\n  Take another file of the model, or its Hugging Face directory."
        )


def read(path: str | Path) -> File:
    """The file at `path`. ValueError for what is no GGUF file, is damaged, cut short or in parts, and for types not in TYPES."""
    path = Path(path).expanduser()
    _check_head(path)
    data = np.memmap(path, np.uint8, mode="r")
    try:
        cursor = _Cursor(data.data, 8)
        tensor_count, value_count = cursor.number("<u8"), cursor.number("<u8")
        values, entries = _metadata(cursor, value_count)
        infos = {cursor.text(): _Info.read(cursor) for _ in range(tensor_count)}
        alignment = values.get("general.alignment", 32)
        start = -(-cursor.at // alignment) * alignment
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(_damaged(path, len(data), str(error))) from error
    if values.get("split.count", 1) > 1:
        raise ValueError(
            f"'{path}' is part {values.get('split.no', 0) + 1} of {values['split.count']}.\n  Accepted: a model in one GGUF file.\n"
            "  Join the parts: llama-gguf-split --merge FIRST_PART JOINED"
        )
    return File(path, values, _tensors(path, data, start, infos), entries)


def metadata(data: bytes) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """`File.values` and `File.entries` of a file's bytes, without its tensors."""
    cursor = _Cursor(memoryview(data), 16)
    return _metadata(cursor, cursor.number("<u8"))


def _metadata(cursor: "_Cursor", count: int) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """`File.values` and `File.entries`."""
    values, entries = {}, {}
    for _ in range(count):
        begin, key = cursor.at, cursor.text()
        values[key] = cursor.value(cursor.number("<u4"))
        entries[key] = cursor.data[begin : cursor.at]
    return values, entries


class _Cursor:
    """Reads one thing after another; ValueError at the end of the file."""

    def __init__(self, data: memoryview, at: int) -> None:
        self.data, self.at = data, at

    def take(self, count: int) -> memoryview:
        if self.at + count > len(self.data):
            raise ValueError(f"its metadata want {count:,} bytes from byte {self.at:,} on")
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, kind: str, count: int) -> list[Any]:
        return np.frombuffer(self.take(np.dtype(kind).itemsize * count), kind).tolist()

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def text(self) -> str:
        (size,) = struct.unpack("<Q", self.take(8))
        return str(self.take(size), "utf-8")

    def value(self, kind: int) -> Any:
        """A value of the metadata type `kind`: a number, a text or a list of them."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"its metadata hold a value of the unknown type {kind} before byte {self.at:,}")
        kind, count = self.number("<u4"), self.number("<u8")
        if kind in SCALARS:
            return self.numbers(SCALARS[kind], count)
        return [self.value(kind) for _ in range(count)]


class _Info(NamedTuple):
    """What the file says of a tensor. number: of its storage type. offset: in bytes from where all tensors begin."""

    shape: tuple[int, ...]
    number: int
    offset: int

    @classmethod
    def read(cls, cursor: _Cursor) -> "_Info":
        axes = cursor.number("<u4")
        if axes > MOST_AXES:
            raise ValueError(f"a tensor has {axes} axes before byte {cursor.at:,}")
        return cls(tuple(reversed(cursor.numbers("<u8", axes))), cursor.number("<u4"), cursor.number("<u8"))


def _tensors(path: Path, data: np.ndarray, start: int, infos: Mapping[str, _Info]) -> dict[str, Stored]:
    """Every tensor; ValueError for types that cannot be read here, and where the file ends too soon."""
    require()
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415

    known = {member.value: member.name for member in GGMLQuantizationType}
    kinds = {name: known.get(info.number, f"type {info.number}") for name, info in infos.items()}
    _check_types(path, kinds)
    out = {}
    for name, info in infos.items():
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kinds[name]]]
        if not info.shape or info.shape[-1] % block:
            raise ValueError(_damaged(path, len(data), f"{name} has rows of {info.shape} in blocks of {block}"))
        begin, size = start + info.offset, math.prod(info.shape) // block * block_bytes
        if begin + size > len(data):
            raise ValueError(_damaged(path, len(data), f"{name} is at bytes {begin:,} to {begin + size:,}"))
        out[name] = Stored(info.shape, kinds[name], data[begin : begin + size])
    return out


def require() -> None:
    """ValueError that says how to get the package gguf, if it is not there."""
    try:
        import gguf  # noqa: F401, PLC0415
    except ImportError as error:
        raise ValueError(
            "a GGUF file needs the package gguf, which is not installed.\n  Accepted: models of other formats do not need it."
            "\n  Run: pip install 'jaxllm[hf]'"
        ) from error


def _check_head(path: Path) -> None:
    """ValueError unless the file begins as a GGUF file that can be read here."""
    if not path.is_file():
        raise ValueError(f"no GGUF file at '{path}'.\n  Accepted: the path of a .gguf file.\n  Correct the path.")
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] != MAGIC:
        what = f"is not a GGUF file: it begins with {head[:4]!r}"
    elif len(head) == 8 and int.from_bytes(head[4:], "little") in VERSIONS:
        return
    else:
        swapped = int.from_bytes(head[4:], "big") in VERSIONS
        what = "is big-endian" if swapped else f"is GGUF version {int.from_bytes(head[4:], 'little')}"
    raise ValueError(
        f"'{path}' {what}.\n  Accepted: a GGUF file of version 2 or 3, little-endian, which begins with b'GGUF'.\n"
        "  Fetch it again (a Git LFS pointer is a small text file), or convert the model again."
    )


def _damaged(path: Path, size: int, reason: str) -> str:
    return (
        f"'{path}' is cut short or damaged: {reason}, and the file has {size:,} bytes.\n  Accepted: a whole GGUF file.\n"
        "  Fetch it again."
    )


def _check_types(path: Path, kinds: Mapping[str, str]) -> None:
    wrong = {name: kind for name, kind in kinds.items() if kind not in TYPES}
    if not wrong:
        return
    near = difflib.get_close_matches(next(iter(wrong.values())), TYPES, n=1, cutoff=0.3)
    hint = f" The nearest is {near[0]}." if near else ""
    raise ValueError(
        f"'{path}' stores {listed([f'{name} as {kind}' for name, kind in wrong.items()])}.\n  Accepted: {', '.join(TYPES)}.{hint}\n"
        "  Take a file of the same model in one of these, such as its Q4_K_M or Q8_0."
    )


def listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
