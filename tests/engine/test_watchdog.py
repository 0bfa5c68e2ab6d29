"""Hangs that are injected are diagnosed, and what is only slow is not one."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jaxllm.engine import heartbeat, watchdog
from jaxllm.engine.watchdog import HANG, Doing, Watchdog
from jaxllm.train import Checkpoints

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Of the issue: from the hang to its diagnosis.
LIMIT_SECS = 10.0
# In this process: the deadline of a step, and something that is clearly longer.
DEADLINE, LONGER = 0.2, 0.7


def start(script: str, *arguments: object, devices: int = 8) -> subprocess.Popen:
    """A script of this directory in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def took(directory: Path, process: int = 0) -> float:
    """Seconds from the hang to the end of its diagnosis."""
    hosts = directory / "hosts" if (directory / "hosts").is_dir() else directory
    return (hosts / f"hang-{process}.txt").stat().st_mtime - (directory / "hangs_since").stat().st_mtime


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, str, str]]:
    """(run directory, exit code, stdout, stderr) of the runs that hang, both at once, as they mostly wait."""
    directory = tmp_path_factory.mktemp("hung")
    processes = {where: start("hanging_run.py", where, directory / where) for where in ("data", "devices")}
    outputs = {where: process.communicate(timeout=180) for where, process in processes.items()}
    return {where: (directory / where, processes[where].returncode, *outputs[where]) for where in processes}


