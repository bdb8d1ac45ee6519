"""Ctrl-C and SIGTERM end a training after the current step."""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

__all__ = ["Interrupts"]


class Interrupts(AbstractContextManager["Interrupts"]):
    """A context that records Ctrl-C and SIGTERM. A second Ctrl-C kills the process. It has no effect outside the main
    thread.

    Attributes:
        noted: whether one of the two was received.
    """

    def __init__(self) -> None:
        self.noted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            before = {sort: signal.getsignal(sort) for sort in (signal.SIGINT, signal.SIGTERM)}
            if before[signal.SIGTERM] is not signal.SIG_DFL:  # the program has its own handler
                del before[signal.SIGTERM]
            for sort, handler in before.items():
                if handler is not None:  # None was not set by Python and cannot be restored
                    self._before[sort] = handler
                    signal.signal(sort, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for sort, handler in self._before.items():
            signal.signal(sort, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
