"""The processes of a run find each other before JAX starts, so that what goes wrong then has a name.

JAX's own start aborts the process, with a stack trace of C++ and no word on who is missing, when the others do not come in time or
the port is taken. So process 0 first listens on that port itself; each other process connects, says its number, and waits. When all
are there, process 0 tells them to go on, frees the port, and JAX starts on it. A message is a line of JSON.
"""

import json
import math
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

from jaxllm.parallel.environments import COORDINATOR, PROCESS, Place

LOCAL = ("localhost", "127.0.0.1", "[::1]")
# Between two attempts of a process whose coordinator is not there yet.
RETRY_SECS = 0.2
# For one message of a connection that is open; a stranger on the port must not stop the roll call.
MESSAGE_SECS = 5.0
LONGEST_MESSAGE = 4096
# The last resort of who waits for the answer of process 0, which itself gives up earlier.
GRACE_SECS = 10.0
MOST_LISTED = 8


class Refused(Exception):
    """What process 0 answered instead of the word to go on."""


def gather(place: Place, timeout_secs: float) -> None:
    """Returns when all processes of the run are there; ValueError on every one of them if that is not so after `timeout_secs`."""
    host, _, port = place.coordinator.rpartition(":")
    if place.process == 0:
        _call(host, int(port), place, timeout_secs)
    else:
        _answer(host.strip("[]"), int(port), place, timeout_secs)


def _call(host: str, port: int, place: Place, timeout_secs: float) -> None:
    """Process 0: collects the others."""
    until = time.monotonic() + timeout_secs
    here: dict[int, socket.socket] = {}
    with ExitStack() as open_sockets:
        listening = open_sockets.enter_context(_listen(host, port, place))
        try:
            while len(here) < place.processes - 1:
                listening.settimeout(max(until - time.monotonic(), 0.01))
                try:
                    connection, address = listening.accept()
                except TimeoutError:
                    raise _missing(place, set(here), timeout_secs) from None
                open_sockets.enter_context(connection)
                _register(connection, address[0], place, here)
        except ValueError as error:
            for connection in here.values():
                _send(connection, {"error": str(error)})
            raise
        for connection in here.values():
            _send(connection, {"go": True})
        # The side that closes first keeps the port busy for a while: that is to be the other one.
        for connection in here.values():
            connection.settimeout(MESSAGE_SECS)
            with suppress(OSError):
                connection.recv(1)


