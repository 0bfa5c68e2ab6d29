"""What the heartbeats of several hosts say together."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxllm import hosts
from jaxllm.engine import heartbeat
from jaxllm.engine.heartbeat import DEVICES, ENDED, FAILED, HOST, HUNG, Heartbeat

NOW = 1e9


def beat(process: int, processes: int = 4, **changes: Any) -> Heartbeat:
    """A process in step, which waits for the devices most of the time."""
    steady = Heartbeat(process, processes, f"h{process}", 100 + process, "running", "waiting", 7, 0.5, DEVICES, 1.0, 0.1, NOW - 1)
    return replace(steady, **changes)


def beats(**odd: Any) -> list[Heartbeat]:
    return [beat(0), beat(1), beat(2, **odd), beat(3)]


def test_files_of_an_earlier_session_with_more_hosts_are_ignored(tmp_path: Path) -> None:
    for process in range(8):
        heartbeat.write(tmp_path, beat(process, processes=8, time=NOW - 500))
    for process in range(3):
        heartbeat.write(tmp_path, beat(process))
    found = heartbeat.read(tmp_path)
    assert [each.process for each in found] == [0, 1, 2, 3]
    assert found[:3] == [beat(0), beat(1), beat(2)]
    assert found[3].is_silent(NOW)
    # Inside a session, what is older than it does not count at all.
    assert [each.process for each in heartbeat.read(tmp_path, since=NOW - 60)] == [0, 1, 2]
    assert not list(tmp_path.glob("*.tmp"))


def test_what_is_no_heartbeat_is_left_out(tmp_path: Path) -> None:
    heartbeat.write(tmp_path, beat(0))
    (tmp_path / "1.json").write_text('{"process": 1')
    (tmp_path / "2.json").write_text(json.dumps({"process": 2, "of another version": True}))
    assert heartbeat.read(tmp_path) == [beat(0)]
    assert heartbeat.read(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({}, None),
        # 8 times the others, but hidden behind the devices.
        ({"host_secs": 0.4}, None),
        ({"host_secs": 0.8}, "process 2 on h2 is behind: 0.8 s outside of the devices, the median of the others is 0.1 s"),
        # A little slower than the others, as hosts are.
        ({"step_secs": 1.4}, None),
        ({"step_secs": 1.6}, "process 2 on h2 is behind: 1.6 s a step, the median of the others is 1 s"),
        ({"host_secs": 0.8, "time": NOW - 60}, None),
        ({"host_secs": 0.8, "status": ENDED}, None),
        ({"host_secs": None, "step_secs": None}, None),
    ],
)
def test_who_is_clearly_behind(odd: dict, words: str | None) -> None:
    found = heartbeat.straggler(beats(**odd), NOW)
    assert found is None if words is None else found is not None and found.startswith(words)


def test_one_of_two_can_be_behind_and_one_alone_cannot() -> None:
    slow = beat(1, 2, host_secs=0.9)
    assert heartbeat.straggler([slow], NOW) is None
    assert "process 1 on h1 is behind" in str(heartbeat.straggler([beat(0, 2), slow], NOW))


@pytest.mark.parametrize(
    ("odd", "suspected"),
    [
        ({}, []),
        ({"step": 6}, ["process 2 on h2: waiting, the lowest step"]),
        ({"step": 8, "where": HOST, "doing": "reading"}, ["process 2 on h2: reading, while others wait for the devices"]),
        ({"time": NOW - 60, "step": 6}, ["process 2 on h2: no sign of life for 60 s"]),
        ({"status": FAILED}, ["process 2 on h2: failed at waiting"]),
    ],
)
def test_who_is_waited_for_when_nothing_moves(odd: dict, suspected: list[str]) -> None:
    assert heartbeat.suspects(beats(**odd), 4, NOW) == suspected


def test_a_process_that_was_never_heard_of_is_waited_for() -> None:
    assert heartbeat.suspects(beats()[:3], 4, NOW) == ["process 3: not heard of in this session"]


def test_the_table_has_the_lowest_steps_on_top() -> None:
    many = [beat(process, 100, step=100 - process) for process in range(100)]
    lines = heartbeat.table(many, NOW)
    assert len(lines) == heartbeat.LISTED + 2
    assert lines[1].split() == ["99", "h99", "199", "1", "running", "waiting", "0.5", "s", "1", "s", "0.1", "s", "1", "s", "ago"]
    assert lines[-1] == "and 68 more, which are further"


def test_many_hosts_write_less_often() -> None:
    assert [heartbeat.period_secs(processes) for processes in (1, 64, 640)] == [1.0, 1.0, 10.0]


def test_the_command_says_who_is_missing_behind_or_waited_for() -> None:
    assert hosts.lines(beats(), NOW) == heartbeat.table(beats(), NOW)
    assert "is behind" in hosts.lines(beats(host_secs=0.8), NOW)[-1]
    assert hosts.lines(beats()[:3], NOW)[-1] == "heard of 3 of 4 processes"
    assert hosts.lines(beats(status=HUNG, step=6), NOW)[-1] == "waited for, probably: process 2 on h2: waiting, the lowest step"
