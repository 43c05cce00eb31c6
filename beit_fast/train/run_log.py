"""What a run writes for people: metrics, anomalies, progress, messages. None of it can end the run."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from beit_fast.train.anomalies import samples_of
from beit_fast.train.checkpoint.run_folder import RunFolder
from beit_fast.train.continuation import BestEvaluation
from beit_fast.train.distributed.world import World
from beit_fast.train.metrics import MetricsFile
from beit_fast.train.progress import Progress
from beit_fast.train.schedules import RunSchedule
from beit_fast.train.task import Task
from beit_fast.train.trackers import BackgroundTracker


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
        self.trackers: list[BackgroundTracker] = []
        self.finished = False

    def open(self, step: int, target: int) -> None:
        """Continue the files of the run at `step`, and show progress."""
        if not self.world.is_main:
            return
        self.metrics_file = self.attempt("metrics", MetricsFile, self.folder.metrics, step)
        self.anomalies_file = self.attempt("anomalies", MetricsFile, self.folder.anomalies, step)
        self.attempt("the environment", self.folder.record_start, step, self.world.size, self.world.device)
        for line in self.attempt("the data", self.folder.record_data, self.task.contents()) or ():
            self.message(line)
        self.trackers = [
            BackgroundTracker(name, self.config, self.task.name, step, self.failed)
            for name in dict.fromkeys(self.config.log.tracker_names())
        ]
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
        for tracker in self.trackers:
            self.attempt("a tracker", tracker.scalars, line)
        if self.progress is not None and eta_s is not None:
            self.attempt("progress", self.progress.interval, line, self.task.sample_noun, eta_s)

    def evaluation(self, step: int, result: dict[str, Any]) -> None:
        """Write an evaluation down, if it is not yet, and show its pictures to the trackers."""
        if not self.has_evaluation(step):
            self.metrics({"kind": "evaluation", "step": step, **result})
        self.pictures(step)

    def pictures(self, step: int, paths: Iterable[Path] | None = None) -> None:
        """Show pictures to the trackers; None: those that the evaluation of `step` left."""
        if self.trackers:
            drawn = sorted(self.folder.path.glob(f"pictures/*_step_{step:08d}.png")) if paths is None else paths
            for path in drawn:
                for tracker in self.trackers if path.suffix == ".png" else ():
                    self.attempt("a tracker", tracker.picture, path, step)

    def has_evaluation(self, step: int) -> bool:
        """Whether the metrics hold an evaluation of this step."""
        return self.metrics_file is not None and step in self.metrics_file.evaluations

    def best_so_far(self) -> BestEvaluation | None:
        """The best of the evaluations after the start that the metrics hold; None where the run keeps none."""
        metric = self.config.checkpoint.best
        lines = {} if self.metrics_file is None else self.metrics_file.evaluations
        return None if metric is None else BestEvaluation(metric, [lines[step] for step in sorted(lines) if step])

    def advance(self, step: int) -> None:
        if self.progress is not None:
            self.attempt("progress", self.progress.advance, step)

    def anomalies(self, entries: list[dict[str, Any]], schedule: RunSchedule) -> None:
        """Write down anomalies, and keep what a replay of a step that was not finite needs."""
        if not self.world.is_main:
            return
        steps: dict[str, list[str]] = {}
        for entry in entries:
            place = entry["step"] + schedule.data_offset
            entry |= samples_of(place, schedule.steps_per_epoch, self.config.batch_size)
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
        for tracker in self.trackers:
            self.attempt("closing", tracker.close, self.finished)
        for part in (self.progress, self.metrics_file, self.anomalies_file):
            if part is not None:
                self.attempt("closing", part.close)