def _register(connection: socket.socket, address: str, place: Place, here: dict[int, socket.socket]) -> None:
    """Adds one process to those that are here. ValueError for one that does not belong; a stranger is sent away."""
    try:
        said = _receive(connection, MESSAGE_SECS)
        number, processes = int(said["process"]), int(said["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
        return
    wrong = None
    if processes != place.processes:
        wrong = f"the process {number} on {address} counts {processes} processes, process 0 counts {place.processes}"
    elif number in here or number == 0:
        wrong = f"two processes say that they are process {number}; one of them is on {address}"
    elif not 0 < number < processes:
        wrong = f"a process on {address} says that it is process {number} of {processes}"
    if wrong is not None:
        error = ValueError(
            f"{place.environment}: {wrong}.\n  Accepted: one process each for 0 to {place.processes - 1}, all with the same total.\n"
            f"  Correct what starts them, or use another port if this is another run ({COORDINATOR})."
        )
        _send(connection, {"error": str(error)})
        raise error
    here[number] = connection


def _answer(host: str, port: int, place: Place, timeout_secs: float) -> None:
    """Any other process: finds process 0, and waits for its word."""
    until = time.monotonic() + timeout_secs
    reason = "it was not tried"
    while time.monotonic() < until:
        try:
            with socket.create_connection((host, port), timeout=max(until - time.monotonic(), RETRY_SECS)) as connection:
                _send(connection, {"process": place.process, "processes": place.processes})
                said = _receive(connection, until - time.monotonic() + GRACE_SECS)
            if "error" in said:
                raise Refused(said["error"])
            return
        except Refused as refused:
            raise ValueError(str(refused)) from None
        except (OSError, ValueError, KeyError) as error:
            reason = _explain(error)
            time.sleep(RETRY_SECS)
    raise ValueError(
        f"{place.environment}: process {place.process} of {place.processes} did not reach process 0 at {place.coordinator} in"
        f" {timeout_secs:g} s: {reason}.\n"
        "  Accepted: process 0 running, at an address that this host can reach, with its port open to it.\n"
        f"  Look at the output of process 0. From this host try: nc -vz {host} {port}. Another address or port: {COORDINATOR}."
        " More time: JAXLLM_START_SECS."
    )


def _explain(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "this host does not know that name"
    if isinstance(error, ConnectionRefusedError):
        return "the host answers, but nobody listens on that port (process 0 has not started, has failed, or has another port)"
    if isinstance(error, TimeoutError):
        return "no answer at all (a firewall, a wrong address, or a host that is down)"
    return f"{type(error).__name__}: {error}"


def _missing(place: Place, here: set[int], timeout_secs: float) -> ValueError:
    missing = [str(number) for number in range(1, place.processes) if number not in here]
    listed = ", ".join(missing[:MOST_LISTED]) + (f" and {len(missing) - MOST_LISTED} more" if len(missing) > MOST_LISTED else "")
    return ValueError(
        f"{place.environment}: after {timeout_secs:g} s only {len(here) + 1} of {place.processes} processes have come to"
        f" {place.coordinator}; missing: {listed}.\n"
        f"  Accepted: all of them, with {PROCESS} or the launcher's number from 0 to {place.processes - 1}.\n"
        "  Look at the output of those that are missing: they may have failed earlier, wait in a queue, or not reach this address."
        " More time: JAXLLM_START_SECS."
    )


def _listen(host: str, port: int, place: Place) -> socket.socket:
    """A listening socket: on this host alone if its name is local, else on all its addresses."""
    local = host in LOCAL
    dual = not local and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or host == "[::1]" else socket.AF_INET
    name = {"localhost": "127.0.0.1"}.get(host, host.strip("[]")) if local else ""
    try:
        return socket.create_server((name, port), family=family, backlog=place.processes, dualstack_ipv6=dual)
    except OSError as error:
        raise ValueError(
            f"{place.environment}: process 0 cannot listen on port {port} of this host: {error.strerror or error}.\n"
            "  Accepted: a free port of the host on which process 0 runs.\n"
            f"  Another run may hold it. Give another one: {COORDINATOR}={host}:PORT, the same on every process."
        ) from error


def bind_address(coordinator: str) -> str | None:
    """Where JAX's coordinator is to listen: on this host alone if the address is local; None: JAX's default, everywhere."""
    host, _, port = coordinator.rpartition(":")
    return f"{'127.0.0.1' if host == 'localhost' else host}:{port}" if host in LOCAL else None


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    # Who is gone will be missed, or has given up already.
    with suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, timeout_secs: float) -> dict[str, Any]:
    """The next line as JSON. OSError or ValueError if it does not come, or is something else."""
    until, text = time.monotonic() + timeout_secs, b""
    while not text.endswith(b"\n"):
        connection.settimeout(max(until - time.monotonic(), 0.01))
        more = connection.recv(LONGEST_MESSAGE)
        if not more:
            raise ConnectionError("process 0 hung up" if not text else "the message was cut short")
        text += more
        if len(text) > LONGEST_MESSAGE:
            raise ValueError("the message is too long")
    said = json.loads(text)
    if not isinstance(said, dict):
        raise ValueError("the message is no object")
    return said


def seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    """The positive number in this variable; ValueError for anything else."""
    value = environ.get(name, str(default))
    with suppress(ValueError):
        if (number := float(value)) > 0 and math.isfinite(number):
            return number
    raise ValueError(f"{name} is '{value}'.\n  Accepted: a number of seconds above 0.\n  Correct it, or unset it for {default:g}.")
