"""Who is where, while a run trains or after it hung: the heartbeats of all its processes as a table, the lowest steps first.

python -m jaxllm.hosts --run DIR
"""

import time
from pathlib import Path

from absl import flags

from jaxllm import command
from jaxllm.engine import heartbeat
from jaxllm.engine.workdir import Workdir


def main(arguments: list[str]) -> None:
    del arguments
    given = flags.FLAGS.run
    beats, now = heartbeat.read(Workdir(Path(given).expanduser()).hosts) if given else [], time.time()
    if not beats:
        raise ValueError(
            f"no heartbeats in the run '{given}'.\n  Accepted: the --workdir of a run that trains or has trained, on a disk that this"
            " host shares.\n  Give it with --run DIR."
        )
    print("\n".join(lines(beats, now)))


def lines(beats: list[heartbeat.Heartbeat], now: float) -> list[str]:
    """The table, who is missing, and the one that is clearly behind, or those that a run that hung was waiting for."""
    processes = beats[0].processes
    found = heartbeat.table(beats, now)
    if len(beats) < processes:
        found.append(f"heard of {len(beats)} of {processes} processes")
    if any(beat.status == heartbeat.HUNG for beat in beats):
        return found + [f"waited for, probably: {line}" for line in heartbeat.suspects(beats, processes, now)]
    behind = heartbeat.straggler(beats, now)
    return found + ([behind] if behind else [])


if __name__ == "__main__":
    flags.DEFINE_string("run", "", "directory of a run that trains or has trained")
    command.run(main)
