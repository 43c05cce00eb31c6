"""The loop of every training: `run(task)`. It alone touches optimizer, clock and disk.

A run is a function of its configuration: step `s` always sees the same samples, whatever the world size, micro-batches
or interruptions. The gradient of a step is that of the sum of the global batch's target losses over their number.
"""

import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from beit_fast.train import memory
from beit_fast.train.anomalies import Anomalies, samples_of
from beit_fast.train.checkpoint.async_writer import CheckpointWriter
from beit_fast.train.checkpoint.format import Checkpoint, list_checkpoints, require_space
from beit_fast.train.checkpoint.run_folder import RunFolder
from beit_fast.train.checkpoint.state import restore_saved, tensors_to_save
from beit_fast.train.cuda_graph import CudaRecorder, check_cuda_graph
from beit_fast.train.distributed import parallel
from beit_fast.train.distributed.watchdog import Watchdog
from beit_fast.train.distributed.world import (
    LostRank,
    StopSignal,
    Vote,
    World,
    check_world,
    end_world,
    is_lost_rank,
    start_world,
)
from beit_fast.train.metrics import Interval, MetricsFile, peak_memory_mib
from beit_fast.train.optim import LossScaler, build_optimizer, set_learning_rate
from beit_fast.train.precision import autocast, precision_of
from beit_fast.train.progress import Progress, duration
from beit_fast.train.schedules import accumulation, learning_rate, requests_of, run_length, seed_of
from beit_fast.train.step import TrainStep
from beit_fast.train.task import Task

EXIT_RESUME = 75
"""EX_TEMPFAIL of sysexits.h: saved on a signal; the same command continues."""


class PersistentNonFiniteGradients(RuntimeError):
    """Too many steps in a row had a gradient that was not finite."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended: `exit_code` 0 (complete) or 75 (saved on a signal), and its last metrics."""

    exit_code: int
    step: int
    metrics: dict[str, Any] = field(default_factory=dict)


def run(task: Task) -> RunResult:
    """Train `task` until the schedule (or --max-steps) ends, continuing the run found in its `output_dir`.

    Raises:
        ValueError, OSError, RuntimeError: one clear line; what was saved before stays intact.
    """
    config = task.config
    world = start_world(config.device)
    folder = RunFolder(config.output_dir)
    try:
        check_world(config, world)
        if world.is_main:
            folder.claim(config, task.name)
        world.barrier()
        with contextlib.closing(TrainingRun(task, world, folder)) as training:
            try:
                return training.run()
            except RuntimeError as error:
                if memory.is_out_of_memory(error):
                    raise training.out_of_memory(error) from error
                if is_lost_rank(error):
                    first = str(error).splitlines()[0][:200]
                    raise LostRank(f"rank {world.rank} lost another one at step {training.step} ({first})") from error
                raise
    finally:
        task.close()
        folder.release()
        end_world(world)


