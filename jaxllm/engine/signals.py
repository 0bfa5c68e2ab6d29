"""Ctrl-C and SIGTERM as a wish that the loop grants between two steps, on all processes between the same two."""

import signal
from types import FrameType, TracebackType
from typing import Any

from jaxllm.parallel import processes


class Interrupts:
    """Context manager: the first SIGINT or SIGTERM sets `received`, a second one stops at once as usual.

    received: what came to this process. decided: what the processes of the run agreed on, by `agreed`.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.decided: signal.Signals | None = None
        self._vote = processes.Vote()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def agreed(self) -> signal.Signals | None:
        """`decided`: a signal that any process had received by the call before, so that all learn of it in the same call."""
        number = self._vote(self.received or 0)
        self.decided = signal.Signals(number) if number else None
        return self.decided

    def settle(self) -> signal.Signals | None:
        """A signal that any process has received by now, after the last step; all learn of it in this call."""
        self.agreed()
        return self.agreed()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
