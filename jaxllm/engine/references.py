"""What another model says of the targets: the one that training began with, or a teacher. Scored once, before the first step, and kept
beside the data.

DATA/references/KEY/SPLIT.npy is [N, T], for each target of each row a float32 number, log p of it; or, of a teacher, a record of its K
likeliest tokens and K + 1 numbers, log p of these and of all others. SPLIT.json says what the file must be. KEY is a hash of the
parameters, of what else decides the numbers and of the rows, so that runs on the same data from the same model share it, and others do not
meet it. In a batch these are more arrays: `reference`; `teacher_ids` and `teacher`, those of a row side by side, so that whatever cuts or
reorders its T tokens does it with them. With adapters the first state is the model beside which they stand, as they begin as nothing:
there is no second model in memory, and no adapter to take off. A teacher is in memory while it scores, and before there is a student.
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
from jaxllm.consistency import DISTILL, REFERRED
from jaxllm.data import folder, loader
from jaxllm.data.examples.contract import Array, MakeBatch, row_tokens
from jaxllm.data.prepare import Prepared
from jaxllm.data.shards import Shards, smallest_dtype
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
# The arrays of a batch that a teacher makes.
IDS, TEACHER = "teacher_ids", "teacher"
# Fields of the model that say how it is computed, not what.
HOW = ("attention", "attention_block_tokens", "layers_as", "remat", "remat_save", "remat_offload", "dropout_frac")
SPLITS, MISSING = ("train", "validation"), "is not there"
AGAIN = "Remove it, and start the run again: it is made anew."


def needed(config: ConfigDict) -> bool:
    """Whether the objective compares the model with another one."""
    return config.train.objective in (DISTILL, *REFERRED)


def arrays(config: ConfigDict) -> dict[str, Array]:
    """The arrays that batches have besides those of the data side, by name; none if they are not needed."""
    width, top = row_tokens(config), config.distill.top_k
    if config.train.objective == DISTILL:
        return {IDS: Array(width * top, np.int32), TEACHER: Array(width * (top + 1), np.float32)}
    return {NAME: Array(width, np.float32)} if needed(config) else {}


class References(NamedTuple):
    """numbers: [N, T] by split, float32 or records whose fields are arrays of a batch."""

    key: str
    numbers: Mapping[str, np.ndarray]

    def join(self, split: str, make_batch: MakeBatch) -> MakeBatch:
        """What makes batches of the rows of a split, with what the other model says of them."""
        numbers = self.numbers[split]

        def joined(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
            return make_batch(stored, rows, seed, step) | _arrays(numbers[rows])

        return joined


def _arrays(block: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept of rows as arrays [R, width] of a batch."""
    if block.dtype.names is None:
        return {NAME: np.asarray(block)}
    wide = {IDS: np.int32, TEACHER: np.float32}
    return {name: block[name].astype(wide[name]).reshape(len(block), -1) for name in block.dtype.names}


def joined(references: References | None, split: str, make_batch: MakeBatch) -> MakeBatch:
    """make_batch, with what the other model says where there is one."""
    return make_batch if references is None else references.join(split, make_batch)


class Scorer(NamedTuple):
    """What scores rows: a model on a mesh, so many rows at a time.

    config: its own; that of the run where nothing else is said. title, field: what it is called, and what names it. vocabulary: of a
    teacher the tokens that it tells apart, which the student has, too; 0 for what says log p of the targets alone.
    """

    model: Model
    config: ConfigDict
    plan: Plan
    region: Region
    batch_seqs: int
    title: str
    field: str
    vocabulary: int = 0

    @property
    def dtype(self) -> np.dtype:
        """Of what is kept of a token."""
        top = self.config.distill.top_k
        if not self.vocabulary:
            return np.dtype(np.float32)
        return np.dtype([(IDS, smallest_dtype(self.vocabulary - 1), (top,)), (TEACHER, np.float32, (top + 1,))])

    @property
    def objective(self) -> scores.Scores:
        """What measures a batch."""
        distill, given = self.config.distill, (self.model, self.config.train.loss_chunk_tokens)
        tokens = self.batch_seqs * row_tokens(self.config)
        if not self.vocabulary:
            return scores.TargetScores(*given, tokens)
        return scores.TopScores(*given, tokens, distill.top_k, distill.temperature, self.vocabulary)

    def records(self, found: Mapping[str, np.ndarray]) -> np.ndarray:
        """[R, T] of `dtype`: what the objective measured of all rows."""
        shape = (self.batch_seqs, row_tokens(self.config))
        if not self.vocabulary:
            return found["log_p"].reshape(shape)
        made = np.empty(shape, self.dtype)
        made[IDS], made[TEACHER] = (found[name].reshape(*shape, -1) for name in ("ids", "log_p"))
        return made


