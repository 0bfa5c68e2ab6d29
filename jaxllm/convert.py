"""Converts a model between a run directory, a directory of transformers (safetensors) and a GGUF file.

  python -m jaxllm.convert --from SRC --to DST [--format hf|jaxllm|gguf] [--dtype float32|bfloat16|float16|q8_0] [--step N]
                           [--max_shard_size 5GB] [--packing NAME [--force]] [--check]

SRC is a run directory (its newest checkpoint, or that of --step), a directory with config.json and safetensors, or a .gguf file.
A DST that ends in .gguf is a file that llama.cpp and Ollama load (gguf). Else a run becomes a directory that transformers and other
tools load (hf), and anything else a run directory (jaxllm), which generate, evaluate and jaxllm.load open. Nothing but DST is
written, and DST appears when it is complete. What is quantized becomes dense, but with --packing: then its codes stay what they are, in
the files of another tool: pack-quantized or int-quantized (compressed-tensors), gptq, gptq_v2, awq, nf4 (bitsandbytes).
"""

import dataclasses
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from jaxllm import command, logits, models, runs
from jaxllm import config as schema
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.workdir import Workdir, check_space, sync_directory, write_text
from jaxllm.interop import directory, gguf_export, gguf_file, gguf_write, weights
from jaxllm.interop.imported import Tensors
from jaxllm.interop.packed import formats
from jaxllm.parallel import forms
from jaxllm.transforms import adapt
from jaxllm.transforms.int8 import Int8
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Params, Tokenizer

HF, RUN, GGUF = "hf", "jaxllm", "gguf"
# Format -> what --dtype may be.
DTYPES = {HF: directory.DTYPES, RUN: ("float32",), GGUF: tuple(gguf_write.KINDS)}
ITEM_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "q8_0": 34 / 32}
UNIT_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Largest accepted difference of logits, as a share of the largest one, from those of the source's weights rounded as they are
# written. Then both compute with the same numbers, only stacked layers may add them up in another order; and a model that rounding
# changes much is told from one that was written wrong.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Source:
    """A model to convert. dtype: of its files. unused: tensors that were not read. carried: name -> bytes of what travels along."""

    title: str
    config: ConfigDict
    tokenizer: Tokenizer | None
    params: Params
    dtype: str
    unused: tuple[str, ...]
    carried: Mapping[str, bytes]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def define_flags() -> None:
    flags.DEFINE_string("from", "", "run directory, directory with config.json and safetensors, or .gguf file")
    flags.DEFINE_string(
        "to", "", "directory to write, which must not exist or be empty; or .gguf file to write, which must not exist"
    )
    names = "hf (for transformers), jaxllm (a run directory) or gguf (for llama.cpp and Ollama)"
    flags.DEFINE_string("format", "", f"{names}; default: gguf for a --to that ends in .gguf, else hf for a run, else jaxllm")
    flags.DEFINE_enum(
        "dtype",
        None,
        DTYPES[GGUF],
        "of the tensors of the formats hf and gguf, q8_0 of gguf alone; default: that of the source's files",
    )
    flags.DEFINE_integer("step", None, "checkpoint of a run to use; default: the newest")
    flags.DEFINE_string("base", "", "of an adapter: the model that it stands beside; default: the path that the adapter names")
    flags.DEFINE_string("max_shard_size", None, "bytes of a safetensors file, at most; KB, MB, GB, KiB, MiB, GiB; default: 5GB")
    flags.DEFINE_enum(
        "packing", None, list(formats.WRITTEN), "of a quantized model: how its codes are written; default: dense weights"
    )
    flags.DEFINE_bool("force", False, "with --packing: also what no other tool would load")
    flags.DEFINE_bool(
        "check", False, "reload what was written and compare its logits with the source's; exit code 2 if they differ"
    )


def main(arguments: list[str]) -> int:
    del arguments
    given = flags.FLAGS
    path, target = _paths(str(given["from"].value), given.to)
    most = None if given.max_shard_size is None else parse_size(given.max_shard_size)
    options = {"step": given.step, "base": given.base, "max_shard_bytes": most, "checked": given.check}
    options |= {"packing": given.packing or "", "forced": given.force}
    return convert(path, target, given.format, given.dtype, Console(soft_wrap=True), **options)