class TrainingRun:
    """State of one run in one process."""

    def __init__(self, task: Task, world: World, folder: RunFolder) -> None:
        self.task, self.config, self.world, self.folder = task, task.config, world, folder
        self.accumulation = accumulation(self.config, world.size)
        self.stop = StopSignal(world)
        self.progress: Progress | None = None
        self.metrics_file: MetricsFile | None = None
        self.anomalies_file: MetricsFile | None = None
        self.watchdog: Watchdog | None = None
        self.last_line: dict[str, Any] = {}
        self.skipped = self.step = self.saved_step = 0
        self.memory = memory.StateMemory()
        self.phase = "starting"

    def close(self) -> None:
        self.stop.close()
        for part in (self.watchdog, self.progress, self.metrics_file, self.anomalies_file):
            if part is not None:
                part.close()

    def log(self, text: str) -> None:
        """Print a line of its own, above the progress bar, on rank 0."""
        if self.progress is not None:
            self.progress.log(text)
        elif self.world.is_main and self.config.log.progress != "none":
            print(text, flush=True)

    def run(self) -> RunResult:
        """Train from the newest checkpoint to the last step, or to the first signal."""
        config, world = self.config, self.world
        checkpoint, notes = self.folder.newest_for_all(world)
        for note in notes:
            self.log(note)
        if checkpoint is not None:
            total = checkpoint.state["total_steps"]
            if checkpoint.step >= min(total, config.max_steps or total):
                more = f"trains on to step N (of {total})" if checkpoint.step < total else "stops a run early"
                self.log(
                    f"{self.folder.path}: this run is complete at step {checkpoint.step}; --fresh starts anew (and "
                    f"moves this run aside), --max-steps N {more}"
                )
                return RunResult(0, checkpoint.step, dict(checkpoint.state.get("metrics", {})))
        self.prepare(checkpoint)
        self.open_outputs()
        requests = requests_of(self.step, self.target, self.steps_per_epoch, config, world.rank, world.size)
        batches = iter(self.task.batches(requests))
        self.model.train()
        self.started = self.interval_started = time.perf_counter()
        self.first_step, self.waited = self.step, 0.0
        vote = Vote.CONTINUE
        while self.step < self.target and vote is Vote.CONTINUE:
            self.train_step(self.next_batches(batches))
            self.step += 1
            if self.watchdog is not None:
                self.watchdog.beat()
            vote = self.stop.poll(self.writer.failed())
            if vote is Vote.FAILED:
                self.wait_for_save()
            if self.progress is not None:
                self.progress.advance(self.step)
            last = self.step == self.target
            if last or self.step % config.log.every_steps == 0:
                self.log_metrics()
            if last or (config.eval_every and self.step % config.eval_every == 0):
                self.evaluate()
            if last or vote is Vote.STOP or self.step % config.checkpoint.every_steps == 0:
                self.save()
        self.stop.drain()
        self.wait_for_save()
        if self.step < self.target:
            self.log(
                f"stopped by a signal: saved step {self.step}; the same command continues (exit code {EXIT_RESUME})"
            )
            return RunResult(EXIT_RESUME, self.step, self.last_line)
        self.finish()
        return RunResult(0, self.step, self.last_line)

    def prepare(self, checkpoint: Checkpoint | None) -> None:
        """Build everything that trains, and restore the checkpoint into it."""
        config, world = self.config, self.world
        if config.cuda_graph:
            check_cuda_graph(self.task, world)
        torch.manual_seed(config.seed)
        self.module = self.task.build(world)
        samples = self.task.num_samples()
        self.identity = {"num_samples": samples, **self.task.identity()}
        self.check_identity(self.identity if checkpoint is None else checkpoint.state["identity"])
        self.steps_per_epoch, self.total, self.warmup = run_length(config, samples)
        self.target = min(self.total, config.max_steps or self.total)
        blocks = self.task.blocks(self.module)
        if config.parallel == "fsdp2" and not self.task.can_shard:
            raise ValueError(f"--parallel fsdp2: {self.task.name} cannot be split; use --parallel ddp")
        split = config.parallel == "fsdp2" and world.size > 1
        self.unsplit = copy.deepcopy(self.module).cpu() if split else None
        recorder = CudaRecorder(world.device) if config.cuda_graph and config.replay is None else None
        with recorder.on_its_stream() if recorder else contextlib.nullcontext():
            self.model = parallel.parallelise(self.module, blocks, world, config.parallel, self.accumulation)
        if config.compile:
            parallel.compile_blocks(blocks)
        groups = self.task.parameter_groups(self.module, config.optim.weight_decay)
        self.optimizer = build_optimizer(groups, config.optim)
        self.precision = precision_of(config, world.device)
        self.scaler = LossScaler(world.device, enabled=self.precision == "fp16")
        self.ema: dict[str, Tensor] | None = None
        if config.optim.ema_decay is not None:
            self.ema = {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}
        self.compute = TrainStep(self.task, world, self.module, self.model, self.optimizer, self.scaler, self.ema)
        if recorder is not None:
            self.compute.record_with(recorder)
        self.interval, self.anomalies = Interval(world), Anomalies(world)
        self.memory = memory.state_memory(self.module, groups, self.ema)
        mode = config.checkpoint.background
        background = mode == "on" or (mode == "auto" and world.device.type == "cuda")
        self.writer = CheckpointWriter(
            self.folder.checkpoints, config.checkpoint.keep, world, background, split, self.log
        )
        if checkpoint is not None:
            self.restore(checkpoint)

    def check_identity(self, before: dict[str, Any]) -> None:
        """ValueError where the run began with other data or another tokenizer."""
        if changed := [name for name in before if before[name] != self.identity.get(name)]:
            pairs = ", ".join(f"{name} {before[name]}, now {self.identity.get(name)}" for name in changed)
            raise ValueError(
                f"the run in {self.folder.path} began with {pairs}; restore what it was trained on, or start anew with "
                "--fresh"
            )

    def open_outputs(self) -> None:
        """Open metrics, progress and the watchdog, and say what begins."""
        config, world = self.config, self.world
        if world.is_main:
            require_space(self.folder.checkpoints, self.memory.saved, config.checkpoint.keep)
            self.metrics_file = MetricsFile(self.folder.metrics, self.step)
            self.anomalies_file = MetricsFile(self.folder.anomalies, self.step)
            self.folder.record_start(self.step, world.size, world.device)
            for line in self.folder.record_data(self.task.contents()):
                self.log(line)
            self.progress = Progress(config.log.progress, self.task.name, self.step, self.target)
        parallel_name = "" if world.size == 1 else f" {config.parallel}"
        micro_batch = -(-config.batch_size // world.size // self.accumulation)
        self.log(
            f"{self.task.name}: step {self.step} to {self.target} of {self.total}, batch {config.batch_size} = "
            f"{world.size} {world.device.type}{parallel_name} x {self.accumulation} x {micro_batch}, "
            f"{self.precision}, run folder {self.folder.path}"
        )
        self.watchdog = Watchdog(
            self.folder.path, world.rank, world.size, config.hang_timeout_s,
            lambda: f"rank {world.rank} of {world.size} stands still, {self.phase}, {self.step} steps done",
        )  # fmt: skip

    def next_batches(self, batches: Iterator[Any]) -> list[Any]:
        """The micro-batches of a step. Where they cannot be had the step before is saved first."""
        before = time.perf_counter()
        self.phase = "waiting for data"
        try:
            micro_batches = [next(batches) for _ in range(self.accumulation)]
        except Exception:
            if self.world.size == 1 and self.step > self.saved_step:  # saving together needs the other ranks
                self.save()
                self.wait_for_save()
            raise
        self.waited += time.perf_counter() - before
        self.phase = "training"
        return micro_batches

    def train_step(self, batches: list[Any]) -> None:
        """One optimizer step from this rank's micro-batches. Nothing here waits for the device."""
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config.optim, self.total, self.warmup))
        result = self.compute(batches, self.step)
        self.interval.add(result.loss, result.sums, result.norm, result.found_inf)
        self.anomalies.add(result.global_loss, result.loss, result.norm, result.found_inf, result.searching)
        torch.manual_seed(seed_of(self.config.seed, self.step))
        self.task.after_step(self.module, self.step)

    def log_metrics(self) -> None:
        """Read the interval (the only wait for the device), write its line.

        A run that stops inside an interval reports it and keeps it unread in the checkpoint, for its continuation.
        """
        complete = self.step % self.config.log.every_steps == 0
        values = self.interval.read(reset=complete)
        if complete:
            self.skipped += values["skipped"]
        now = time.perf_counter()
        seconds, self.interval_started = now - self.interval_started, now
        waited, self.waited = self.waited, 0.0
        # the first interval after a resume covers fewer steps by the clock than by its sums
        steps = min(values["steps"], self.step - self.first_step)
        rate = steps * self.config.batch_size / seconds
        eta = (now - self.started) / (self.step - self.first_step) * (self.target - self.step)
        line: dict[str, Any] = {
            "kind": "train",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "samples_seen": self.step * self.config.batch_size,
            "loss": values["loss"],
            **(self.task.summarise(values["sums"]) if values["steps"] > values["skipped"] else {}),
            "lr": learning_rate(self.step - 1, self.config.optim, self.total, self.warmup),
            "grad_norm": values["grad_norm"],
            "skipped_steps": values["skipped"],
            f"{self.task.sample_noun}_per_s": rate,
            "step_ms": 1000 * seconds / steps,
            "data_wait_share": waited / seconds,
            "peak_memory_mib": peak_memory_mib(self.world.device),
            **self.task.counters(),
        }
        if self.precision == "fp16":
            line["loss_scale"] = float(self.scaler.scale)
        self.last_line = line
        entries = self.anomalies.read(self.step)
        if self.metrics_file is not None and self.progress is not None:
            self.metrics_file.write(line)
            self.progress.interval(line, self.task.sample_noun, eta)
        self.report_anomalies(entries)
        limit = self.config.optim.max_skipped_steps
        if values["longest_skipped"] > limit:
            saved = list_checkpoints(self.folder.checkpoints)
            raise PersistentNonFiniteGradients(
                f"the gradient was not finite in {values['longest_skipped']} steps in a row up to step {self.step} "
                f"({self.skipped} skipped in all; --optim.max-skipped-steps {limit}); weights are unharmed, the last "
                f"checkpoint is {saved[-1].name if saved else 'none'}; --replay {self.step} says where it began; lower "
                "--optim.lr or use --precision bf16"
            )

    def report_anomalies(self, entries: list[dict[str, Any]]) -> None:
        """Write down anomalies, and keep what a replay of a step that was not finite needs."""
        if self.anomalies_file is None:
            return
        steps: dict[str, list[str]] = {}
        for entry in entries:
            entry |= samples_of(entry["step"], self.steps_per_epoch, self.config.batch_size)
            if entry["kind"] == "non_finite":
                entry["replay_from"] = self.folder.keep_for_replay(entry["step"])
            self.anomalies_file.write(entry)
            steps.setdefault(entry["kind"], []).append(str(entry["step"]))
        for kind in sorted(steps):
            self.log(f"{kind.replace('_', ' ')} at step {', '.join(steps[kind])}: {self.folder.anomalies}")

    def evaluate(self) -> None:
        began, self.phase = time.perf_counter(), "evaluating"
        if self.watchdog is not None:
            self.watchdog.pause()
        torch.manual_seed(seed_of(self.config.seed, self.step))
        precision = autocast(self.world.device, self.precision)
        with parallel.evaluation_model(self.module, self.ema, self.unsplit) as model, torch.no_grad(), precision:
            model.eval()
            result = self.task.evaluate(model, self.step)
        self.model.train()
        if result:
            self.last_line = self.last_line | result
            if self.metrics_file is not None:
                self.metrics_file.write({"kind": "evaluation", "step": self.step, **result})
            self.log(f"step {self.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in result.items()))
        self.interval_started += time.perf_counter() - began  # throughput is that of training

    def save(self) -> None:
        """Checkpoint of this step; the sums of the open interval are part of it."""
        began, self.phase = time.perf_counter(), "saving"
        state = {
            "total_steps": self.total, "identity": self.identity, "epoch": self.step // self.steps_per_epoch,
            "world_size": self.world.size, "precision": self.precision, "interval": self.interval.state(),
            "anomalies": self.anomalies.state(self.step), "skipped": self.skipped, "scaler": self.scaler.state(),
            "metrics": self.last_line,
        }  # fmt: skip
        self.writer.save(self.step, tensors_to_save(self.module, self.optimizer, self.ema), state)
        self.saved_step = self.step
        if not self.writer.background:
            self.wait_for_save()
        self.interval_started += time.perf_counter() - began

    def wait_for_save(self) -> None:
        """Wait until what was saved is on the disk; raises, on every rank, where it could not be written."""
        self.writer.join()
        if self.world.any(self.writer.failed()):
            raise self.writer.failure or OSError("another rank could not write the checkpoint; its message says why")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint into model, optimizer, EMA, scaler, interval and counters."""
        restore_saved(checkpoint, self.module, self.optimizer, self.ema)
        state = checkpoint.state
        self.scaler.load(state["scaler"])
        self.interval.load(state["interval"])
        if "anomalies" in state:
            self.anomalies.load(state["anomalies"])
        self.skipped = int(state["skipped"])
        self.last_line = dict(state["metrics"])
        self.step = self.saved_step = checkpoint.step
        self.log(f"continuing {checkpoint.path}")

    def out_of_memory(self, error: BaseException) -> memory.OutOfMemory:
        share = -(-self.config.batch_size // self.world.size // self.accumulation)
        return memory.out_of_memory(error, self.config, self.world, share, self.memory)

    def finish(self) -> None:
        """Pictures and exports of a run that reached its target."""
        if self.watchdog is not None:
            self.watchdog.pause()
        with parallel.evaluation_model(self.module, self.ema, self.unsplit) as model:
            if self.world.is_main:
                for path in self.task.finish(model, self.folder.path):
                    print(f"wrote {path}", flush=True)
        if self.world.is_main:
            from beit_fast.visualize.run_report import write_report

            took = duration(time.perf_counter() - self.started)
            self.log(f"complete: step {self.step} in {took}; report {write_report(self.folder.path)}")
        self.world.barrier()
