"""TensorBoard, W&B and MLflow beside metrics.jsonl, which stays the source of truth: no tracker can end a run.

Each works on a thread of its own and is told what to do through a queue, so that a server that does not answer costs
nothing but its own entries.
"""

import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from beit_fast.train.config import RunConfig, flat, to_plain

PATIENCE_S = 30.0
"""How long the end of a run waits for what trackers have not written yet."""
WAITING = 1000
"""Calls that a tracker may be behind by; what comes then is dropped and counted as a failure."""


class Tracker:
    """What a tracker does. `step` is the optimizer step from which a run continues; 0 at its start."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int) -> None:
        raise NotImplementedError

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by their names, `train/loss` or `evaluation/top1_percent`."""
        raise NotImplementedError

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG file."""
        raise NotImplementedError

    def close(self, finished: bool) -> None:
        """Write what is left; `finished` is False where the run will be continued."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """Event files in `<run>/tensorboard`; a continuation hides what an interrupted run wrote beyond its checkpoint."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
        if not step:
            self.writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, name: str, path: Path, step: int) -> None:
        self.writer.add_image(name, _pixels(path), step, dataformats="HWC")

    def close(self, finished: bool) -> None:
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run of wandb, its files in `<run>/wandb`; WANDB_PROJECT, WANDB_MODE and the like decide where it goes."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int) -> None:
        import wandb

        self.image = wandb.Image
        self.run = wandb.init(
            dir=folder, id=_kept_id(folder, "wandb", lambda: uuid.uuid4().hex[:12]), resume="allow", name=folder.name,
            job_type=name, config=dict(config), settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")  # of its own, so that a continuation may write a step again

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def picture(self, name: str, path: Path, step: int) -> None:
        self.run.log({name: self.image(str(path)), "step": step})

    def close(self, finished: bool) -> None:
        self.run.finish()


class MlFlow(Tracker):
    """A run of MLflow in the experiment "beit_fast" (MLFLOW_EXPERIMENT_NAME), kept where MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self.metric, self.client = Metric, mlflow.MlflowClient()
        named = os.environ.get("MLFLOW_EXPERIMENT_NAME", "beit_fast")
        experiment = self.client.get_experiment_by_name(named)
        number = self.client.create_experiment(named) if experiment is None else experiment.experiment_id

        def new_run() -> str:
            run: str = self.client.create_run(number, run_name=folder.name, tags={"task": name}).info.run_id
            values = [Param(key, str(value)) for key, value in flat(dict(config)).items()]
            for start in range(0, len(values), 100):  # the most it takes at once
                self.client.log_batch(run, params=values[start : start + 100])
            return run

        self.run = _kept_id(folder, "mlflow", new_run)
        self.client.update_run(self.run, status="RUNNING")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[self.metric(name, v, now, step) for name, v in values.items()])

    def picture(self, name: str, path: Path, step: int) -> None:
        self.client.log_artifact(self.run, str(path), "pictures")

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MlFlow}


def _pixels(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _kept_id(folder: Path, tracker: str, new: Callable[[], str]) -> str:
    """The name of this run with a tracker, from <tracker>_run.txt in its folder; a new one where there is none."""
    path = folder / f"{tracker}_run.txt"
    if not path.exists():
        path.write_text(new() + "\n")
    return path.read_text().strip()


class BackgroundTracker:
    """A tracker on a thread of its own.

    Args:
        tracker: a name in `TRACKERS`.
        config: of the run, whose folder it writes to.
        task, step: name of the task, and the step from which the run continues.
        failed: called with what could not be done, and why.
    """

    def __init__(
        self, tracker: str, config: RunConfig, task: str, step: int, failed: Callable[[str, BaseException], None]
    ) -> None:
        self._name, self._failed = f"the tracker {tracker}", failed
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(WAITING)
        make = TRACKERS[tracker]
        arguments = (config.output_dir.absolute(), task, to_plain(config), step)
        self._thread = threading.Thread(target=self._work, args=(make, arguments), name=tracker, daemon=True)
        self._thread.start()

    def scalars(self, line: Mapping[str, Any]) -> None:
        """Pass the numbers of a line of metrics.jsonl on."""
        kind, step = line["kind"], int(line["step"])
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in line.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
        }
        self._put(lambda tracker: tracker.scalars(numbers, step))

    def picture(self, path: Path, step: int) -> None:
        """Pass a PNG file on, named as the file is, without its step."""
        name = path.stem.removesuffix(f"_step_{step:08d}")
        self._put(lambda tracker: tracker.picture(name, path, step))

    def close(self, finished: bool) -> None:
        """Wait until everything is written, `PATIENCE_S` at the most."""
        self._put(lambda tracker: tracker.close(finished))
        self._put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._failed(self._name, TimeoutError(f"it has not ended after {PATIENCE_S:g} s"))

    def _put(self, call: Callable[[Tracker], None] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._failed(self._name, TimeoutError(f"it is {WAITING} entries behind"))

    def _work(self, make: type[Tracker], arguments: tuple[Any, ...]) -> None:
        tracker = None
        try:
            tracker = make(*arguments)
        except ModuleNotFoundError as error:
            self._failed(self._name, ModuleNotFoundError(f"{error}: pip install 'beit-fast[trackers]'"))
        except BaseException as error:
            self._failed(self._name, error)
        while (call := self._calls.get()) is not None:
            try:
                if tracker is not None:
                    call(tracker)
            except BaseException as error:
                self._failed(self._name, error)
