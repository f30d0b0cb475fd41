"""Ctrl-C and SIGTERM during training: the step in progress is finished, a state is saved once, and the run ends.

A run ends within the time of one step and one state after the signal. Launchers pass a terminal's Ctrl-C on to
processes that have had it already, so a second one counts as impatience only after `AGAIN` seconds; it then ends the
run at once, and what was being written is never seen. Processes agree after every step, so that a signal to one of
them stops all.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from musubi_tuner.training.runtime import Runtime

AGAIN = 2.0
"""Seconds after which a second Ctrl-C ends a run at once."""


class Interrupts:
    """Which signal has asked for an end; a callable for the loop."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._noted, self._first = 0, 0.0
        self.signal = 0
        """The signal that the processes have agreed on."""

    def __call__(self) -> bool:
        """Whether any process was asked to stop; to be called by all at the same place."""
        self.signal = self._runtime.most(self._noted)
        return self.signal != 0

    def note(self, number: int, _frame: FrameType | None = None) -> None:
        """The handler of both signals."""
        now = time.monotonic()
        if self._noted and number == signal.SIGINT and now - self._first >= AGAIN:
            raise KeyboardInterrupt
        if not self._noted:
            self._noted, self._first = number, now
            if self._runtime.rank == 0:  # past the logging module, which may be in the middle of a line
                os.write(2, b"\nstopping after this step, then saving a state\n")

    def leave(self) -> None:
        """End the process as the signal asks, now that everything is saved: exit code 130 or 143."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal:
            raise SystemExit(128 + self.signal)


@contextmanager
def interruptible(runtime: Runtime) -> Iterator[Interrupts]:
    """Handles both signals for the length of the block; elsewhere than in the main thread, nothing is handled."""
    interrupts = Interrupts(runtime)
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
