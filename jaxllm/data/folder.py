"""The directory that holds prepared data: its lock, its record, and the exchange of old data for new.

New data is made in `.partial/` and moved into place when it is whole. While the move lasts (a few renames) the record says
that the directory is unfinished, so that no moment of a crash leaves a mixture that looks whole.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

RECORD = "data.json"
PARTIAL = ".partial"
LOCK = "lock"
SPLITS = ("train", "validation", "replay", "replay_validation")  # the last two of data.replay_source, if there is one
PARTS = (*SPLITS, "tokenizer")
UNFINISHED = {"unfinished": True}

# Errors of the system: the disk or what one may use of it is full; writing is not allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def read_record(directory: Path) -> dict[str, Any]:
    """The content of data.json; {} if there is none, UNFINISHED if the last prepare was stopped while it moved files."""
    try:
        return json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        return UNFINISHED


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes the record to a file in `.partial/`, from where `replace` moves it into place at one stroke."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _make(directory: Path) -> None:
    """Makes the directory; ValueError if it holds something else under one of the names that prepare would replace."""
    foreign = [name for name in PARTS if (directory / name).exists()]
    if foreign and not read_record(directory):
        raise ValueError(
            f"'{directory}' holds '{foreign[0]}', which prepare has not written (there is no {RECORD}).\n"
            "  Accepted: a new or empty directory, or one with prepared data.\n  Set data.dir to another one, or move it away."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"'{directory}' cannot be made: '{error.filename}' is a file.\n  Accepted: a directory, new or not.\n  Set data.dir."
        ) from error


@contextlib.contextmanager
def explained(directory: Path) -> Iterator[None]:
    """ValueError in place of the system's error if the directory cannot be written to."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ValueError(
                f"the disk with '{directory}' is full ({error.strerror}).\n  Accepted: room for the text, and 5 bytes a token (7 above"
                " 65,536 tokens of vocabulary).\n  Free some space, or set data.dir to another disk. What was prepared before is unchanged."
            ) from error
        if error.errno in CLOSED:
            raise ValueError(
                f"'{directory}' cannot be written to ({error.strerror}).\n  Accepted: a directory in which you may make files.\n"
                "  Change its permissions, or set data.dir to another one."
            ) from error
        raise


@contextlib.contextmanager
def locked(directory: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Makes the directory and holds it for this process; waits for another one that does so. After an error a directory that is new and
    got nothing is gone again.

    The system frees the lock of a killed process.
    """
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    with _lock(directory, log):
        try:
            yield
        except BaseException:
            if new and [path.name for path in directory.iterdir()] == [LOCK]:
                (directory / LOCK).unlink()
                with contextlib.suppress(OSError):  # another process uses it, too
                    for path in new:
                        path.rmdir()
            raise


def _lock(directory: Path, log: Callable[[str], None]) -> IO[str]:
    """The lock file, open and locked."""
    import fcntl

    while True:
        _make(directory)
        file = (directory / LOCK).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that prepares {directory}")
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(directory / LOCK)):
                return file
        # That process failed, and removed the file that was waited for.
        file.close()


def replace(directory: Path) -> None:
    """Moves what is in `.partial/` into place, and what was there before away."""
    partial = directory / PARTIAL
    write_record(partial / "unfinished.json", UNFINISHED)
    (partial / "unfinished.json").replace(directory / RECORD)
    for name in PARTS:
        if (directory / name).exists():
            (directory / name).rename(partial / f"old-{name}")
        if (partial / name).exists():
            (partial / name).rename(directory / name)
    (partial / RECORD).replace(directory / RECORD)
    shutil.rmtree(partial)