@pytest.mark.parametrize(
    ("where", "phase", "stacks"),
    [
        ("data", "waiting for the batch of step 7", ("Loader.batch", "read_from_a_dead_disk", "thread loader_0:")),
        ("devices", "waiting for the devices to finish step 7", ("Monitor.read", "a_callback_that_waits", "not started by Python")),
    ],
)
def test_a_run_that_hangs_is_diagnosed_and_ended(
    where: str, phase: str, stacks: tuple[str, ...], hung: dict[str, tuple[Path, int, str, str]]
) -> None:
    """The one on the devices has compiled, validated and saved before, each for longer than a step may take."""
    run, code, output, errors = hung[where]
    assert code == HANG, errors
    process = heartbeat.read(run / "hosts")[0]
    assert process.status == heartbeat.HUNG, errors
    assert "step 4: validation loss" in output
    said = (run / "hosts/hang-0.txt").read_text()
    assert said in errors
    assert 0 < took(run) < LIMIT_SECS
    assert f"known: process 0 of 1 on {socket.gethostname()} (pid {process.pid}) is {phase} at 20" in said
    assert "known: the deadline is watchdog.step_secs = 3." in said
    for name in (*stacks, "thread MainThread:", "in sleep_for_ever", "thread checkpoint_0", "loader_0", "thread heartbeat:"):
        assert name in said, name
    # Sharded parameters are gathered before the gradients are summed.
    assert said.index("all-gather over fsdp of") < said.index("all-reduce over fsdp of")
    assert process.doing == phase
    assert process.step == 7
    assert f"0        {process.host}" in said
    assert said.endswith("the newest checkpoint is that of step 4. The same command goes on from there.\n")
    assert '"end_step": 6' in (run / "run.json").read_text()
    assert '"reason": "hang"' in (run / "run.json").read_text()
    shown = subprocess.run(
        [sys.executable, "-m", "jaxllm.hosts", "--run", run], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"hung    {phase}" in shown.stdout


def test_the_code_of_a_hang_is_its_own() -> None:
    ours = {0, 1, 2, *(128 + number for number in signal.Signals)}
    assert HANG not in ours
    assert 0 < HANG < 128


def test_of_two_processes_the_one_that_holds_up_the_other_is_named(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    pair = [start("hanging_pair.py", port, process, tmp_path, devices=1) for process in (0, 1)]
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [HANG, HANG], outputs
    # Before, while the data of the second were only slow.
    assert "process 1 on" in outputs[0][0]
    assert "is behind: 0.1" in outputs[0][0]
    assert "s outside of the devices, the median of the others is 0.0" in outputs[0][0]
    for process, (_, errors) in enumerate(outputs):
        assert took(tmp_path, process) < LIMIT_SECS
        (guess,) = [line for line in errors.splitlines() if line.startswith("guessed from that, who")]
        assert f"process 1 on {socket.gethostname()}: waiting for the batch of step 40, while others" in guess
        assert "1. all-reduce over data of" in errors
    assert "Source.batch" in outputs[1][1]
    assert "Source.batch" not in outputs[0][1]


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The codes with which this process would have been ended."""
    codes: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    yield codes
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("watchdog", "heartbeat")]


def watching(directory: Path, *, step_secs: float = DEADLINE, beside_secs: float = 60.0) -> Watchdog:
    return Watchdog(directory, step_secs=step_secs, beside_secs=beside_secs)


def slow_beside(watched: Watchdog) -> None:
    watched.step(Doing.READ, 1)
    watched.around("validation", lambda step, state: time.sleep(LONGER))(1, None)


def many_quick_phases(watched: Watchdog) -> None:
    until = time.monotonic() + LONGER
    while time.monotonic() < until:
        watched.step(Doing.DATA, 1)
        time.sleep(DEADLINE / 20)


def never_told(watched: Watchdog) -> None:
    time.sleep(LONGER)


@pytest.mark.parametrize("act", [slow_beside, many_quick_phases, never_told])
def test_what_is_no_hang(act: Callable[[Watchdog], None], tmp_path: Path, exits: list[int]) -> None:
    with watching(tmp_path) as watched:
        act(watched)
    assert not exits
    assert not list(tmp_path.glob("hang*"))
    assert heartbeat.read(tmp_path)[0].status == heartbeat.ENDED


@pytest.mark.parametrize(
    ("changes", "is_hang"),
    [
        ({"where": heartbeat.BESIDE, "secs": 1000.0}, False),  # it compiles, or saves
        ({"where": heartbeat.DEVICES, "secs": 0.0}, False),  # and is back just now
        ({"where": heartbeat.DEVICES, "secs": 1000.0}, True),
        ({"where": heartbeat.HOST, "secs": 1000.0}, True),
        ({"where": heartbeat.DEVICES, "secs": 0.0, "step": 6}, True),  # it goes on without this one
        ({"where": heartbeat.BESIDE, "secs": 1000.0, "time": 0.0}, True),
        ({"where": heartbeat.BESIDE, "secs": 1000.0, "status": heartbeat.FAILED}, True),
    ],
)
def test_another_host_may_be_slow_in_what_is_beside_its_steps(
    changes: dict, is_hang: bool, tmp_path: Path, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then this one waits for it on the devices, for longer than a step may take."""
    monkeypatch.setattr(watchdog, "LINGER_SECS", 0.0)
    other = heartbeat.Heartbeat(1, 2, "other", 7, heartbeat.RUNNING, "compiling", 5, 0.0, "", None, None, time.time())
    heartbeat.write(tmp_path, replace(other, **changes))
    with Watchdog(tmp_path, step_secs=DEADLINE, beside_secs=60.0, process=0, processes=2) as watched:
        watched.step(Doing.READ, 5)
        time.sleep(LONGER)
    assert exits == ([HANG] if is_hang else [])


def test_each_batch_of_a_validation_is_a_sign_of_life(tmp_path: Path, exits: list[int]) -> None:
    with watching(tmp_path, beside_secs=DEADLINE) as watched:
        watched.beside("validation", 1)
        assert [item for item in watched.each(range(30)) if not time.sleep(DEADLINE / 10)] == list(range(30))
    assert not exits


@pytest.mark.parametrize(
    ("off", "doing"),
    [({"step_secs": 0.0}, Doing.READ), ({"beside_secs": 0.0}, "saving"), ({"step_secs": 0.0, "beside_secs": 0.0}, "x")],
)
def test_zero_switches_off(off: dict[str, float], doing: Doing | str, tmp_path: Path, exits: list[int]) -> None:
    with Watchdog(tmp_path, **({"step_secs": DEADLINE, "beside_secs": DEADLINE} | off)) as watched:
        watched.step(doing, 1) if isinstance(doing, Doing) else watched.beside(doing, 1)
        time.sleep(LONGER)
    assert not exits


def test_a_process_that_was_stopped_did_not_hang(tmp_path: Path, exits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z and an hour later fg, here by a clock that jumps."""
    real, jump = time.monotonic, 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: real() + jump)
    with watching(tmp_path, step_secs=4 * DEADLINE) as watched:
        watched.step(Doing.READ, 1)
        time.sleep(DEADLINE)
        jump = 3600.0
        time.sleep(2 * DEADLINE)
    assert not exits


@pytest.mark.parametrize(
    ("doing", "done", "words"),
    [
        (Doing.DISPATCH, 2, ("is dispatching step 3 ", "watchdog.step_secs = 0.2")),
        (Doing.WRITE, 2, ("is writing the metrics of step 3 ", "a tracker does not return")),
        ("saving a checkpoint", 3, ("is saving a checkpoint (step 3) ", "watchdog.beside_secs = 0.3")),
    ],
)
def test_the_phase_and_what_is_done_are_told(
    doing: Doing | str, done: int, words: tuple[str, ...], tmp_path: Path, exits: list[int], capfd: pytest.CaptureFixture
) -> None:
    """Even if something that is to be done on the way fails."""
    heard: list[int] = []

    def note(step: int) -> str:
        heard.append(step)
        return "noted"

    with watching(tmp_path, beside_secs=0.3) as watched:
        watched.at_hang(lambda step: str(1 / 0))
        watched.at_hang(note)
        watched.step(doing, 3) if isinstance(doing, Doing) else watched.beside(doing, 3)
        until = time.monotonic() + LIMIT_SECS
        while not exits and time.monotonic() < until:
            time.sleep(0.01)
    assert exits == [HANG]
    assert heard == [done]
    said, kept = "", (tmp_path / "hang-0.txt").read_text()
    while kept not in said and time.monotonic() < until:
        said += capfd.readouterr().err
        time.sleep(0.01)
    assert kept in said
    assert kept.endswith("ZeroDivisionError: division by zero\nnoted\n")
    assert all(word in said for word in words)
    assert "in test_the_phase_and_what_is_done_are_told" in said


def test_a_disk_that_hangs_as_well_does_not_keep_the_process(
    tmp_path: Path, exits: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    freed = threading.Event()
    with watching(tmp_path) as watched:
        monkeypatch.setattr(watchdog, "FILES_SECS", 0.5)
        monkeypatch.setattr(watchdog.heartbeat, "read", lambda *_: freed.wait(60) and [])
        watched.step(Doing.DATA, 1)
        until = time.monotonic() + LIMIT_SECS
        while not exits and time.monotonic() < until:
            time.sleep(0.01)
        freed.set()
    assert exits == [HANG]
    assert "is waiting for the batch of step 1" in capfd.readouterr().err


STUCK = """
import ctypes, sys
from jaxllm.engine import watchdog
watchdog.STUCK_SECS = 0.5
def keep_the_interpreter():
    ctypes.PyDLL(None).sleep(3)
with watchdog.Watchdog(sys.argv[1], step_secs=0.5, beside_secs=0) as watched:
    watched.step(watchdog.Doing.DATA, 1)
    import time; time.sleep(0.2)
    keep_the_interpreter()
"""


def test_an_interpreter_that_is_stuck_still_shows_its_stacks(tmp_path: Path) -> None:
    """A C library that never gives back the interpreter's lock: then no thread of Python runs, this one neither."""
    done = subprocess.run(
        [sys.executable, "-c", STUCK, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert "Timeout (0:00:0" in done.stderr
    assert "in keep_the_interpreter" in done.stderr


def test_the_seconds_of_a_step_are_the_medians_without_what_is_beside(
    tmp_path: Path, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(watchdog, "LEAST_STEPS", 3)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    watched = watching(tmp_path, step_secs=0.0, beside_secs=0.0)
    for step, wait in enumerate((1.0, 2.0, 9.0), start=1):
        watched.step(Doing.DATA, step)
        now += wait
        watched.step(Doing.DISPATCH, step)
        now += 10.0
        watched.step(Doing.READ, step)
        now += 20.0
        watched.step(Doing.WRITE, step)
        now += 0.5
        watched.beside("validation", step)
        now += 1000.0
    assert watched._heartbeat().step_secs is None  # two steps are known
    watched.step(Doing.DATA, 4)
    beat = watched._heartbeat()
    assert beat.step_secs == 2.0 + 10 + 20 + 0.5
    assert beat.host_secs == 2.0 + 0.5
    assert (beat.step, beat.where) == (4, heartbeat.HOST)


def test_a_run_that_fails_is_not_one_that_ended(tmp_path: Path, exits: list[int]) -> None:
    with pytest.raises(ValueError, match="no"), watching(tmp_path):
        raise ValueError("no")
    assert heartbeat.read(tmp_path)[0].status == heartbeat.FAILED
    assert not exits


def test_a_save_in_progress_is_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    checkpoints, written = Checkpoints(tmp_path), threading.Event()
    assert checkpoints.settle(0.0)
    checkpoints._pending = checkpoints._writer.submit(lambda: written.wait(60) and None)
    assert not checkpoints.settle(0.05)
    written.set()
    assert checkpoints.settle(60)
    checkpoints.close()