def make(scorer: Scorer, prepared: Prepared, params: Params, watchdog: Watchdog, say: Callable[[str], None]) -> References:
    """The references by these parameters: read where they are there, and whole, else scored and written.

    The first process writes; the others find the files. ValueError for a number that is not finite, and on a process whose data.dir is
    not that of the first one.
    """
    key = _key(scorer, params, prepared)
    wrong = {split: why for split in SPLITS if (why := _wrong(prepared, key, split))}
    if processes.from_first(bool(wrong)):
        if any(why != MISSING for why in wrong.values()):
            say("; ".join(f"what {scorer.title} says of {split} {why}" for split, why in wrong.items()) + ": it is made again")
        for split in SPLITS:
            say(f"scoring {len(prepared.splits[split]):,} {split} rows with {scorer.title}")
            _score(scorer, prepared, split, key, params, watchdog)
        processes.wait("references written")
    return read(prepared, key)


def read(prepared: Prepared, key: str) -> References:
    """The references with this key; ValueError if they are not there, damaged, or of other rows."""
    for split in SPLITS:
        if why := _wrong(prepared, key, split):
            raise ValueError(
                f"the log-probabilities '{_path(prepared, key, split)}' of this run cannot be used: the file {why}.\n"
                f"  Accepted: the file as the run wrote it, on a disk that all its hosts share.\n  {AGAIN}"
            )
    return References(key, {split: np.load(_path(prepared, key, split), mmap_mode="r") for split in SPLITS})


def are_there(prepared: Prepared, key: str) -> bool:
    """Whether they can be read, as the first process sees it."""
    return bool(processes.from_first(not any(_wrong(prepared, key, split) for split in SPLITS)))


def _key(scorer: Scorer, params: Params, prepared: Prepared) -> str:
    """Everything that decides the numbers, as a hash."""
    config = scorer.config
    fields = {key: repr(value) for key, value in flatten(config).items() if key.startswith("model.")}
    decides = {
        "format": FORMAT,
        "model": {key: value for key, value in fields.items() if key.removeprefix("model.") not in HOW},
        "compute": config.precision.compute,
        "adapters": {name: config.lora[name] for name in ("alpha", "rslora")} if config.train.transforms else {},
        "parameters": canonical.digests(params),
        "rows": {split: prepared.splits[split].fingerprint for split in SPLITS},
    }
    if scorer.vocabulary:
        decides["teacher"] = [scorer.vocabulary, config.distill.top_k, config.distill.temperature]
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
    if numbers.shape != (len(rows), rows.row_tokens):
        return f"has {list(numbers.shape)} instead of {[len(rows), rows.row_tokens]}"
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
        written = np.lib.format.open_memmap(partial, mode="w+", dtype=scorer.dtype, shape=(len(rows), rows.row_tokens))
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
    """[R, T]: what is kept of all rows, in order."""
    size = scorer.batch_seqs
    measure = jax.jit(on_mesh.make(scorer.objective, scorer.model, scorer.config, scorer.region))

    def placed(stored: Mapping[str, np.ndarray], numbers: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        batch = make_batch(stored, numbers, seed, step)
        width = batch["tokens"].shape[1]
        # Rows come in order, so that the number of one says where in its batch it is.
        place = (numbers % size)[:, None] * width + np.arange(width)
        return batch | {scores.PLACE: place.astype(np.int32)}

    batches = loader.sweep(rows, scorer.plan.arrange(placed), size, scorer.plan.batch_sharding())
    for start, batch in zip(range(0, len(rows), size), watchdog.each(batches), strict=True):
        found = {name: np.asarray(each.total) for name, each in jax.device_get(measure(params, batch)).items()}
        finite = np.isfinite(found["log_p"]).reshape(size, -1).all(1)[: len(rows) - start]
        if not finite.all():
            raise ValueError(
                f"{scorer.title} gives row {start + int(np.argmin(finite))} of '{rows.directory}' a log-probability that is not finite.\n"
                "  Accepted: finite numbers, as of targets that are in its vocabulary.\n"
                f"  Look at the row (jaxllm.prepare --show), at {scorer.field}, and at precision.compute."
            )
        yield scorer.records(found)[: len(rows) - start]
