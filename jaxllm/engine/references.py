"""What the model that training began with says of the targets: scored once, before the first step, and kept beside the data.

DATA/references/KEY/SPLIT.npy is float32 [N, T], a number for each target of each row; SPLIT.json says what it must be. KEY is a hash of the
parameters, of what else decides the numbers and of the rows, so that runs on the same data from the same model share it, and others do not
meet it. In a batch it is one more array, `reference`. With adapters the first state is the model beside which they stand, as they begin
as nothing: there is no second model in memory, and no adapter to take off.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxllm.config import flatten
from jaxllm.consistency import REFERRED
from jaxllm.data import folder, loader
from jaxllm.data.examples.contract import Array, MakeBatch, row_tokens
from jaxllm.data.prepare import Prepared
from jaxllm.data.shards import Shards
from jaxllm.engine import canonical
from jaxllm.engine.watchdog import Watchdog
from jaxllm.objectives import scores
from jaxllm.parallel import measure as on_mesh
from jaxllm.parallel import processes
from jaxllm.parallel.plan import Plan
from jaxllm.parallel.region import Region
from jaxllm.types import Model, Params

# The array of a batch, the folder in the data's, and the form of what is in it.
NAME, FOLDER, FORMAT = "reference", "references", 1
# Fields of the model that say how it is computed, not what.
HOW = ("attention", "attention_block_tokens", "layers_as", "remat", "remat_save", "remat_offload", "dropout_frac")
SPLITS, MISSING = ("train", "validation"), "is not there"
AGAIN = "Remove it, and start the run again: it is made from the first state."


def needed(config: ConfigDict) -> bool:
    """Whether the objective compares the model with the one that training began with."""
    return config.train.objective in REFERRED


def arrays(config: ConfigDict) -> dict[str, Array]:
    """The array that batches have besides those of the data side, by name; none if it is not needed."""
    return {NAME: Array(row_tokens(config), np.float32)} if needed(config) else {}


class References(NamedTuple):
    """numbers: float32 [N, T] by split."""

    key: str
    numbers: Mapping[str, np.ndarray]

    def join(self, split: str, make_batch: MakeBatch) -> MakeBatch:
        """What makes batches of the rows of a split, with the array `reference`."""
        numbers = self.numbers[split]

        def joined(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
            return make_batch(stored, rows, seed, step) | {NAME: np.asarray(numbers[rows], np.float32)}

        return joined


def joined(references: References | None, split: str, make_batch: MakeBatch) -> MakeBatch:
    """make_batch, with the array `reference` where there are references."""
    return make_batch if references is None else references.join(split, make_batch)


class Scorer(NamedTuple):
    """What scores rows: a model on a mesh, so many rows at a time."""

    model: Model
    config: ConfigDict
    plan: Plan
    region: Region
    batch_seqs: int


def make(scorer: Scorer, prepared: Prepared, params: Params, watchdog: Watchdog, say: Callable[[str], None]) -> References:
    """The references of these parameters, those of the first state: read where they are there, and whole, else scored and written.

    The first process writes; the others find the files. ValueError for a number that is not finite, and on a process whose data.dir is
    not that of the first one.
    """
    key = _key(scorer.config, params, prepared)
    wrong = {split: why for split in SPLITS if (why := _wrong(prepared, key, split))}
    if processes.from_first(bool(wrong)):
        if any(why != MISSING for why in wrong.values()):
            say("; ".join(f"the reference of {split} {why}" for split, why in wrong.items()) + ": it is made again")
        for split in SPLITS:
            say(f"scoring {len(prepared.splits[split]):,} {split} rows with the model that training begins with")
            _score(scorer, prepared, split, key, params, watchdog)
        processes.wait("references written")
    return read(prepared, key)


def read(prepared: Prepared, key: str) -> References:
    """The references with this key; ValueError if they are not there, damaged, or of other rows."""
    for split in SPLITS:
        if why := _wrong(prepared, key, split):
            raise ValueError(
                f"the reference log-probabilities '{_path(prepared, key, split)}' of this run cannot be used: the file {why}.\n"
                f"  Accepted: the file as the run wrote it, on a disk that all its hosts share.\n  {AGAIN}"
            )
    return References(key, {split: np.load(_path(prepared, key, split), mmap_mode="r") for split in SPLITS})


def are_there(prepared: Prepared, key: str) -> bool:
    """Whether they can be read, as the first process sees it."""
    return bool(processes.from_first(not any(_wrong(prepared, key, split) for split in SPLITS)))


def _key(config: ConfigDict, params: Params, prepared: Prepared) -> str:
    """Everything that decides the numbers, as a hash."""
    fields = {key: repr(value) for key, value in flatten(config).items() if key.startswith("model.")}
    decides = {
        "format": FORMAT,
        "model": {key: value for key, value in fields.items() if key.removeprefix("model.") not in HOW},
        "compute": config.precision.compute,
        "adapters": {name: config.lora[name] for name in ("alpha", "rslora")} if config.train.transforms else {},
        "parameters": canonical.digests(params),
        "rows": {split: prepared.splits[split].fingerprint for split in SPLITS},
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def _path(prepared: Prepared, key: str, split: str) -> Path:
    return prepared.directory / FOLDER / key / f"{split}.npy"


def _wrong(prepared: Prepared, key: str, split: str) -> str | None:
    """Why the file cannot be used, or None."""
    path, rows = _path(prepared, key, split), prepared.splits[split]
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return MISSING
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        numbers = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    if told.get("rows") != rows.fingerprint:
        return "is of other rows"
    if numbers.shape != (len(rows), rows.row_tokens) or numbers.dtype != np.float32:
        return f"has {numbers.dtype} {list(numbers.shape)} instead of float32 {[len(rows), rows.row_tokens]}"
    return None if _sha256(path) == told.get("sha256") else "was damaged after it was written: its sha256 is another one"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _score(scorer: Scorer, prepared: Prepared, split: str, key: str, params: Params, watchdog: Watchdog) -> None:
    """Scores the rows of a split on all devices; the first process writes the file, and what it must be."""
    rows, path = prepared.splits[split], _path(prepared, key, split)
    blocks = _blocks(scorer, rows, prepared.make_batch(scorer.config), params, watchdog)
    if not processes.is_first():
        for _ in blocks:
            pass
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    with folder.explained(prepared.directory):
        path.parent.mkdir(parents=True, exist_ok=True)
        written = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(len(rows), rows.row_tokens))
        start = 0
        for block in blocks:
            written[start : start + len(block)] = block
            start += len(block)
        written.flush()
        told = {"format": FORMAT, "rows": rows.fingerprint, "sha256": _sha256(partial)}
        described = partial.with_suffix(".json")
        described.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
        os.replace(described, path.with_suffix(".json"))


def _blocks(scorer: Scorer, rows: Shards, make_batch: MakeBatch, params: Params, watchdog: Watchdog) -> Iterator[np.ndarray]:
    """float32 [R, T]: the numbers of all rows, in order."""
    config, size = scorer.config, scorer.batch_seqs
    objective = scores.Scores(scorer.model, config.train.loss_chunk_tokens, size)
    measure = jax.jit(on_mesh.make(objective, scorer.model, config, scorer.region))

    def placed(stored: Mapping[str, np.ndarray], numbers: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        batch = make_batch(stored, numbers, seed, step)
        # Rows come in order, so that the number of one says where in its batch it is.
        place = np.broadcast_to((numbers % size).astype(np.int32)[:, None], batch["tokens"].shape)
        return batch | {scores.PLACE: place}

    batches = loader.sweep(rows, scorer.plan.arrange(placed), size, scorer.plan.batch_sharding())
    for start, batch in zip(range(0, len(rows), size), watchdog.each(batches), strict=True):
        block = np.asarray(jax.device_get(measure(params, batch)["log_p"].total))[: len(rows) - start]
        if not np.isfinite(block).all():
            row = start + int(np.flatnonzero(~np.isfinite(block).all(1))[0])
            raise ValueError(
                f"the model that training begins with gives row {row} of '{rows.directory}' a log-probability that is not finite.\n"
                "  Accepted: finite numbers, as of targets that are in its vocabulary.\n"
                "  Look at the row (jaxllm.prepare --show), at train.start, and at precision.compute."
            )
        yield block
