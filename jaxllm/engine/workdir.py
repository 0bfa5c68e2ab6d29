"""The run directory: where each file is, one writer at a time, and whether a changed config may continue what is there."""

import errno
import fcntl
import json
import os
import shlex
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm.data.folder import LOCK

# Fields that a resumed run may change: they alter neither the model, the data nor the recipe. A number in the end: how long it
# runs, what is written when, and how the same sums are computed.
CHANGEABLE = (
    "train.steps",
    "train.microbatches",
    "train.loss_chunk_tokens",
    "train.max_nonfinite_steps",
    "train.log_every_steps",
    "train.trackers",
    "model.attention",
    "model.attention_block_tokens",
    "model.layers_as",
    "model.remat",
    "model.remat_save",
    "model.remat_offload",
    "data.dir",
)
CHANGEABLE_SECTIONS = ("eval", "checkpoint", "sample", "parallel", "watchdog")


class Workdir:
    """Paths of one run. Reading needs no lock; `open_workdir` takes it for writing."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.txt"
        self.environment = self.path / "run.json"
        self.provenance = self.path / "data.json"
        self.report = self.path / "report.html"
        self.pictures = self.path / "pictures"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self.data = self.path / "data"
        self.hosts = self.path / "hosts"
        self.lock = self.path / "lock"
        self._held: IO[str] | None = None
        # Directories that were not there before, this one first.
        self._made: list[Path] = []

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._discard()
        self.close()

    def close(self) -> None:
        """Lets other runs write here."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def _discard(self) -> None:
        """Removes what `acquire` made, if nothing came to be in it but what every run begins with."""
        begun = (self.config, self.lock, self.data / LOCK)
        files = [path for path in self.path.rglob("*") if path.is_file() and path not in begun and self.hosts not in path.parents]
        if self._made and not files:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # another one uses it, too
                for parent in self._made[1:]:
                    parent.rmdir()

    def acquire(self) -> None:
        """Makes the directory and locks it; ValueError that names the owner if another run holds it.

        The lock belongs to the open file, so the system gives it back however this process ends.
        """
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.lock.open("a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"--workdir {self.path} cannot be written: {error}.\n  Accepted: a directory, there or not, that may be written to."
                "\n  Give another --workdir."
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "an unknown process"
            file.close()
            raise ValueError(
                f"--workdir {self.path} is in use by another run: {owner}.\n"
                "  Accepted: a directory that no run is writing to. Wait for it, stop it, or give another --workdir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        # On a network file system other hosts see it only then.
        os.fsync(file.fileno())
        self._held, self._made = file, missing

    def adopt_config(self, config: ConfigDict, newest: int | None) -> None:
        """Writes config.json, if this process holds the lock. newest: the step of the newest checkpoint, if there is one. ValueError
        then if it changes what that was trained with; and one that trains no step more is not written."""
        if newest is not None and self.config.is_file():
            check_continues(schema.load(self.config), config, self.config)
            if config.train.steps <= newest:
                return
        if self._held is not None:
            write_text(self.config, schema.to_json(config))


def open_workdir(path: str | Path) -> Workdir:
    """The run directory, made if need be and locked until `close` or the end of the process. See `Workdir.acquire` for errors."""
    workdir = Workdir(path)
    workdir.acquire()
    return workdir


def check_continues(stored: ConfigDict, given: ConfigDict, where: Path) -> None:
    """ValueError that lists every field with its old and new value, if a run of `stored` cannot go on as `given`."""
    old, new = schema.flatten(stored), schema.flatten(given)
    # 0 stands for what the data has, which may be filled in on either side.
    for key in ("model.vocab_size", "model.classes"):
        if 0 in (old[key], new[key]):
            old[key] = new[key]
    changed = [key for key in schema.SCHEMA if old[key] != new[key] and not may_change(key)]
    if not changed:
        return
    listed = "".join(f"\n  {key} was {old[key]!r} and is now {new[key]!r}" for key in changed)
    back = " ".join(f"--config.{key}={_flag(old[key])}" for key in changed)
    raise ValueError(
        f"the run in {where.parent} was begun with another config ({where.name}):{listed}\n"
        f"  Accepted on resuming: other values of {', '.join(CHANGEABLE)}, or of any field in {', '.join(CHANGEABLE_SECTIONS)}.\n"
        f"  Use another --workdir for a new run, or set it back: {back}"
    )


def may_change(key: str) -> bool:
    """True if a resumed run may have another value of this field."""
    return key in CHANGEABLE or key.partition(".")[0] in CHANGEABLE_SECTIONS


def _flag(value: Any) -> str:
    """The value as a shell takes it; a tuple's quotes stay readable."""
    text = str(value)
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once: a reader, a run killed at any moment, or a power cut finds the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Returns when the names in this directory (a file made, renamed or deleted) are on the disk, not just in memory.

    Some network file systems refuse this for a directory; there nothing more can be done.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes `value`, indented, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


CHECKPOINTS = "the checkpoints of this run"
FEWER = "give another --workdir, or lower checkpoint.keep_last and keep_best"


def check_space(path: str | Path, needed_bytes: int, *, what: str = CHECKPOINTS, change: str = FEWER) -> None:
    """ValueError if the disk of `path` (there or not) has less than `needed_bytes` free for `what`."""
    path = Path(path).absolute()
    free_bytes = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
    if free_bytes < needed_bytes:
        raise ValueError(
            f"{path} is on a disk with {_gib(free_bytes)} free, and {what} need {_gib(needed_bytes)}.\n"
            f"  Accepted: a disk with room for them. Make room, or {change}."
        )


def _gib(count_bytes: int) -> str:
    return f"{count_bytes / 2**30:.2f} GiB" if count_bytes >= 2**30 else f"{count_bytes / 2**20:.1f} MiB"