def convert(
    path: Path,
    target: Path,
    wanted: str,
    dtype: str | None,
    console: Console,
    *,
    step: int | None = None,
    base: str = "",
    max_shard_bytes: int | None = None,
    checked: bool = False,
    packing: str = "",
    forced: bool = False,
) -> int:
    """Writes the model at `path` to `target` and prints what was done; the exit code, which only `checked` makes other than 0.

    wanted: the format, "" for the default. packing, forced: see directory.write. ValueError for what cannot be read or converted; then
    `target` is as it was.
    """
    wanted = _format(wanted or (HF if packing else ""), path, target)
    _check_options(wanted, dtype, max_shard_bytes, packing)
    check_free(target, wanted)
    if wanted == GGUF:
        gguf_file.require()
    source = open_source(path, step, wanted, base, keep_codes=bool(packing))
    dtype = dtype or source.dtype
    needed_bytes = sum(leaf.size for leaf in jax.tree.leaves(source.params)) * ITEM_BYTES[dtype]
    check_space(target, int(needed_bytes), what="the weights", change="give another --to")
    # Beside DST, so that a rename completes it.
    partial = target.absolute().with_name(f".{target.absolute().name}.converting")
    remove(partial)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if wanted == HF:
            rows = write_hf(partial, source, dtype, max_shard_bytes or directory.MAX_SHARD_BYTES, packing=packing, forced=forced)
        elif wanted == GGUF:
            rows = _write_gguf(partial, target.stem, source, dtype)
        else:
            rows = write_run(partial, target, source)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
        sync_directory(target.absolute().parent)
    finally:
        remove(partial)
    show({"from": source.title, "to": f"{target} ({wanted})", **rows, "tensors not used": _listing(source.unused)}, console)
    for note in source.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    return check(source, target, dtype, console) if checked else 0


def _paths(source: str, target: str) -> tuple[Path, Path]:
    if not source or not target:
        raise ValueError(
            f"--{'to' if source else 'from'} is not given.\n  Accepted: --from SRC --to DST, SRC a run directory, a directory with"
            " config.json and safetensors, or a .gguf file.\n  Give both."
        )
    return Path(source).expanduser(), Path(target).expanduser()


def _format(given: str, path: Path, target: Path) -> str:
    """hf, jaxllm or gguf; ValueError for another word, and where --to is a file of GGUF's name and the format is not, or the reverse."""
    named = target.suffix == runs.GGUF
    wanted = given or (GGUF if named else RUN if runs.is_foreign(path) else HF)
    if wanted not in DTYPES:
        raise ValueError(
            f"--format {wanted}: there is no such format.\n  Accepted: {', '.join(DTYPES)}.\n  Use one of these, or none."
        )
    if named != (wanted == GGUF):
        raise ValueError(
            f"--format {wanted} with --to {target}.\n  Accepted: a file that ends in {runs.GGUF} for --format {GGUF}, a directory that"
            " does not for the others.\n  Change one of them."
        )
    return wanted


def _check_options(wanted: str, dtype: str | None, max_shard_bytes: int | None, packing: str) -> None:
    """ValueError for options that the format has no use for."""
    if dtype is not None and dtype not in DTYPES[wanted]:
        why = ", whose checkpoints hold float32" if wanted == RUN else ""
        others = [name for name, dtypes in DTYPES.items() if dtype in dtypes]
        raise ValueError(
            f"--dtype {dtype} with --format {wanted}{why}.\n  Accepted: {', '.join(DTYPES[wanted])}, or --format {' or '.join(others)}."
            "\n  Change one of them, or leave out --dtype."
        )
    if packing and wanted != HF:
        raise ValueError(
            f"--packing {packing} with --format {wanted}.\n  Accepted: --packing with --format {HF}.\n  Leave one of them out."
        )
    if max_shard_bytes is not None and wanted != HF:
        raise ValueError(
            f"--max_shard_size with --format {wanted}, which is not cut into shards.\n  Accepted: --max_shard_size with --format {HF}."
            "\n  Leave it out."
        )


