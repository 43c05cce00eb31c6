"""A run that stands still ends with a report: where every thread of every rank is."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

TICK_S = 0.5
FIRST_STEP_S = 1800.0
"""Until the first step is done kernels are compiled and data are opened, so more patience is due."""


class Watchdog:
    """Ends the process when `beat` was not called for `timeout_s`; writes the stacks of all threads first.

    One rank that is stuck makes all others wait in their next collective, so each of them reports where it waits. Time
    during which the whole process was stopped (SIGSTOP, a suspended machine) does not count.
    """

    def __init__(self, report: Path, timeout_s: float, describe: Callable[[], str]) -> None:
        self.report, self.timeout_s, self.describe = report, timeout_s, describe
        self._waited_s = 0.0
        self._limit_s = max(timeout_s, FIRST_STEP_S)
        self._closed = threading.Event()
        self._paused = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """A step is done."""
        self._waited_s, self._limit_s, self._paused = 0.0, self.timeout_s, False

    def pause(self) -> None:
        """What comes now may take as long as it likes (evaluation); the next `beat` ends the pause."""
        self._paused = True

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(TICK_S):
            now = time.monotonic()
            if not self._paused:
                self._waited_s += min(now - before, 4 * TICK_S)
            before = now
            if self._waited_s > self._limit_s:
                self._end()

    def _end(self) -> None:
        try:
            with self.report.open("w") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {self.describe()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            where = str(self.report)
        except OSError:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            where = "above"
        print(
            f"error: {self.describe()}: no progress for {self._limit_s:.0f} s (--hang-timeout-s); the stack of every "
            f"thread is in {where}; the same command continues from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
