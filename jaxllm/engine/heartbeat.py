"""Signs of life: a small file a process in the run directory, rewritten every second or so, and what all of them together say.

In synchronous training every host takes as long as the slowest, as they wait for each other on the devices. What tells them apart is
the time that a host spends outside of that wait, mostly on data: `host_secs`. A slow device cannot be told from a waiting one here.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from jaxllm.report.units import clock

RUNNING, HUNG, ENDED, FAILED = "running", "hung", "ended", "failed"
# Where a phase spends its time: in a wait for the devices, on this host's part of a step, or beside the steps.
DEVICES, HOST, BESIDE = "devices", "host", "beside"
# So many times what the other hosts need counts as clearly behind.
BEHIND = 1.5
# More than this share of a step must be the host's own time, or it hides behind the work of the devices.
NOTED_FRAC = 0.5
# A file that was due so many times over, and so many seconds more, comes from a process that is gone or stuck as a whole.
MISSED, SLACK_SECS = 3, 5.0
# All processes together write no more files a second than this.
WRITES_PER_SEC = 64
# Rows of a table.
LISTED = 32


@dataclass(frozen=True)
class Heartbeat:
    """What a process does. secs: of the present phase. time: when this was written, seconds since 1970 by the clock of its host.

    status: RUNNING, ... where: DEVICES, ... step_secs: median of the last steps, without what happens beside them. host_secs: the part
    of it outside of the devices. Both None in the first steps of a session.
    """

    process: int
    processes: int
    host: str
    pid: int
    status: str
    doing: str
    step: int
    secs: float
    where: str
    step_secs: float | None
    host_secs: float | None
    time: float

    @property
    def name(self) -> str:
        return f"process {self.process} on {self.host}"

    def age_secs(self, now: float) -> float:
        return max(now - self.time, 0.0)

    def is_silent(self, now: float) -> bool:
        """Whether a newer one is overdue, so that the process must be gone or stuck as a whole."""
        return self.status == RUNNING and self.age_secs(now) > MISSED * period_secs(self.processes) + SLACK_SECS


def period_secs(processes: int) -> float:
    """Seconds between two heartbeats of a process."""
    return max(1.0, processes / WRITES_PER_SEC)


def write(directory: Path, beat: Heartbeat) -> None:
    """Replaces the file of this process at once; not made safe against a power cut, as its worth is gone in seconds."""
    path = directory / f"{beat.process}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read(directory: Path, since: float = 0.0) -> list[Heartbeat]:
    """The heartbeats of the newest session, by process; none that is older than `since`.

    The newest file says how many processes there are: those beyond are what an earlier session with more of them has left.
    """
    found = [beat for path in directory.glob("*.json") if (beat := _parse(path)) is not None and beat.time >= since]
    processes = max(found, key=lambda beat: beat.time).processes if found else 0
    return sorted((beat for beat in found if beat.process < processes), key=lambda beat: beat.process)


def _parse(path: Path) -> Heartbeat | None:
    """None for a file that is gone, or that another version wrote."""
    try:
        return Heartbeat(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def straggler(beats: Sequence[Heartbeat], now: float) -> str | None:
    """One line about the host that is clearly behind, with by how much; None if none is.

    Clearly: its host_secs are more than BEHIND times the median of the others and more than NOTED_FRAC of its step, or its step_secs
    are more than BEHIND times the median of the others.
    """
    timed = [beat for beat in beats if beat.status == RUNNING and not beat.is_silent(now) and beat.step_secs is not None]
    for field, what in (("host_secs", "outside of the devices"), ("step_secs", "a step")):
        secs = {beat: getattr(beat, field) for beat in timed}
        if len(secs) < 2:
            return None
        slowest = max(secs, key=lambda beat: secs[beat])
        usual = median(value for beat, value in secs.items() if beat is not slowest)
        noted = field == "step_secs" or secs[slowest] > NOTED_FRAC * (slowest.step_secs or 0.0)
        if noted and secs[slowest] > BEHIND * usual:
            return (
                f"{slowest.name} is behind: {secs[slowest]:.3g} s {what}, the median of the others is {usual:.3g} s"
                f" (step {slowest.step}, {slowest.step_secs:.3g} s each; now {slowest.doing})"
            )
    return None


def table(beats: Sequence[Heartbeat], now: float) -> list[str]:
    """Lines with aligned columns, a heading first; the lowest steps on top, LISTED hosts at most."""
    rows: list[tuple[str, ...]] = [("process", "host", "pid", "step", "status", "phase", "for", "a step", "on the host", "heard")]
    listed = sorted(beats, key=lambda beat: (beat.step, beat.where == DEVICES, beat.process))
    for beat in listed[:LISTED]:
        status = "silent" if beat.is_silent(now) else beat.status
        times = [_secs(beat.secs), _secs(beat.step_secs), _secs(beat.host_secs), f"{_secs(beat.age_secs(now))} ago"]
        rows.append((str(beat.process), beat.host, str(beat.pid), str(beat.step), status, beat.doing, *times))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + ([f"and {len(listed) - LISTED} more, which are further"] if len(listed) > LISTED else [])


def _secs(secs: float | None) -> str:
    return "" if secs is None else f"{secs:.3g} s" if secs < 1000 else clock(secs)


def suspects(beats: Sequence[Heartbeat], processes: int, now: float) -> list[str]:
    """One line for each process that the others may be waiting for, when nothing moves; the likeliest kind only.

    That is who gives no sign of life or has ended; else who is not on the devices while others are; else who is at the lowest of
    several steps.
    """
    heard = {beat.process for beat in beats}
    gone = [f"{beat.name}: no sign of life for {beat.age_secs(now):.0f} s" for beat in beats if beat.is_silent(now)]
    gone += [f"{beat.name}: {beat.status} at {beat.doing}" for beat in beats if beat.status in (ENDED, FAILED)]
    gone += [f"process {process}: not heard of in this session" for process in range(processes) if process not in heard]
    if gone:
        return gone
    others = [beat for beat in beats if beat.where != DEVICES]
    if 0 < len(others) < len(beats):
        return [f"{beat.name}: {beat.doing}, while others wait for the devices" for beat in others]
    lowest = [beat for beat in beats if beat.step == min(each.step for each in beats)]
    if len(lowest) < len(beats):
        return [f"{beat.name}: {beat.doing}, the lowest step" for beat in lowest]
    return []
