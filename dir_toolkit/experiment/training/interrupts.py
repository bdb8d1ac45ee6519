"""Ctrl-C and SIGTERM, which end a training after the step under way."""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

__all__ = ["Interrupts"]


class Interrupts(AbstractContextManager["Interrupts"]):
    """Notes Ctrl-C, the second of which kills the process, and SIGTERM. Outside the main thread it does nothing.

    Attributes:
        noted: whether one of the two came.
    """

    def __init__(self) -> None:
        self.noted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            before = {sort: signal.getsignal(sort) for sort in (signal.SIGINT, signal.SIGTERM)}
            if before[signal.SIGTERM] is not signal.SIG_DFL:  # the program has a handler of its own
                del before[signal.SIGTERM]
            for sort, handler in before.items():
                if handler is not None:  # None was not set by Python, and could not be put back
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
