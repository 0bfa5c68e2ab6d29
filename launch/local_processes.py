#!/usr/bin/env python3
"""Runs one command as N processes of one run on this machine, as N hosts would run it.

  launch/local_processes.py N COMMAND [ARGUMENT ...]

Each line of output is prefixed by the number of its process. When one fails, the others are stopped, and its exit code is that of
this script. Ctrl-C and SIGTERM are passed on, so that training saves and ends; a second one kills. Needs nothing but Python.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType

# For the others to end by themselves once one has failed, then for them to obey a SIGTERM.
PATIENCE_SECS = 10.0


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or not arguments[0].isdigit() or int(arguments[0]) < 1:
        print(__doc__, file=sys.stderr)
        return 2
    count, command = int(arguments[0]), arguments[1:]
    place = {"JAXLLM_COORDINATOR": f"localhost:{free_port()}", "JAXLLM_PROCESSES": str(count)}
    children: list[subprocess.Popen[str]] = []
    passed: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        send(children, signal.SIGKILL if passed else signal.Signals(number))
        passed.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    try:
        for index in range(count):
            try:
                children.append(begin(command, place | {"JAXLLM_PROCESS_ID": str(index)}))
            except OSError as error:
                print(f"error: '{command[0]}' cannot be started: {error.strerror}", file=sys.stderr)
                return 2
            print(f"[{index}] is process {children[-1].pid} of this machine", flush=True)
        readers = [threading.Thread(target=prefix, args=(child, index)) for index, child in enumerate(children)]
        for reader in readers:
            reader.start()
        code = wait(children)
        for reader in readers:
            reader.join()
        return code
    finally:
        send(children, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def begin(command: list[str], place: dict[str, str]) -> "subprocess.Popen[str]":
    """In a process group of its own, so that a Ctrl-C reaches it once, through this script, and what it starts ends with it."""
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **place},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def prefix(child: "subprocess.Popen[str]", index: int) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("[Gloo] Rank"):  # one a group of devices, from a library
            continue
        sys.stdout.write(f"[{index}] {line.rstrip()}\n")
        sys.stdout.flush()


def wait(children: list["subprocess.Popen[str]"]) -> int:
    """The exit code of the first process that fails, or 0 when all have ended well."""
    first, failed_at, asked = 0, math.inf, False
    while True:
        codes = [child.poll() for child in children]
        if not first and any(codes):
            first, failed_at = next(code for code in codes if code), time.monotonic()
        if None not in codes:
            return first if first >= 0 else 128 - first
        if time.monotonic() - failed_at > 2 * PATIENCE_SECS:
            send(children, signal.SIGKILL)
        elif time.monotonic() - failed_at > PATIENCE_SECS and not asked:
            send(children, signal.SIGTERM)
            asked = True
        time.sleep(0.05)


def send(children: list["subprocess.Popen[str]"], number: signal.Signals) -> None:
    """To the groups of all processes that still run."""
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
