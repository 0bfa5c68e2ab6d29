"""Starts JAX on all processes of a run, and ends a failed process so that the others notice."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import jax

from jaxllm.parallel import environments, rollcall
from jaxllm.parallel.environments import Alone, Metadata, Place

# For all processes to come together: containers are pulled and nodes boot at different speeds.
START_SECS = 300.0
START_VARIABLE = "JAXLLM_START_SECS"
# After that long without a sign of life of one process the others end, with a line that names it.
HEARTBEAT_SECS = 100
# At the end, for process 0 to write the report while the others wait.
SHUTDOWN_SECS = 600
# The exit code of a process that cannot go on because another one has ended ("remote error in protocol" in sysexits.h).
ANOTHER_ENDED = 76
# What collectives and JAX's own service say then.
_ANOTHER = re.compile(r"\[Gloo\]|Gloo|NCCL|[Cc]onnection (reset|closed|refused)|coordination service|heartbeat")


def start(say: Callable[[str], None], environ: Mapping[str, str] = os.environ) -> None:
    """Joins this process with the others of its run, as the environment describes them; says in one line what it found.

    To be called before anything touches a device. Nothing happens in an environment that says nothing. ValueError for one that is
    incomplete, and if the others are not there after $JAXLLM_START_SECS (300).
    """
    timeout_secs = rollcall.seconds(environ, START_VARIABLE, START_SECS)
    place = environments.find(environ)
    if isinstance(place, Alone):
        if place.reason:
            say(f"{place.environment}: training alone, as {place.reason}")
        return
    # Its handler would swallow a SIGTERM before training; during training, engine/signals.py agrees on when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    if isinstance(place, Metadata):
        _ask_metadata(place, timeout_secs)
    else:
        rollcall.gather(place, timeout_secs)
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            place.local_devices,
            # JAX's own search would take one GPU a process where the table says all.
            cluster_detection_method="deactivate",
            coordinator_bind_address=rollcall.bind_address(place.coordinator),
            initialization_timeout=max(round(timeout_secs), 1),
            heartbeat_timeout_seconds=HEARTBEAT_SECS,
            shutdown_timeout_seconds=SHUTDOWN_SECS,
        )
    say(describe(place))


def describe(place: Place | Metadata) -> str:
    """`Slurm: process 3 of 8, coordinator node17:4521, 4 local devices`, once JAX has started."""
    coordinator = f"coordinator {place.coordinator}" if isinstance(place, Place) else "coordinator from the metadata"
    local = len(jax.local_devices())
    devices = f"{local} local device{'s' if local > 1 else ''}"
    return f"{place.environment}: process {jax.process_index()} of {jax.process_count()}, {coordinator}, {devices}"


def _ask_metadata(place: Metadata, timeout_secs: float) -> None:
    """Starts on a TPU, whose hosts JAX learns from the machine's metadata."""
    try:
        jax.distributed.initialize(
            initialization_timeout=max(round(timeout_secs), 1),
            heartbeat_timeout_seconds=HEARTBEAT_SECS,
            shutdown_timeout_seconds=SHUTDOWN_SECS,
        )
    except Exception as error:
        raise ValueError(
            f"{place.environment}: JAX did not learn from this machine's metadata which hosts there are: {error}\n"
            f"  Accepted: a host of a TPU slice with its metadata server; or {environments.ALONE}.\n"
            f"  Say it by hand: {environments.COORDINATOR}, {environments.PROCESSES} and {environments.PROCESS}."
        ) from error


@contextmanager
def started(say: Callable[[str], None]) -> Iterator[None]:
    """`start`; an error inside ends this process at once if it is one of several."""
    try:
        start(say)
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        _leave(error)


def _leave(error: BaseException) -> NoReturn:
    """Ends this process without the usual farewell, in which JAX waits for the others, who may wait for this one.

    Without process 0 the others end within seconds, without another one after HEARTBEAT_SECS, or as soon as their launcher, or a
    collective that breaks, tells them.
    """
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit) and _ANOTHER.search(str(error)):
        code = ANOTHER_ENDED
        print(
            f"error: another process of this run has ended, or cannot be reached: {str(error).splitlines()[0]}\n"
            "  Accepted: a run whose processes all go on to the end.\n"
            "  See what the others have printed, or python -m jaxllm.hosts; the same command goes on from the last checkpoint.",
            file=sys.stderr,
        )
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    print("this process failed; it ends, and the run with it", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
