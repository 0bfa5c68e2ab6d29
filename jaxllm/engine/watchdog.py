"""Ends a run that hangs, after saying where: the main thread tells what it is about to do, a thread of its own looks at the clock.

The main thread pays some microseconds a phase and never waits for a device. A second thread writes the heartbeats, as the disk of the
run directory may be what hangs. When a phase lasts longer than its deadline, a diagnosis goes to stderr and to hang-PROCESS.txt, and
the process exits with code HANG: the main thread, stuck inside a library, can be neither interrupted nor unwound.
"""

import faulthandler
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from jaxllm.engine import hang, heartbeat
from jaxllm.engine.heartbeat import Heartbeat

Item = TypeVar("Item")

# The exit code of a process that hung ("try again" in sysexits.h). The others of the command: 0, 1 a bug, 2 an error that is
# explained, 128 + n a signal.
HANG = 75
STDERR = 2
# Steps behind a median: at most, and at least.
WINDOW_STEPS, LEAST_STEPS = 32, 8
# How often process 0 compares the hosts.
COMPARE_SECS = 60.0
# How long the other hosts have to find that they hang, too, before this process breaks their connections by its end.
LINGER_SECS = 5.0
# And for process 0, whose end JAX makes that of all others, to be the last.
LAST_SECS = 3.0
# For a look at the heartbeats of the other hosts.
LOOK_SECS = 3.0
# For all that a diagnosis does with disks and pipes.
FILES_SECS = 15.0
# After the deadline: then the interpreter is stuck itself, and the stacks are printed without it.
STUCK_SECS = 15.0
# The clocks of two hosts differ by less.
SKEW_SECS = 60.0


class Doing(StrEnum):
    """The phases of a step."""

    AGREE = "agreeing with the other hosts to go on with"
    DATA = "waiting for the batch of"
    DISPATCH = "dispatching"
    READ = "waiting for the devices to finish"
    WRITE = "writing the metrics of"


ON_DEVICES = (Doing.AGREE, Doing.DISPATCH, Doing.READ)
ON_THE_DEVICES = "a collective that a host has not joined, a kernel or a callback that does not return, or a device that failed."
USUALLY = {
    Doing.AGREE: f"an earlier step does not end on the devices, or a host has left the loop: {ON_THE_DEVICES}",
    Doing.DATA: "the data does not come: see where the thread loader_0 is, and the disk that it reads from.",
    Doing.DISPATCH: f"this step or the one before does not end: {ON_THE_DEVICES}",
    Doing.READ: ON_THE_DEVICES,
    Doing.WRITE: "a tracker does not return: the disk of the run directory, or the service named in train.trackers.",
}
BESIDE = "the innermost call of MainThread does not return: a disk, the compiler, or a collective that a host has not joined."


class Phase(NamedTuple):
    """What the main thread does since `began`. deadline_secs: 0 for none; it is set by the config field `field`."""

    doing: str
    step: int
    deadline_secs: float
    field: str
    began: float

    def __str__(self) -> str:
        return f"{self.doing.value} step {self.step}" if isinstance(self.doing, Doing) else f"{self.doing} (step {self.step})"

    @property
    def where(self) -> str:
        if not isinstance(self.doing, Doing):
            return heartbeat.BESIDE
        return heartbeat.DEVICES if self.doing in ON_DEVICES else heartbeat.HOST

    @property
    def done_steps(self) -> int:
        """Updates that were over before this phase."""
        return self.step - 1 if isinstance(self.doing, Doing) else self.step