def remove(path: Path) -> None:
    """Removes the file or directory if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def parse_size(text: str) -> int:
    """Bytes of "5GB"; ValueError for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNIT_BYTES or not (size := int(float(found[1]) * UNIT_BYTES[found[2].upper()])):
        raise ValueError(
            f"--max_shard_size {text} is no size.\n  Accepted: a number above 0 and KB, MB, GB, KiB, MiB or GiB, such as 5GB.\n"
            "  Correct the flag."
        )
    return size


def check_free(target: Path, wanted: str) -> None:
    if target.exists() and not (wanted != GGUF and target.is_dir() and not any(target.iterdir())):
        accepted = "a file that does not exist" if wanted == GGUF else "a directory that does not exist, or an empty one"
        raise ValueError(f"--to {target} is there already.\n  Accepted: {accepted}.\n  Give another path, or delete this one.")


def open_source(path: Path, step: int | None, wanted: str, base: str = "", *, keep_codes: bool = False) -> Source:
    """The model at `path`, loaded; in the form in which it is written without a second copy. keep_codes: quantized, if it is."""
    if not runs.is_foreign(path):
        run, unused = runs.without_value(runs.load(path, step, base=base))
        carried = runs.carried(run.workdir)
        dtype = "float32" if wanted == RUN else directory.dtype_of(carried)
        coded = keep_codes and not adapt.adapters(run.params)
        config, params, notes = (run.config, run.params, ()) if coded or not run.config.train.transforms else _merge(run)
        return Source(f"{path}, step {run.step}", config, run.tokenizer, params, dtype, unused, carried, run.classes, notes)
    imported = runs.read_imported(path, step, keep_codes=keep_codes)
    if wanted != HF and imported.tokenizer is None:
        raise ValueError(runs.no_tokenizer(imported.path))
    # Checkpoints hold stacked layers.
    imported.config.model.layers_as = "scan" if wanted == RUN else "unrolled"
    loaded = weights.load(imported)
    return Source(
        f"{path} ({imported.architecture})",
        imported.config,
        imported.tokenizer,
        loaded.params,
        directory.dtype_of(imported.files) if keep_codes else _dtype(imported.tensors, wanted),
        loaded.unused,
        imported.files,
        directory.classes_of(imported.files),
        imported.notes,
    )


def _merge(run: runs.Run) -> tuple[ConfigDict, Params, tuple[str, ...]]:
    """(config, parameters, notes) of the run merged."""
    merged = runs.merged(run)
    before, after = logits.of(run.config, run.params), logits.of(merged.config, merged.params)
    change, largest = logits.largest_difference(before, after), float(np.abs(before).max())
    what = f"{', '.join(run.config.train.transforms)} merged into the weights"
    return (
        merged.config,
        merged.params,
        (f"{what}: the largest change of a logit is {change:.2g}, the largest logit {largest:.3g}",),
    )


def _dtype(tensors: Tensors, wanted: str) -> str:
    """That of the largest tensor, if the format has it and no other matrix is quantized in another way; else float32."""
    dtypes = {name: tensors.dtypes[name].lower() for name, shape in tensors.shapes.items() if len(shape) > 1}
    largest = dtypes[max(dtypes, key=lambda name: int(np.prod(tensors.shapes[name])))]
    known = DTYPES[wanted]
    return largest if largest in known and all(dtype in known for dtype in dtypes.values()) else "float32"


def write_hf(
    partial: Path,
    source: Source,
    dtype: str,
    max_shard_bytes: int = directory.MAX_SHARD_BYTES,
    *,
    packing: str = "",
    forced: bool = False,
) -> dict[str, str]:
    """Writes the directory and returns what there is to say about it. packing, forced: as `directory.write` has them."""
    arch = models.build(source.config).config
    written = directory.write(
        partial,
        source.params,
        arch,
        source.tokenizer,
        source.carried,
        classes=source.classes,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        packing=packing,
        forced=forced,
    )
    carried = [name for name in written.files if name in source.carried and name != directory.CONFIG]
    return {
        "architecture": written.architecture,
        "parameters": f"{forms.weights(source.params):,}",
        "packing": packing,
        "tensors": f"{len(written.shapes)} in {sum(name.endswith('.safetensors') for name in written.files)} file(s), {dtype}",
        "files as they were": _listing(carried),
        "files made": _listing([name for name in written.files if name not in carried and not name.endswith(".safetensors")]),
        "notes": "\n".join(written.notes),
    }


