"""Checkpoints: written in the background, visible all at once, verified when read. Nothing falls back to an older step by itself.

A directory holds one folder a step (engine/folder.py). What training does not change, the tree `frozen` of the state, is written
once, into the folder `frozen`, before the first step is committed. A step holds all the rest and the fingerprint of the frozen tree
that it belongs to. State is stored in canonical form (engine/canonical.py), so that it can be read under any mesh and either form of
the layer stack.
"""

import concurrent.futures
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import logging

from jaxllm.engine import canonical, folder
from jaxllm.engine.digest import digests
from jaxllm.engine.parameters import FROZEN, Parts
from jaxllm.engine.record import CheckpointError, DamagedError, Leaf, Record, check_fits, check_meta
from jaxllm.parallel import processes
from jaxllm.transforms import tree

COMMITTED = re.compile(r"\d+")
LEFTOVER = re.compile(rf"(\d+|{FROZEN})\..+")


# What is left to do when the frozen tree is damaged.
NO_WAY_OUT = (
    "  Accepted: this folder as it was written. All checkpoints of the run share it, so that none can be restored without it.\n"
    "  Bring it back from a copy, or start again in another --workdir."
)


@dataclass(frozen=True)
class Restored:
    """tree: the state or the parameters, in the form and with the shardings of the template. meta: as given to `save`."""

    step: int
    tree: Any
    meta: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run. One run writes (see engine/workdir.py); any number may read at the same time.

    Of a run with several processes all save and restore together, each its own part of the arrays; the first one renames and deletes.

    keep_last: how many of the newest are kept. keep_best: how many are kept besides, by the lowest validation loss.
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 1, keep_best: int = 0):
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        # Waits for the files, then deletes what need not be kept: the next step does not wait for either.
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        # What this process has written, or read and verified: folder -> its record.
        self._intact: dict[Path, Record] = {}

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if COMMITTED.fullmatch(path.name))

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.steps(), default=None)

    def incomplete(self) -> list[str]:
        """Names of folders that a killed save or deletion left behind. They are never read."""
        if not self.directory.is_dir():
            return []
        return sorted(path.name for path in self.directory.iterdir() if LEFTOVER.fullmatch(path.name))

    def remove_incomplete(self) -> list[str]:
        """Deletes these folders and returns their names. Only for the process that writes: it may be a save in progress."""
        self.wait()
        names = self.incomplete()
        for name in names:
            shutil.rmtree(self.directory / name, ignore_errors=True)
        if names:
            logging.info("removed what an interrupted save left in %s: %s", self.directory, ", ".join(names))
        return names

    def has_frozen(self) -> bool:
        """True if the frozen tree is there, so that no step to come needs room for it."""
        return self._path(FROZEN).is_dir()

    def record(self, step: int) -> Record:
        """What the checkpoint says about itself; DamagedError if that cannot be read."""
        return folder.read_record(self._path(step))

    def save(self, step: int, state: Any, *, loss: float | None = None, meta: Mapping[str, Any] | None = None) -> float:
        """Starts to write `state` and returns the seconds for which it blocked. `state` may be donated as soon as it returns.

        loss: validation loss of exactly this step, if known, for keep_best. meta: JSON that `restore` gives back.
        A checkpoint of this step that holds the same arrays is left as it is, and so is the frozen tree. CheckpointError if this
        save cannot start, the one before failed in the background, or the frozen tree is not that of the steps which are there.
        """
        began = time.perf_counter()
        check_meta(meta or {})
        self.wait()
        frozen, changing = tree.split(state, {name for name in tree.names(state) if name.startswith(f"{FROZEN}/")})
        arrays = canonical.canonicalize(changing)
        base = _record_of(frozen)
        belongs = base.fingerprint() if base.leaves else None
        loss = float(loss) if loss is not None and math.isfinite(loss) else None
        record = Record(int(step), loss, _leaves(changing, digests(arrays)), meta or {}, {}, belongs)
        writing: list[tuple[Path, Record, Mapping[str, jax.Array]]] = []
        if base.leaves and not self._holds(self._path(FROZEN), base):
            self._check_shared(base)
            writing.append((self._path(FROZEN), base, canonical.canonicalize(frozen)))
        if not self._holds(self._path(step), record):
            writing.append((self._path(step), record, arrays))
        if writing:
            self._begin(step, writing)
        return time.perf_counter() - began

    def wait(self) -> None:
        """Returns when the last save is committed and older ones are deleted; CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def settle(self, secs: float) -> bool:
        """Waits at most `secs` for a save in progress, from any thread and without raising; whether none is left."""
        pending = self._pending
        return pending is None or not concurrent.futures.wait([pending], timeout=secs).not_done

    def close(self) -> None:
        """Waits as `wait` does; nothing can be saved afterwards. A save that was not waited for may be lost."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def restore(self, template: Any, step: int | None = None, *, frozen: Any = None) -> Restored:
        """The whole state of `step` (None: the newest), verified.

        template: the state as jax.ShapeDtypeStructs with shardings, in either form of the layer stack. frozen: the frozen tree, where
        it is in memory already; it is compared by its digests and not read, and the template has none. CheckpointError if there is
        no such step, if it is from another model (decided before anything is loaded), or if it is damaged: then the error names
        the damage and the next older step that is good.
        """
        wanted, held = canonical.named(canonical.abstract(template)), canonical.layers_held(template)
        base = None if frozen is None else _record_of({FROZEN: frozen})

        def load(candidate: int) -> Restored:
            records = self._records(candidate)
            if base is not None:
                self._check_belongs(candidate, records, base)
            parts = {path: record for path, record in records.items() if base is None or path != self._path(FROZEN)}
            arrays = self._read(candidate, parts, _all_leaves(parts), wanted, held)
            self._intact.update(records)
            return Restored(candidate, canonical.restore_form(arrays, template), records[self._path(candidate)].meta)

        return self._load(load, self._choose(step))

    def load_params(self, template: Any, step: int | None = None) -> Restored:
        """The model parameters alone, for inference: the averaged ones where the run has them, frozen ones included.

        template: the whole parameter tree, as in `restore`. Raises what `restore` raises.
        """
        wanted = canonical.named(canonical.abstract(template))

        def load(candidate: int) -> Restored:
            records = self._records(candidate)
            parts = Parts(wanted, _all_leaves(records))
            arrays = self._read(candidate, records, parts.saved, parts.wanted, parts.held)
            meta = records[self._path(candidate)].meta
            return Restored(candidate, canonical.restore_form(parts.join(arrays), template), meta)

        return self._load(load, self._choose(step))

    def _choose(self, step: int | None) -> int:
        """`step` if it is committed, the newest one for None."""
        steps, incomplete = self.steps(), self.incomplete()
        if incomplete:
            logging.warning("skipped in %s, as it was never completed: %s", self.directory, ", ".join(incomplete))
        if not steps:
            raise CheckpointError(
                f"no checkpoint in {self.directory}.\n  Accepted: a run that has saved at least one."
                " Train first, or give another --workdir."
            )
        if step is not None and step not in steps:
            raise CheckpointError(
                f"no checkpoint of step {step} in {self.directory}.\n  Accepted: {', '.join(map(str, steps))}."
                "\n  Ask for one of these, or for none to get the newest."
            )
        return steps[-1] if step is None else step

    def _load(self, load: Callable[[int], Restored], step: int) -> Restored:
        """`load(step)`; if that is damaged, the error also says which older step is good, if that can be."""
        try:
            return load(step)
        except DamagedError as error:
            self._intact.pop(error.path, None)
            if not self._path(step).exists():
                raise CheckpointError(
                    f"checkpoint {self._path(step)} was deleted while it was read; its run keeps checkpoint.keep_last of them.\n"
                    f"  Accepted: one that is there: {', '.join(map(str, self.steps())) or 'none'}. Run the same command again."
                ) from error
            way_out = NO_WAY_OUT if error.path == self._path(FROZEN) else self._way_out(load, step)
            raise DamagedError(error.path, error.what, f" Nothing was loaded.\n{way_out}") from error

    def _way_out(self, load: Callable[[int], Restored], step: int) -> str:
        for older in reversed([older for older in self.steps() if older < step]):
            try:
                load(older)
            except CheckpointError:
                continue
            return (
                f"  Accepted: an undamaged checkpoint. Step {older} was read and verified just now.\n"
                f"  To go on from it, delete {self._path(step)} and run the same command again."
            )
        return "  Accepted: an undamaged checkpoint. This run has no older good one: start again in another --workdir."

    def _records(self, step: int) -> dict[Path, Record]:
        """Folder -> record of all that the checkpoint is made of: the step itself, and what is frozen where that lies apart."""
        record = self.record(step)
        if record.frozen is None:
            return {self._path(step): record}
        base = folder.read_record(self._path(FROZEN))
        if base.fingerprint() != record.frozen:
            raise CheckpointError(
                f"checkpoint {self._path(step)} belongs to other frozen parameters than those in {self._path(FROZEN)};"
                " nothing was loaded.\n"
                f"  Accepted: the folder '{FROZEN}' that the same run wrote (fingerprint {record.frozen}; this one has"
                f" {base.fingerprint()}).\n"
                "  Bring it back from a copy of the run, or start again in another --workdir."
            )
        return {self._path(FROZEN): base, self._path(step): record}

    def _read(
        self,
        step: int,
        records: Mapping[Path, Record],
        saved: Mapping[str, Leaf],
        wanted: Mapping[str, jax.ShapeDtypeStruct],
        held: Mapping[str, tuple[int, ...]],
    ) -> dict[str, jax.Array]:
        """The arrays `wanted`, by their name in the checkpoint, after a check that they are all of `saved` and undamaged."""
        check_fits(saved, wanted, held, f"checkpoint {self._path(step)}")
        arrays: dict[str, jax.Array] = {}
        for path, record in records.items():
            arrays |= folder.read(path, record, {name: like for name, like in wanted.items() if name in record.leaves})
        return arrays

    def _holds(self, path: Path, record: Record) -> bool:
        """True if exactly these arrays are there and intact, as after a resume that is stopped before its first step."""
        intact = self._intact.get(path)
        return intact is not None and (intact.leaves, intact.frozen) == (record.leaves, record.frozen) and path.is_dir()

    def _check_belongs(self, step: int, records: Mapping[Path, Record], base: Record) -> None:
        """CheckpointError if the step was not saved with these frozen parameters."""
        if records[self._path(step)].frozen != base.fingerprint():
            raise CheckpointError(
                f"checkpoint {self._path(step)} belongs to other frozen parameters than those in memory; nothing was loaded.\n"
                "  Accepted: a run that began with the same model, the same seed and the same transforms.\n"
                "  Go on with this run by itself (python -m jaxllm.train), or use another --workdir."
            )

    def _check_shared(self, base: Record) -> None:
        """CheckpointError if steps that are there belong to another frozen tree, which writing this one would take from them."""
        records = [record for step in self.steps() if (record := self._readable(step)) is not None]
        others = [str(record.step) for record in records if record.frozen not in (None, base.fingerprint())]
        if others:
            raise CheckpointError(
                f"the frozen parameters are not those of the checkpoints in {self.directory} (of step {', '.join(others)}).\n"
                "  Accepted: one frozen tree for all checkpoints of a run, which nothing changes.\n"
                "  Go on from one of these checkpoints, or use another --workdir."
            )

    def _begin(self, step: int, writing: list[tuple[Path, Record, Mapping[str, jax.Array]]]) -> None:
        """Starts to write these folders and has them committed, in this order, in the background."""
        for path, _, _ in writing:
            self._clear(path)
        processes.wait("checkpoint begun")
        responses: list[Any] = []
        try:
            for path, _, arrays in writing:
                responses.append(folder.begin(path, arrays))
        except OSError as error:
            with suppress(Exception):
                folder.finish(responses)
            raise self._unwritten(step, error) from error
        records = {path: record for path, record, _ in writing}
        self._pending = self._writer.submit(self._commit, step, records, responses)

    def _commit(self, step: int, records: Mapping[Path, Record], responses: list[Any]) -> None:
        """Runs in the background: waits for the arrays, makes them visible, deletes what need not be kept."""
        try:
            folder.finish(responses)
            if jax.process_index() == 0:
                for path, record in records.items():
                    folder.commit(path, record)
            # Nobody goes on to look for it, or to save it again, before it is there.
            processes.wait("checkpoint written")
        except Exception as error:
            for path in records:
                self._clear(path)
            raise self._unwritten(step, error) from error
        self._intact.update(records)
        self._prune()

    def _path(self, name: int | str) -> Path:
        return self.directory / str(name)

    def _clear(self, path: Path) -> None:
        if jax.process_index() == 0:
            folder.clear(path)

    def _unwritten(self, step: int, error: Exception) -> CheckpointError:
        intact = ", ".join(map(str, self.steps())) or "none"
        free = shutil.disk_usage(next(path for path in (self.directory, *self.directory.parents) if path.exists())).free
        return CheckpointError(
            f"checkpoint of step {step} could not be written to {self.directory}: {folder.summary(error)}.\n"
            f"  Accepted: a writable disk with room; {free / 2**20:.0f} MiB are free. Intact: {intact}.\n"
            "  Make room and run the same command again."
        )

    def _prune(self) -> None:
        """Deletes what neither keep_last nor keep_best protects."""
        steps = self.steps()
        records = {step: record for step in steps if (record := self._readable(step)) is not None}
        losses = {step: record.loss for step, record in records.items() if record.loss is not None}
        best = sorted(losses, key=lambda step: (losses[step], -step))[: self._keep_best]
        for step in set(steps) - set(steps[-self._keep_last :]) - set(best):
            self._delete(step)

    def _readable(self, step: int) -> Record | None:
        try:
            return self.record(step)
        except DamagedError:
            return None

    def _delete(self, step: int) -> None:
        self._intact.pop(self._path(step), None)
        if jax.process_index() == 0:
            shutil.rmtree(folder.set_aside(self._path(step)))


def _record_of(frozen: Any) -> Record:
    """Of the frozen tree, which belongs to no step."""
    return Record(0, None, _leaves(frozen, canonical.digests(frozen)), {}, {})


def _leaves(part: Any, sums: Mapping[str, str]) -> dict[str, Leaf]:
    held, arrays = canonical.layers_held(part), canonical.named(canonical.abstract(part))
    return {name: Leaf(like.shape, like.dtype.name, sums[name], held.get(name, ())) for name, like in arrays.items()}


def _all_leaves(records: Mapping[Path, Record]) -> dict[str, Leaf]:
    return {name: leaf for record in records.values() for name, leaf in record.leaves.items()}