class Watchdog:
    """Context manager that watches until it is left; a phase lasts from when it is told until the next one is.

    directory: for the files of all processes, which must share it; made if need be. step_secs: deadline of each phase of a step;
    beside_secs: of each one beside the steps; 0 for none. collectives: of the compiled step (hang.list_collectives), once it is known.
    """

    def __init__(self, directory: str | Path, *, step_secs: float, beside_secs: float, process: int = 0, processes: int = 1):
        self.collectives: Sequence[str] | None = None
        self._directory = Path(directory)
        self._step_secs, self._beside_secs = step_secs, beside_secs
        self._process, self._processes, self._host = process, processes, socket.gethostname()
        self._phase = Phase("preparing the run", 0, 0.0, "", time.monotonic())
        # Seconds of the last steps, and of the present one: all, and outside of the devices.
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)
        self._secs = self._host_secs = 0.0
        self._at_hang: list[Callable[[int], str]] = []
        self._news: str | None = None
        self._status = heartbeat.RUNNING
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._directory.mkdir(parents=True, exist_ok=True)
        self._began_time = time.time()
        heartbeat.write(self._directory, self._heartbeat())
        self._threads = [threading.Thread(target=self._beat, name="heartbeat", daemon=True)]
        if self._step_secs or self._beside_secs:
            self._threads.append(threading.Thread(target=self._watch, name="watchdog", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        for thread in self._threads:
            # Not for ever: the heartbeat may hang in a disk.
            thread.join(FILES_SECS)
        self._status = heartbeat.FAILED if error else heartbeat.ENDED
        self._write_heartbeat()

    def step(self, doing: Doing, step: int) -> None:
        """The main thread is about to do a part of update number `step` (from 1)."""
        self._enter(Phase(doing, step, self._step_secs, "watchdog.step_secs", time.monotonic()))
        if doing is Doing.DATA and self._secs:
            self._steps.append((self._secs, self._host_secs))
            self._secs = self._host_secs = 0.0

    def beside(self, doing: str, step: int) -> None:
        """The main thread is about to do something else, after update number `step`."""
        self._enter(Phase(doing, step, self._beside_secs, "watchdog.beside_secs", time.monotonic()))

    def _enter(self, phase: Phase) -> None:
        before, self._phase = self._phase, phase
        if before.where != heartbeat.BESIDE:
            self._secs += phase.began - before.began
            self._host_secs += phase.began - before.began if before.where == heartbeat.HOST else 0.0

    def around(self, doing: str, run: Callable[[int, Any], None]) -> Callable[[int, Any], None]:
        """`run(step, state)` that tells first."""

        def told(step: int, state: Any) -> None:
            self.beside(doing, step)
            run(step, state)

        return told

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; each is a sign of life of the present phase."""
        for item in items:
            self._phase = self._phase._replace(began=time.monotonic())
            yield item

    def at_hang(self, act: Callable[[int], str]) -> None:
        """`act(updates done)` is called by another thread before the process is ended, and has seconds; its line is printed."""
        self._at_hang.append(act)

    def news(self) -> str | None:
        """A line about a host that is clearly behind (heartbeat.straggler), each at most once; only in process 0."""
        news, self._news = self._news, None
        return news

    def _heartbeat(self) -> Heartbeat:
        phase, steps = self._phase, list(self._steps)
        timed = len(steps) >= LEAST_STEPS
        return Heartbeat(
            process=self._process,
            processes=self._processes,
            host=self._host,
            pid=os.getpid(),
            status=self._status,
            doing=str(phase),
            step=phase.step,
            secs=round(time.monotonic() - phase.began, 3),
            where=phase.where,
            step_secs=round(median(secs for secs, _ in steps), 6) if timed else None,
            host_secs=round(median(secs for _, secs in steps), 6) if timed else None,
            time=time.time(),
        )

    def _write_heartbeat(self) -> None:
        # A full disk is for the checkpoint to complain about; a heartbeat that is missing shows as such.
        with suppress(OSError):
            heartbeat.write(self._directory, self._heartbeat())

    def _hosts(self) -> list[Heartbeat]:
        return heartbeat.read(self._directory, self._began_time - SKEW_SECS)

    def _beat(self) -> None:
        compared = time.monotonic()
        while not self._over.wait(heartbeat.period_secs(self._processes)):
            self._write_heartbeat()
            if self._process == 0 and self._processes > 1 and time.monotonic() - compared > COMPARE_SECS:
                self._news = heartbeat.straggler(self._hosts(), time.time())
                compared = time.monotonic()

    def _watch(self) -> None:
        tick = min(secs / 8 for secs in (8.0, self._step_secs, self._beside_secs) if secs)
        seen, waited, before = self._phase, 0.0, time.monotonic()
        while not self._over.wait(tick):
            now = time.monotonic()
            # Time in which this thread did not run either does not count: the process was stopped, as by Ctrl-Z.
            waited = waited + min(now - before, 2 * tick) if seen is self._phase else 0.0
            seen, before = self._phase, now
            faulthandler.cancel_dump_traceback_later()
            if seen.deadline_secs and waited > seen.deadline_secs:
                if not self._others_come(seen):
                    self._end(seen)
                    return
                waited = seen.deadline_secs / 2
            if seen.deadline_secs:
                faulthandler.dump_traceback_later(seen.deadline_secs - waited + STUCK_SECS, file=STDERR)
        faulthandler.cancel_dump_traceback_later()

    def _others_come(self, phase: Phase) -> bool:
        """Whether this process waits on the devices for one that is alive and on its way: beside its steps, or just back from there."""
        if self._processes == 1 or phase.where != heartbeat.DEVICES:
            return False
        coming: list[Heartbeat] = []

        def look() -> None:
            for beat in self._hosts():
                alive = beat.status == heartbeat.RUNNING and not beat.is_silent(time.time())
                moving = beat.where == heartbeat.BESIDE or (beat.step <= phase.step and beat.secs < phase.deadline_secs / 2)
                if beat.process != self._process and alive and moving:
                    coming.append(beat)

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        # The disk may hang as well.
        looking.join(LOOK_SECS)
        return bool(coming)

    def _end(self, phase: Phase) -> None:
        """Tells what is known and ends the process. What may block has a thread of its own."""
        began, self._status = time.monotonic(), heartbeat.HUNG
        text = self._diagnosis(phase)
        # Not through sys.stderr: the thread that hangs may hold its lock.
        printing = threading.Thread(target=os.write, args=(STDERR, text.encode()), daemon=True)
        keeping = threading.Thread(target=self._keep, args=(phase, text, printing), daemon=True)
        for act in (printing, keeping):
            act.start()
        for act in (printing, keeping):
            act.join(max(began + FILES_SECS - time.monotonic(), 0.0))
        if self._processes > 1:
            linger_secs = LINGER_SECS + (LAST_SECS if self._process == 0 else 0)
            time.sleep(max(began + linger_secs - time.monotonic(), 0.0))
        os._exit(HANG)

    def _keep(self, phase: Phase, text: str, printing: threading.Thread) -> None:
        """Writes the files, and adds to both outputs what must be read from a disk first."""
        with suppress(OSError), (self._directory / f"hang-{self._process}.txt").open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            for part in (self._about_hosts, lambda: self._act(phase)):
                more = part()
                file.write(more)
                file.flush()
                printing.join()
                os.write(STDERR, more.encode())

    def _diagnosis(self, phase: Phase) -> str:
        """What can be said without any file."""
        secs = time.monotonic() - phase.began
        now = datetime.now(UTC).isoformat(timespec="seconds")
        beat = self._heartbeat()
        speed = "" if beat.step_secs is None else f" Steps took {beat.step_secs:.3g} s, {beat.host_secs:.3g} s of it on the host."
        return (
            f"\n==== hang: no progress for {secs:.1f} s, so this process ends, with exit code {HANG} ====\n"
            f"known: process {self._process} of {self._processes} on {self._host} (pid {beat.pid}) is {phase} at {now}.\n"
            f"known: the deadline is {phase.field} = {phase.deadline_secs:g}.{speed}\n"
            f"guessed from that: {USUALLY[phase.doing] if isinstance(phase.doing, Doing) else BESIDE}\n\n"
            f"Python stacks, innermost call first:\n{hang.stacks()}\n{hang.about(self.collectives)}\n"
        )

    def _about_hosts(self) -> str:
        self._write_heartbeat()
        beats, now = self._hosts(), time.time()
        lines = ["hosts, by their heartbeats:", *heartbeat.table(beats, now)]
        if self._processes > 1:
            found = heartbeat.suspects(beats, self._processes, now) or ["nobody stands out"]
            lines += [f"guessed from that, who is waited for: {line}" for line in found]
        return "\n".join(lines) + "\n\n"

    def _act(self, phase: Phase) -> str:
        lines = []
        for act in self._at_hang:
            try:
                lines.append(act(phase.done_steps))
            except Exception as error:  # the others must still have their turn
                lines.append(f"{type(error).__name__}: {error}")
        return "".join(f"{line}\n" for line in lines)
