"""The start of several processes: who finds whom, what is said when somebody is missing, and how a failed process ends."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.parallel import distributed, processes, rollcall
from jaxllm.parallel.environments import Place

ROOT = Path(__file__).parents[2]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def gather(places: Sequence[Place], timeout_secs: float = 20.0) -> list[str]:
    """What each of these processes, here a thread, is told: "" for the word to go on."""
    told = ["never came back"] * len(places)

    def one(index: int) -> None:
        try:
            rollcall.gather(places[index], timeout_secs)
            told[index] = ""
        except ValueError as error:
            told[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return told


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", socket.gethostname()])
def test_all_are_there(port: int, host: str) -> None:
    """The last one comes late; the port is free afterwards, for JAX."""
    places = [Place("by hand", f"{host}:{port}", 4, number) for number in range(4)]
    for _ in range(2):
        assert gather(places) == [""] * 4


def test_who_is_missing_is_named_on_every_process(port: int) -> None:
    places = [Place("Slurm", f"localhost:{port}", 5, number) for number in (0, 1, 3)]
    told = gather(places, timeout_secs=1.0)
    assert told[0] == told[1] == told[2]
    assert "Slurm: after 1 s only 3 of 5 processes have come" in told[0]
    assert "missing: 2, 4." in told[0]
    assert "\n  Accepted: all of them" in told[0]
    assert "JAXLLM_START_SECS" in told[0]


@pytest.mark.parametrize(
    ("address", "words"),
    [("localhost:{port}", "nobody listens on that port"), ("no-such-host.invalid:{port}", "does not know that name")],
)
def test_a_coordinator_that_cannot_be_reached(port: int, address: str, words: str) -> None:
    address = address.format(port=port)
    (told,) = gather([Place("Open MPI", address, 2, 1)], timeout_secs=0.5)
    assert f"Open MPI: process 1 of 2 did not reach process 0 at {address} in 0.5 s" in told
    assert words in told
    assert told.count("\n  ") == 2


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"process": 1}, "two processes say that they are process 1"),
        ({"process": 0, "processes": 3}, "two processes say that they are process 0"),
        ({"process": 2, "processes": 4}, "the process 2 on 127.0.0.1 counts 4 processes, process 0 counts 3"),
    ],
)
def test_processes_that_do_not_fit_together(port: int, second: dict, words: str) -> None:
    first = Place("by hand", f"localhost:{port}", 3, 1)
    told: list[str] = []

    def wrong() -> None:
        time.sleep(0.3)  # behind the right one
        said = {"process": first.process, "processes": first.processes} | second
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(json.dumps(said).encode() + b"\n")
            told.append(json.loads(connection.makefile().readline())["error"])

    thread = threading.Thread(target=wrong)
    thread.start()
    answers = gather([replace(first, process=0), first])
    thread.join(timeout=10)
    assert answers == told * 2
    assert words in told[0]


def test_strangers_on_the_port_do_not_count(port: int) -> None:
    def stranger() -> None:
        for message in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": "x", "processes": 2}\n', b""):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(message)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(100)

    place = Place("by hand", f"localhost:{port}", 2, 0)
    with pytest.raises(ValueError, match="missing: 1"):
        rollcall.gather(place, 0.2)
    listening = threading.Thread(target=rollcall.gather, args=(place, 20.0))
    listening.start()
    time.sleep(0.3)
    stranger()
    assert listening.is_alive()
    rollcall.gather(replace(place, process=1), 20.0)
    listening.join(timeout=10)
    assert not listening.is_alive()


def test_a_port_that_is_taken(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        (told,) = gather([Place("by hand", f"localhost:{port}", 2, 0)])
    assert f"process 0 cannot listen on port {port} of this host" in told
    assert "\n  Accepted: a free port" in told
    assert "JAXLLM_COORDINATOR=localhost:PORT" in told


def test_nothing_happens_where_nothing_is_said() -> None:
    said: list[str] = []
    distributed.start(said.append, {})
    assert said == []
    distributed.start(said.append, {"SLURM_JOB_ID": "7"})
    assert said == ["Slurm: training alone, as job 7 runs this command once, without srun"]
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("value", ["0", "-3", "soon", "inf"])
def test_a_timeout_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"JAXLLM_START_SECS is '{value}'.\n  Accepted: "):
        distributed.start(print, {"JAXLLM_START_SECS": value})


def test_the_command_says_who_is_missing(tmp_path: Path, port: int) -> None:
    """Through `python -m jaxllm.train`: no traceback, exit code 2."""
    environ = {
        "JAXLLM_COORDINATOR": f"localhost:{port}",
        "JAXLLM_PROCESSES": "2",
        "JAXLLM_PROCESS_ID": "0",
        "JAXLLM_START_SECS": "0.5",
    }
    command = [sys.executable, "-m", "jaxllm.train", "--config", "configs/quickstart.py", "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 2
    assert "error: by hand: after 0.5 s only 1 of 2 processes have come" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_leaves_a_process_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.check_reach(np.array(jax.devices()[:2]))
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match=r"the mesh has 2 of 8 devices, so that 2 of 3 processes have nothing to do \(process 1"):
        processes.check_reach(np.array(jax.devices()[:2]))


def test_a_directory_that_is_not_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lock"
    monkeypatch.setattr(processes, "SHARED_SECS", 0.01)
    processes.check_shared(file, "--workdir")  # one process shares with itself
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    first: list[int] = []
    monkeypatch.setattr(processes, "from_first", lambda mine: first[0] if first else first.append(mine) or mine)
    others: list[np.ndarray] = []
    monkeypatch.setattr(processes, "of_all", lambda mine: np.stack([others[0] if others else mine, mine]).astype(int))
    file.write_text("process 1 on host a\n")
    processes.check_shared(file, "--workdir")
    file.write_text("process 1 on host b\n")
    others.append(np.array([1]))
    with pytest.raises(
        ValueError, match=r"--workdir .* is not the same directory on all hosts.*\n  Accepted: .* that all hosts share"
    ):
        processes.check_shared(file, "--workdir")


def test_processes_with_different_configs_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"train.steps": "10", "optimizer.learning_rate": "0.001"}
    processes.check_same(fields, "the config", "Start them alike.")
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    other = [processes._hash("10"), processes._hash("0.002")]
    monkeypatch.setattr(processes, "of_all", lambda mine: np.array([mine, mine, mine]))
    processes.check_same(fields, "the config", "Start them alike.")
    monkeypatch.setattr(processes, "of_all", lambda mine: np.array([mine, mine, other]))
    words = r"the config on process 2 is not that of process 0: optimizer.learning_rate \(optimizer.learning_rate = 0.001 on process 0\)"
    with pytest.raises(ValueError, match=words):
        processes.check_same(fields, "the config", "Start them alike.")
