"""What a run writes for people: metrics, anomalies, progress, messages. None of it can end the run."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beit_fast.train.anomalies import samples_of
from beit_fast.train.checkpoint.run_folder import RunFolder
from beit_fast.train.distributed.world import World
from beit_fast.train.metrics import MetricsFile
from beit_fast.train.progress import Progress
from beit_fast.train.task import Task


class RunLog:
    """Output of rank 0; on other ranks it does nothing.

    What cannot be written is said once on stderr and counted in `failures`; the run goes on.
    """

    def __init__(self, task: Task, world: World, folder: RunFolder) -> None:
        self.task, self.config, self.world, self.folder = task, task.config, world, folder
        self.failures: Counter[str] = Counter()
        self.progress: Progress | None = None
        self.metrics_file: MetricsFile | None = None
        self.anomalies_file: MetricsFile | None = None

    def open(self, step: int, target: int) -> None:
        """Continue the files of the run at `step`, and show progress."""
        if not self.world.is_main:
            return
        self.metrics_file = self.attempt("metrics", MetricsFile, self.folder.metrics, step)
        self.anomalies_file = self.attempt("anomalies", MetricsFile, self.folder.anomalies, step)
        self.attempt("the environment", self.folder.record_start, step, self.world.size, self.world.device)
        for line in self.attempt("the data", self.folder.record_data, self.task.contents()) or ():
            self.message(line)
        self.progress = self.attempt("progress", Progress, self.config.log.progress, self.task.name, step, target)

    def attempt(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function whose failure must not end the run; None where it fails."""
        try:
            return function(*arguments)
        except Exception as error:
            self.failed(what, error)
            return None

    def failed(self, what: str, error: BaseException) -> None:
        """Count a failure of auxiliary work, and say the first of its kind."""
        self.failures[what] += 1
        if self.failures[what] == 1:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: {what} failed, training goes on ({reason})", file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """Print a line of its own, above the progress bar."""
        if self.progress is not None:
            self.attempt("progress", self.progress.log, text)
        elif self.world.is_main and self.config.log.progress != "none":
            print(text, flush=True)

    def metrics(self, line: dict[str, Any], eta_s: float | None = None) -> None:
        """Write a line of metrics; with `eta_s` it is one of training, and shown."""
        if self.failures:
            line = line | {"failed_outputs": sum(self.failures.values())}
        if self.metrics_file is not None:
            self.attempt("metrics", self.metrics_file.write, line)
        if self.progress is not None and eta_s is not None:
            self.attempt("progress", self.progress.interval, line, self.task.sample_noun, eta_s)

    def has_evaluation(self, step: int) -> bool:
        """Whether the metrics hold an evaluation of this step."""
        return self.metrics_file is not None and step in self.metrics_file.evaluated

    def advance(self, step: int) -> None:
        if self.progress is not None:
            self.attempt("progress", self.progress.advance, step)

    def anomalies(self, entries: list[dict[str, Any]], steps_per_epoch: int) -> None:
        """Write down anomalies, and keep what a replay of a step that was not finite needs."""
        if not self.world.is_main:
            return
        steps: dict[str, list[str]] = {}
        for entry in entries:
            entry |= samples_of(entry["step"], steps_per_epoch, self.config.batch_size)
            if entry["kind"] == "non_finite":
                entry["replay_from"] = self.attempt("a replay", self.folder.keep_for_replay, entry["step"])
            if self.anomalies_file is not None:
                self.attempt("anomalies", self.anomalies_file.write, entry)
            steps.setdefault(entry["kind"], []).append(str(entry["step"]))
        for kind in sorted(steps):
            self.message(f"{kind.replace('_', ' ')} at step {', '.join(steps[kind])}: {self.folder.anomalies}")

    def report(self) -> Path | None:
        """Write report.html; None where that fails."""
        from beit_fast.visualize.run_report import write_report

        path: Path | None = self.attempt("the report", write_report, self.folder.path)
        return path

    def close(self) -> None:
        for part in (self.progress, self.metrics_file, self.anomalies_file):
            if part is not None:
                self.attempt("closing", part.close)
