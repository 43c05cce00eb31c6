"""What a run shows: a live bar on a terminal, one line per interval elsewhere; and output that cannot end a run."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `5 h 02 min`, `3 d 04 h`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600:02d} h"


class SafeStream:
    """A text stream whose failure (a closed pipe, a full disk) is said once on stderr; then it goes nowhere."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream: IO[str] = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 - as long as the run

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        failed, self._stream = self._stream, open(os.devnull, "w")  # noqa: SIM115
        if failed.closed:  # by who gave it, at the end of the program
            return
        with contextlib.suppress(OSError, ValueError):  # what is still buffered must not fail when Python ends
            os.dup2(self._stream.fileno(), failed.fileno())
        with contextlib.suppress(OSError, ValueError):
            if sys.stderr is not self and sys.stderr is not None:
                print(f"warning: the output cannot be written ({error}); the run goes on", file=sys.stderr, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Let no print of a run fail, where stdout is a closed pipe, closed, or on a full disk."""
    before = sys.stdout, sys.stderr
    for descriptor in (0, 1, 2):  # a file of the run must not take the number of a closed stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (s if isinstance(s, SafeStream) else SafeStream(s) for s in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


class Progress:
    """Progress of a run from `step` to `target`; silent on ranks other than 0 and with mode `none`."""

    def __init__(self, mode: Literal["auto", "bar", "lines", "none"], name: str, step: int, target: int) -> None:
        self.mode = mode if mode != "auto" else ("bar" if sys.stdout.isatty() else "lines")
        self._name, self._target = name, target
        self._bar: Bar | None = None
        if self.mode == "bar":
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                MofNCompleteColumn(),
                BarColumn(bar_width=10),
                TextColumn("{task.fields[text]}"),
                refresh_per_second=2,
            )
            self._bar.start()
            self._task = self._bar.add_task(name, total=target, completed=step, text="starting")

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def interval(self, line: Mapping[str, Any], noun: str, eta_s: float) -> None:
        """A line of metrics was written."""
        narrow = self._bar is not None and self._bar.console.width < 120
        text = f"loss {line['loss']:.4f}"
        if "accuracy" in line and not narrow:
            text += f"  accuracy {100 * line['accuracy']:.2f} %"
        if not narrow:
            text += f"  lr {line['lr']:.2e}"
        wait = f"{'wait' if narrow else 'data wait'} {100 * line['data_wait_share']:.0f} %"
        text += f"  {line[f'{noun}_per_s']:.4g} {noun}/s  {wait}  ETA {duration(eta_s)}"
        if line["skipped_steps"]:
            text += f"  skipped {line['skipped_steps']} steps"
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], text=text)
        elif self.mode == "lines":
            print(f"step {line['step']}/{self._target}  epoch {line['epoch']:.2f}  {text}", flush=True)

    def log(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self.mode != "none":
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
