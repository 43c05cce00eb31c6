"""Whether a run goes on: what is left to do after a checkpoint, the best evaluation so far, and what is kept of it."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from beit_fast.train.checkpoint import artefacts
from beit_fast.train.checkpoint.format import PREFIX, Checkpoint, write_json
from beit_fast.train.checkpoint.run_folder import RunFolder
from beit_fast.train.config import RunConfig
from beit_fast.train.distributed.world import World
from beit_fast.train.schedules import RunSchedule

BEST = "best"
"""Folder of the best checkpoint in a run folder; a run folder itself, as far as reading goes."""
SMALLER_IS_BETTER = ("loss", "error", "mae")
"""Parts of the names of metrics of which the smallest value is the best."""


def finished(
    checkpoint: Checkpoint | None, config: RunConfig, folder: RunFolder, world: World, log: Callable[[str], None]
) -> dict[str, Any] | None:
    """The final metrics of a run of which nothing is left to train or to finish; says what can be done with it."""
    if checkpoint is None:
        return None
    schedule = RunSchedule.after(config, checkpoint.state["identity"]["num_samples"], checkpoint.step, checkpoint.state)
    early = checkpoint.step < schedule.target
    if early and config.stop_after_no_gain is None:
        return None
    metrics = artefacts.completed(folder.path, checkpoint.step, early) if world.is_main else {}
    if world.agree(int(metrics is not None)) == 0:
        return None
    more = f"--max-steps N trains on to step N (of {schedule.last})"
    if checkpoint.step >= schedule.last:
        more = (
            f"{'--epochs' if config.steps is None else '--steps'} N --extend trains on, --max-steps N stops a run early"
        )
    log(
        f"{folder.path}: this run is complete at step {checkpoint.step}; --fresh starts anew (and moves this run "
        f"aside), {more}"
    )
    return metrics or dict(checkpoint.state.get("metrics", {}))


class BestEvaluation:
    """The best value of a metric over a run's evaluations.

    Args:
        metric: name of the metric, as in metrics.jsonl.
        lines: the evaluations so far, as lines of metrics.jsonl.
    """

    def __init__(self, metric: str, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self.metric = metric
        self.sign = -1 if any(part in metric for part in SMALLER_IS_BETTER) else 1
        self.value: float | None = None
        self.without_gain = 0
        """Evaluations since the best one."""
        for line in lines:
            if isinstance(line.get(metric), (int, float)):
                self.add(line)

    def is_exhausted(self, limit: int | None) -> bool:
        """Whether so many evaluations in a row brought nothing better."""
        return limit is not None and self.without_gain >= limit

    def add(self, result: Mapping[str, Any]) -> bool:
        """Count one more evaluation; whether it is the best so far. ValueError where it lacks the metric."""
        if self.metric not in result:
            raise ValueError(
                f"--checkpoint.best {self.metric}: the evaluation has no such metric; choose from {', '.join(result)}"
            )
        value = float(result[self.metric])
        better = value == value and (self.value is None or self.sign * value > self.sign * self.value)
        self.value = value if better else self.value
        self.without_gain = 0 if better else self.without_gain + 1
        return better


def keep_best(run: Path, step: int, metrics: Mapping[str, Any], finish: Callable[[Path], None]) -> None:
    """Put the checkpoint of `step`, and what `finish` writes for it, into `<run>/best`, in place of what is there."""
    work, target, old = run / ".tmp-best", run / BEST, run / ".old-best"
    for folder in (work, old):
        shutil.rmtree(folder, ignore_errors=True)
    name = f"{PREFIX}{step:08d}"
    shutil.copytree(run / "checkpoints" / name, work / "checkpoints" / name, copy_function=_linked)
    shutil.copy2(run / "config.json", work)
    finish(work)
    write_json(work / "best.json", {"step": step, **metrics})
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _linked(source: str, target: str) -> None:
    """A hard link, which takes no room until the run drops its own checkpoint; a copy where there are none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
