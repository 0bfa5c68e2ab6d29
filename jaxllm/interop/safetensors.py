"""The safetensors format (https://github.com/huggingface/safetensors): tensors read one at a time, and written as they come.

A file is 8 bytes with the length of a JSON header, the header {name: {dtype, shape, data_offsets}}, and the numbers. A model is
`model.safetensors`, or several such files and `model.safetensors.index.json`, which says which tensor is in which.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{number:05d}-of-{count:05d}.safetensors"
# Bytes of a number of each type that the format knows.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# The types that weights may have here.
TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Those that parts of a quantized weight have beside them.
WHOLE = {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
NAMES = {dtype.name: name for name, dtype in (TYPES | WHOLE).items()}
ALIGNMENT_BYTES = 8
# As the format's own library has it.
MOST_HEADER_BYTES = 100_000_000


class Entry(NamedTuple):
    """Where a tensor is: its file, and the bytes from `begin` to `end` of that file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Files:
    """All tensors of some safetensors files; see imported.Tensors. Opening reads and checks the headers alone."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        for path in paths:
            for name, entry in read_header(path).items():
                if name in self.entries:
                    raise ValueError(
                        f"tensor '{name}' is in {self.entries[name].path.name} and in {path.name} of '{path.parent}'.\n"
                        "  Accepted: each tensor once.\n  Fetch the files again, or remove those that belong to another model."
                    )
                self.entries[name] = entry
        self.shapes: Mapping[str, tuple[int, ...]] = {name: entry.shape for name, entry in self.entries.items()}
        self.dtypes: Mapping[str, str] = {
            name: TYPES[entry.dtype].name if entry.dtype in TYPES else entry.dtype for name, entry in self.entries.items()
        }

    def read(self, name: str) -> np.ndarray:
        """The tensor as it is stored; ValueError for a type that is not one of TYPES."""
        entry = self.entries[name]
        if entry.dtype not in TYPES:
            raise ValueError(
                f"tensor '{name}' in '{entry.path}' is stored as {entry.dtype}.\n  Accepted: {', '.join(TYPES)}.\n"
                "  Save the model in one of these; of quantized files the quantization_config in config.json says how they are read."
            )
        return np.fromfile(entry.path, TYPES[entry.dtype], math.prod(entry.shape), offset=entry.begin).reshape(entry.shape)

    def stored(self, name: str) -> np.ndarray:
        """A part of a quantized weight, whose bytes are read when they are used; ValueError for a type that is in neither table."""
        entry, types = self.entries[name], TYPES | WHOLE
        if entry.dtype not in types:
            raise ValueError(
                f"tensor '{name}' in '{entry.path}' is stored as {entry.dtype}.\n  Accepted: {', '.join(types)}.\n"
                "  Take a model that is quantized in another way."
            )
        if not math.prod(entry.shape):
            return np.empty(entry.shape, types[entry.dtype])
        return np.memmap(entry.path, types[entry.dtype], "r", entry.begin, entry.shape or (1,)).reshape(entry.shape)


def find(directory: Path) -> list[Path]:
    """The files with the model's tensors; ValueError if there are none, or if one of the index is missing."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.is_file():
        raise ValueError(_no_tensors(directory))
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        missing = [name for name in names if Path(name).name != name or not (directory / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{index}' cannot be read: {type(error).__name__}: {error}.\n"
            '  Accepted: JSON with "weight_map": {tensor: file}.\n  Fetch the file again.'
        ) from error
    if missing:
        raise ValueError(
            f"'{directory}' lacks {len(missing)} of the {len(names)} files in {INDEX}: {', '.join(missing[:4])}.\n"
            "  Accepted: all of them, beside the index.\n  Fetch them."
        )
    return [directory / name for name in names]


def _no_tensors(directory: Path) -> str:
    pickled = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack") for path in directory.glob(pattern)
    )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    what = f" (it has {', '.join((pickled + others)[:4])})" if pickled or others else ""
    change = (
        "Such files can run code when they are opened, so they are not. Where you trust them and have PyTorch and transformers, run\n"
        f"  python -c \"import transformers as t; n = t.AutoConfig.from_pretrained('{directory}').architectures[0];"
        f" getattr(t, n).from_pretrained('{directory}').save_pretrained('NEW_DIRECTORY')\"\n"
        "  and copy the tokenizer files."
        if pickled
        else "Fetch them, or correct the path."
    )
    return f"'{directory}' has no tensors in the safetensors format{what}.\n  Accepted: {SINGLE}, or {INDEX} and its files.\n  {change}"


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> Entry of every tensor, in the order of the file; ValueError, naming the file, if anything about it is wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # A truncated file or a Git LFS pointer gives some large number here.
            if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                raise _damaged(path, f"its header would have {length} bytes, the whole file has {size}")
            header = json.loads(file.read(length))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a {type(header).__name__}, no JSON object")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items() if name != "__metadata__"}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise _damaged(path, f"tensor '{name}' begins at byte {entry.begin}, where the one before ends at {end}")
        end = entry.end
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end}, the file at {size}")
    return entries


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    """A line of the header, checked; `start` is the first byte of the numbers."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the entry of tensor '{name}' is {value!r}") from error
    if not whole or not isinstance(dtype, str):
        raise _damaged(path, f"the entry of tensor '{name}' is {value!r}")
    if dtype not in ITEM_BYTES:
        raise _damaged(path, f"tensor '{name}' has the unknown type {dtype!r} (known: {', '.join(ITEM_BYTES)})")
    if end - begin != ITEM_BYTES[dtype] * math.prod(shape):
        raise _damaged(path, f"tensor '{name}' of type {dtype} and shape {list(shape)} has {end - begin} bytes")
    return Entry(path, dtype, shape, start + begin, start + end)


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"'{path}' is damaged or no safetensors file: {what}.\n  Accepted: a whole file as it was published.\n"
        "  Fetch it again (an interrupted download is shorter, a Git LFS pointer is a small text file)."
    )


def write(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], np.ndarray],
    dtype: str | Mapping[str, str],
    max_shard_bytes: int,
) -> list[Path]:
    """Writes `make(name)`, cast to `dtype`, for every name of `shapes`, and returns the files. One tensor at a time is in memory.

    dtype: of all tensors, or of each by its name. A shard holds at most `max_shard_bytes`, unless a single tensor is larger. A NaN or an
    infinity that the cast would make of a finite number is a ValueError.
    """
    dtypes = _of_each(shapes, dtype)
    sizes = {name: ITEM_BYTES[NAMES[dtypes[name]]] * math.prod(shape) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    names = [SINGLE] if count == 1 else [SHARD.format(number=number + 1, count=count) for number in range(count)]
    for file_name, shard in zip(names, shards, strict=True):
        write_file(directory / file_name, {name: shapes[name] for name in shard}, make, dtypes)
    if count > 1:
        total = {"total_parameters": sum(map(math.prod, shapes.values())), "total_size": sum(sizes.values())}
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        index = json.dumps({"metadata": total, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
        (directory / INDEX).write_text(index, encoding="utf-8")
    return [directory / name for name in names]


def _of_each(shapes: Mapping[str, tuple[int, ...]], dtype: str | Mapping[str, str]) -> Mapping[str, str]:
    return dict.fromkeys(shapes, dtype) if isinstance(dtype, str) else dtype


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], np.ndarray], dtype: str | Mapping[str, str]
) -> None:
    """One file with `make(name)`, cast to `dtype`, for every name of `shapes`; see `write`."""
    dtypes = _of_each(shapes, dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        kind = NAMES[dtypes[name]]
        begin, end = end, end + ITEM_BYTES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            # A function of its own, so that one tensor is gone before the next one is made.
            _write_tensor(file, name, make(name), shape, dtypes[name])
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, name: str, tensor: np.ndarray, shape: tuple[int, ...], dtype: str) -> None:
    if tensor.shape != shape:
        raise RuntimeError(f"tensor '{name}' has shape {tensor.shape} instead of {shape}")
    file.write(np.ascontiguousarray(cast(name, tensor, dtype)).reshape(-1).view(np.uint8).data)


def cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """The tensor in `dtype`, a name of NAMES; ValueError for a finite number that float16 cannot hold."""
    with np.errstate(over="ignore"):
        out = tensor.astype((TYPES | WHOLE)[NAMES[dtype]], copy=False)
    if dtype == "float16" and not np.isfinite(out).all() and np.isfinite(tensor).all():
        raise ValueError(
            f"tensor '{name}' has numbers up to {np.abs(tensor).max():.3g}, which float16 cannot hold.\n"
            "  Accepted: --dtype bfloat16 or float32.\n  Use one of these."
        )
    return out
