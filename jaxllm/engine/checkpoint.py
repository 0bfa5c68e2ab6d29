"""Checkpoints: written in the background, visible all at once, verified when read. Nothing falls back to an older step by itself.

A directory holds one folder a step. Orbax (https://orbax.readthedocs.io, v1 API) writes the arrays; the record (engine/record.py)
with their digests joins them, and one rename commits both. State is stored in canonical form (engine/canonical.py), so that it can
be read under any mesh and either form of the layer stack.
"""

import concurrent.futures
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from jaxllm.engine import canonical
from jaxllm.engine.digest import digests
from jaxllm.engine.record import CheckpointError, DamagedError, Leaf, Record, check_fits, check_meta, from_json
from jaxllm.engine.workdir import sync_directory, write_json
from jaxllm.parallel import processes

STATE = "state"
RECORD = "record.json"
# Trees of the train state that hold model parameters, best for inference first: the averaged weights, if there are any.
PARAMETERS = ("ema", "params", "frozen")
COMMITTED = re.compile(r"\d+")
LEFTOVER = re.compile(r"\d+\..+")
# Endings of folders that are not, or no longer, a checkpoint.
SAVING, DELETING = ".saving", ".deleting"


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
        # What this process has written, or read and verified.
        self._intact: dict[int, Mapping[str, Leaf]] = {}

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

    def record(self, step: int) -> Record:
        """What the checkpoint says about itself; DamagedError if that cannot be read."""
        path = self._path(step)
        try:
            return from_json(json.loads((path / RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise DamagedError(f"checkpoint {path} is damaged: its record ({RECORD}) cannot be read: {_summary(error)}.") from error

    def save(self, step: int, state: Any, *, loss: float | None = None, meta: Mapping[str, Any] | None = None) -> float:
        """Starts to write `state` and returns the seconds for which it blocked. `state` may be donated as soon as it returns.

        loss: validation loss of exactly this step, if known, for keep_best. meta: JSON that `restore` gives back.
        A checkpoint of this step that holds the same arrays is left as it is. CheckpointError if this save cannot start or the
        one before failed in the background.
        """
        began = time.perf_counter()
        check_meta(meta or {})
        self.wait()
        arrays = canonical.canonicalize(state)
        sums = digests(arrays)
        leaves = {name: Leaf(tuple(array.shape), array.dtype.name, sums[name]) for name, array in arrays.items()}
        record = Record(int(step), float(loss) if loss is not None and math.isfinite(loss) else None, leaves, meta or {}, {})
        if not self._holds(record):
            self._clear(step)
            processes.wait("checkpoint begun")
            # When Orbax returns, the arrays are in host memory: on a CPU these are views of the same memory, which JAX does not
            # let a donating step reuse while somebody looks at it.
            try:
                with _context():
                    response = ocp.save_checkpointables_async(self._path(step, SAVING), {STATE: canonical.nested(arrays)})
            except OSError as error:
                raise self._unwritten(step, error) from error
            self._pending = self._writer.submit(self._commit, record, response)
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

    def restore(self, template: Any, step: int | None = None) -> Restored:
        """The whole state of `step` (None: the newest), verified.

        template: the state as jax.ShapeDtypeStructs with shardings, in either form of the layer stack. CheckpointError if there is
        no such step, if it is from another model (decided before anything is loaded), or if it is damaged: then the error names
        the damage and the next older step that is good.
        """
        wanted = canonical.named(canonical.abstract(template))

        def load(candidate: int) -> Restored:
            record = self.record(candidate)
            arrays = self._read(record, record.leaves, wanted)
            self._intact[candidate] = record.leaves
            return Restored(candidate, canonical.restore_form(arrays, template), record.meta)

        return self._load(load, self._choose(step))

    def load_params(self, template: Any, step: int | None = None) -> Restored:
        """The model parameters alone, for inference: the averaged ones where the run has them, frozen ones included.

        template: the whole parameter tree, as in `restore`. Raises what `restore` raises.
        """
        wanted = canonical.named(canonical.abstract(template))

        def load(candidate: int) -> Restored:
            record = self.record(candidate)
            found = {name: _holder(name, record) for name in wanted}
            saved = {name: record.leaves[name] for name in found.values() if name in record.leaves}
            for name, leaf in record.leaves.items():
                if name.startswith(("params/", "frozen/")) and name.partition("/")[2] not in wanted:
                    saved[name] = leaf
            arrays = self._read(record, saved, {found[name]: leaf for name, leaf in wanted.items()})
            return Restored(
                candidate, canonical.restore_form({name: arrays[found[name]] for name in wanted}, template), record.meta
            )

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
        """`load(step)`; if that is damaged, the error also says which older step is good."""
        try:
            return load(step)
        except DamagedError as error:
            self._intact.pop(step, None)
            if not self._path(step).exists():
                raise CheckpointError(
                    f"checkpoint {self._path(step)} was deleted while it was read; its run keeps checkpoint.keep_last of them.\n"
                    f"  Accepted: one that is there: {', '.join(map(str, self.steps())) or 'none'}. Run the same command again."
                ) from error
            raise DamagedError(f"{error} Nothing was loaded.\n{self._way_out(load, step)}") from error

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

    def _read(self, record: Record, saved: Mapping[str, Leaf], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The arrays `wanted`, by their name in the checkpoint, after a check that they are all of `saved` and undamaged."""
        path = self._path(record.step)
        check_fits(saved, wanted, f"checkpoint {path}")
        _check_files(record, path)
        try:
            with _context():
                arrays = canonical.named(ocp.load_checkpointables(path, {STATE: canonical.nested(wanted)})[STATE])
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in _summary(error):
                raise  # Too little memory is no damage.
            raise DamagedError(f"checkpoint {path} is damaged: {_summary(error)}.") from error
        sums = digests(arrays)
        altered = [name for name in wanted if sums[name] != saved[name].digest]
        if altered:
            more = f" and {len(altered) - 4} more" if len(altered) > 4 else ""
            raise DamagedError(f"checkpoint {path} is damaged: the digest does not fit {', '.join(altered[:4])}{more}.")
        return arrays

    def _holds(self, record: Record) -> bool:
        """True if exactly these arrays are there and intact, as after a resume that is stopped before its first step."""
        return self._intact.get(record.step) == record.leaves and record.step in self.steps()

    def _commit(self, record: Record, response: Any) -> None:
        """Runs in the background: waits for the arrays, adds the record, makes both visible, deletes what need not be kept."""
        try:
            response.result()
            if jax.process_index() == 0:
                folder = self._path(record.step, SAVING)
                files = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
                write_json(folder / RECORD, replace(record, files=files).to_json())
                replaced = self._set_aside(record.step)
                folder.rename(self._path(record.step))
                # Also a power cut must find the new one before older ones are deleted.
                sync_directory(self.directory)
                shutil.rmtree(replaced, ignore_errors=True)
            # Nobody goes on to look for it, or to save it again, before it is there.
            processes.wait("checkpoint written")
        except Exception as error:
            self._clear(record.step)
            raise self._unwritten(record.step, error) from error
        self._intact[record.step] = record.leaves
        self._prune()

    def _path(self, step: int, ending: str = "") -> Path:
        return self.directory / f"{step}{ending}"

    def _clear(self, step: int) -> None:
        """Removes what an earlier attempt to save this step left behind."""
        if jax.process_index() == 0:
            for path in self.directory.glob(f"{step}.*"):
                shutil.rmtree(path, ignore_errors=True)

    def _unwritten(self, step: int, error: Exception) -> CheckpointError:
        intact = ", ".join(map(str, self.steps())) or "none"
        free = shutil.disk_usage(next(path for path in (self.directory, *self.directory.parents) if path.exists())).free
        return CheckpointError(
            f"checkpoint of step {step} could not be written to {self.directory}: {_summary(error)}.\n"
            f"  Accepted: a writable disk with room; {free / 2**20:.0f} MiB are free. Intact: {intact}.\n"
            "  Make room and run the same command again."
        )

    def _prune(self) -> None:
        """Deletes what neither keep_last nor keep_best protects."""
        steps = self.steps()
        losses = {step: loss for step in steps if (loss := self._loss(step)) is not None}
        best = sorted(losses, key=lambda step: (losses[step], -step))[: self._keep_best]
        for step in set(steps) - set(steps[-self._keep_last :]) - set(best):
            self._delete(step)

    def _loss(self, step: int) -> float | None:
        try:
            return self.record(step).loss
        except DamagedError:
            return None

    def _delete(self, step: int) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self._set_aside(step))

    def _set_aside(self, step: int) -> Path:
        """Renames a committed step, if it is there: a deletion that is cut short must not leave what looks like a checkpoint."""
        self._intact.pop(step, None)
        path, doomed = self._path(step), self._path(step, DELETING)
        shutil.rmtree(doomed, ignore_errors=True)
        if path.exists():
            path.rename(doomed)
        return doomed


def _holder(name: str, record: Record) -> str:
    """Name under which the checkpoint holds a model parameter; that of the trained one if it holds none."""
    return next((full for tree in PARAMETERS if (full := f"{tree}/{name}") in record.leaves), f"params/{name}")


def _check_files(record: Record, path: Path) -> None:
    """DamagedError if a file is gone or has another size: plainer than what the storage library says to it."""
    for name, size_bytes in record.files.items():
        found_bytes = (path / name).stat().st_size if (path / name).is_file() else None
        if found_bytes != size_bytes:
            what = "is missing" if found_bytes is None else f"has {found_bytes} bytes instead of {size_bytes}"
            raise DamagedError(f"checkpoint {path} is damaged: its file {name} {what}.")


def _context() -> ocp.Context:
    context = ocp.Context()
    # Weights are noise to a compressor: it saves a tenth of the bytes and takes five times as long.
    context.array.saving.use_compression = False
    context.pytree.loading.partial_load = True
    return context


def _summary(error: BaseException) -> str:
    """The first cause of an error on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    # Tensorstore appends a page of its settings.
    text = " ".join(str(error).partition(" [tensorstore_spec")[0].split())
    return f"{type(error).__name__}: {text[:600]}"