def _is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def _write_gguf(partial: Path, name: str, source: Source, dtype: str) -> dict[str, str]:
    """Writes the file and returns what there is to say about it."""
    arch = models.build(source.config).config
    planned = gguf_export.plan(source.params, arch, source.tokenizer, source.carried, dtype=dtype, name=name)
    gguf_write.write(partial, planned.entries, planned.tensors, planned.make)
    return {
        "architecture": planned.architecture,
        "parameters": f"{sum(int(np.prod(tensor.shape)) for tensor in planned.tensors.values()):,}",
        "tensors": f"{len(planned.tensors)}, matrices in {dtype}, vectors in float32",
        "bytes": f"{partial.stat().st_size:,}",
        "notes": "\n".join(planned.notes),
    }


def write_run(partial: Path, target: Path, source: Source) -> dict[str, str]:
    """Writes the run directory and returns what there is to say about it."""
    config = source.config.copy_and_resolve_references()
    config.model.layers_as = "unrolled"
    config.tokenizer.kind, config.tokenizer.path = "file", str(target.absolute() / "tokenizer")
    workdir = Workdir(partial)
    write_text(workdir.config, schema.to_json(config))
    if source.tokenizer is not None:
        source.tokenizer.save(str(workdir.tokenizer))
    (partial / runs.CARRIED).mkdir()
    for name, data in source.carried.items():
        (partial / runs.CARRIED / name).write_bytes(data)
    checkpoints = Checkpoints(workdir.checkpoints)
    checkpoints.save(0, {"params": source.params})
    checkpoints.close()
    coded = any(map(_is_quantized, jax.tree.leaves(source.params, is_leaf=_is_quantized)))
    return {
        "model": f"{config.model.name}, {config.model.layers} layers, width {config.model.width}",
        "parameters": f"{forms.weights(source.params):,}",
        "checkpoint": f"step 0, {'codes and ' if coded else ''}float32",
        "files as they were": _listing([f"{runs.CARRIED}/{name}" for name in source.carried]),
    }


def check(source: Source, target: Path, dtype: str, console: Console) -> int:
    """Prints the largest difference between the logits of the source and of what was written; 0, or 2 if it is too large."""
    exact = logits.of(source.config, source.params)
    if runs.is_foreign(target):
        imported = runs.read_imported(target, keep_codes=True)
        imported.config.model.layers_as = source.config.model.layers_as
        imported.config.precision = source.config.precision
        config, params = imported.config, weights.load(imported).params
    else:
        run = runs.load(target)
        config, params = run.config, run.params
    found, rounds = logits.of(config, params), config.quant.activations == "int8"
    if target.suffix == runs.GGUF:
        stored = gguf_export.as_stored(source.config, source.params, dtype)
    else:
        stored = jax.tree.map(partial(_stored, dtype, rounds), source.params, is_leaf=_is_quantized)
    expected = logits.of(source.config, stored)
    largest, difference, error = (float(np.abs(array).max()) for array in (exact, found - exact, found - expected))
    good = error <= TOLERANCE * largest
    also = ", and activations to 8 bits" if rounds else ""
    console.print(
        f"check: largest difference of logits {difference:.3g}, {error:.3g} from those of weights rounded to {dtype}{also}; the largest"
        f" logit is {largest:.3g}: {'ok' if good else f'TOO LARGE, up to {TOLERANCE * largest:.3g} is accepted'}",
        highlight=False,
    )
    return 0 if good else command.FAILED


def _stored(dtype: str, rounds: bool, node: Any) -> Any:
    """The parameter as a file in `dtype` holds it; codes and their scales lose nothing. rounds: of files whose readers round what Int8
    kernels multiply."""
    if isinstance(node, Int8):
        return dataclasses.replace(node, rounds=rounds)
    return node if _is_quantized(node) else node.astype(dtype).astype(node.dtype)


def _listing(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")


def show(rows: Mapping[str, str], console: Console) -> None:
    """Prints what was converted; rows without content are left out."""
    table = Table(show_header=False)
    for name, text in rows.items():
        if text:
            table.add_row(name, text)
    console.print(table)


if __name__ == "__main__":
    define_flags()
    command.run(main)
