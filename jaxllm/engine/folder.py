"""One folder of named arrays and their record: written in the background, visible all at once, verified when read.

Orbax (https://orbax.readthedocs.io, v1 API) writes the arrays; the record (engine/record.py) with their digests joins them, and one
rename commits both. Of a run with several processes all begin and read together; the first one alone does the rest.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jaxllm.engine import canonical
from jaxllm.engine.digest import digests
from jaxllm.engine.record import DamagedError, Record, from_json
from jaxllm.engine.workdir import sync_directory, write_json

STATE = "state"
RECORD = "record.json"
# Endings of folders that are not, or no longer, committed.
SAVING, DELETING = ".saving", ".deleting"
# In what the storage library says about errors that are none of the files.
OUTSIDE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")


def begin(path: Path, arrays: Mapping[str, jax.Array]) -> Any:
    """Starts to write what `commit` makes visible as `path` once `finish` has waited for it. OSError if it cannot start.

    When this returns, the arrays are in host memory: on a CPU these are views of the same memory, which JAX does not let a
    donating step reuse while somebody looks at it.
    """
    with _context():
        return ocp.save_checkpointables_async(_with(path, SAVING), {STATE: canonical.nested(arrays)})


def finish(begun: Sequence[Any]) -> None:
    """Waits for what `begin` has returned, for all of it also when some fails: the first error comes when nothing writes any more."""
    errors = []
    for response in begun:
        try:
            response.result()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def commit(path: Path, record: Record) -> None:
    """Adds the record to what was written and puts it in the place of what is at `path`."""
    written = _with(path, SAVING)
    files = {str(file.relative_to(written)): file.stat().st_size for file in written.rglob("*") if file.is_file()}
    write_json(written / RECORD, replace(record, files=files).to_json())
    replaced = set_aside(path)
    written.rename(path)
    # Also a power cut must find the new one before older ones are deleted.
    sync_directory(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Renames what is committed, if it is there: a deletion that is cut short must not leave what looks whole. The new path."""
    doomed = _with(path, DELETING)
    shutil.rmtree(doomed, ignore_errors=True)
    if path.exists():
        path.rename(doomed)
    return doomed


def clear(path: Path) -> None:
    """Removes what an earlier attempt to write `path` left behind."""
    for leftover in path.parent.glob(f"{path.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def read_record(path: Path) -> Record:
    """What the folder says about itself; DamagedError if that cannot be read."""
    try:
        return from_json(json.loads((path / RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        missing = f"its record ({RECORD})" if path.is_dir() else "the folder"
        raise DamagedError(path, f"{missing} is not there") from error
    except (IsADirectoryError, ValueError) as error:
        raise DamagedError(path, f"its record ({RECORD}) cannot be read: {summary(error)}") from error


def read(path: Path, record: Record, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays `wanted`, all of which the record has as they are wanted; DamagedError if they are not what was written.

    An error that comes of what is wanted (where the arrays are to lie, too little memory for all of them) stays what it is.
    """
    _check_files(record, path)
    try:
        arrays = _load(path, wanted)
    except Exception as error:
        if _is_outside(error) or _can_be_read(path, record):
            raise
        raise DamagedError(path, summary(error)) from error
    sums = digests(arrays)
    altered = [name for name in wanted if sums[name] != record.leaves[name].digest]
    if altered:
        more = f" and {len(altered) - 4} more" if len(altered) > 4 else ""
        raise DamagedError(path, f"the digest does not fit {', '.join(altered[:4])}{more}")
    return arrays


def _load(path: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    with _context():
        return canonical.named(ocp.load_checkpointables(path, {STATE: canonical.nested(wanted)})[STATE])


def _is_outside(error: BaseException) -> bool:
    """Whether an error tells of the machine and not of the files: memory, permissions, a package that is not there."""
    first = _cause(error)
    return isinstance(first, MemoryError | ImportError | PermissionError) or any(code in str(first) for code in OUTSIDE)


def _can_be_read(path: Path, record: Record) -> bool:
    """Whether each array of the record can be read by itself, onto the first device, and is what was written."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for name, leaf in record.leaves.items():
        try:
            sums = digests(_load(path, {name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype), sharding=device)}))
        except Exception as error:
            if _is_outside(error):
                raise
            return False
        if sums[name] != leaf.digest:
            return False
    return True


def _cause(error: BaseException) -> BaseException:
    """The first cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def summary(error: BaseException) -> str:
    """The first cause of an error on one line."""
    error = _cause(error)
    # Tensorstore appends a page of its settings.
    text = " ".join(str(error).partition(" [tensorstore_spec")[0].split())
    return f"{type(error).__name__}: {text[:600]}"


def _with(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}{ending}")


def _check_files(record: Record, path: Path) -> None:
    """DamagedError if a file is gone or has another size: plainer than what the storage library says to it."""
    for name, size_bytes in record.files.items():
        found_bytes = (path / name).stat().st_size if (path / name).is_file() else None
        if found_bytes != size_bytes:
            what = "is missing" if found_bytes is None else f"has {found_bytes} bytes instead of {size_bytes}"
            raise DamagedError(path, f"its file {name} {what}")


def _context() -> ocp.Context:
    context = ocp.Context()
    # Weights are noise to a compressor: it saves a tenth of the bytes and takes five times as long.
    context.array.saving.use_compression = False
    context.pytree.loading.partial_load = True
    return context
