"""A run that stands still ends with a report: where every thread of every rank is."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

TICK_S = 0.5
SLOW_S = 1800.0
"""Limit while data are opened, kernels compiled, models evaluated and exported."""
OTHERS_S = 60.0
"""How long a rank that has reported waits for the reports of the others: a launcher ends them when it ends."""


class Watchdog:
    """Ends the process when `beat` was not called for `timeout_s`; writes the stacks of all threads first.

    One rank that is stuck makes all others wait in their next collective, so each of them reports where it waits; none
    ends before all have. Time during which the whole process was stopped (SIGSTOP, a suspended machine) does not count.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, timeout_s: float, describe: Callable[[], str]) -> None:
        """Start watching.

        Args:
            folder: each rank writes its `hang_rank<rank>.txt` there; all ranks of the run can read it.
            rank, ranks: of this process, and how many there are.
            timeout_s: seconds without a step; the first one gets at least `SLOW_S`.
            describe: says in one line what this rank is doing.
        """
        reports = [folder / f"hang_rank{number}.txt" for number in range(ranks)]
        self.report, self.timeout_s, self.describe = reports[rank], timeout_s, describe
        self._others = {path: _modified(path) for path in reports if path != self.report}  # of an earlier start
        self._waited_s = 0.0
        self._limit_s = max(timeout_s, SLOW_S)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Note that a step is done."""
        self._waited_s, self._limit_s = 0.0, self.timeout_s

    def slow(self) -> None:
        """Note that a part of slow work is done, or begins: the next one may take `SLOW_S`."""
        self._waited_s, self._limit_s = 0.0, max(self.timeout_s, SLOW_S)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(TICK_S):
            now = time.monotonic()
            self._waited_s += min(now - before, 4 * TICK_S)
            before = now
            if self._waited_s > self._limit_s:
                self._end()

    def _end(self) -> None:
        try:
            work = self.report.with_suffix(".tmp")
            with work.open("w") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {self.describe()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            work.replace(self.report)  # whole, where the others look for it
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
        give_up = time.monotonic() + OTHERS_S
        while time.monotonic() < give_up and any(_modified(path) == old for path, old in self._others.items()):
            time.sleep(0.05)
        os._exit(1)


def _modified(path: Path) -> int:
    """When the file was written, in nanoseconds; 0 where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0
