"""The loop of every training: `run(task)`. It alone touches optimizer, clock and disk.

A run is a function of its configuration: step `s` always sees the same samples, whatever the world size, micro-batches
or interruptions. The gradient of a step is that of the sum of the global batch's target losses over their number.
"""

import contextlib
import copy
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from beit_fast.data.sources.writing import naming
from beit_fast.train import memory
from beit_fast.train.anomalies import Anomalies, Divergence, PersistentNonFiniteGradients, check_skipped
from beit_fast.train.checkpoint import artefacts
from beit_fast.train.checkpoint.async_writer import CheckpointWriter
from beit_fast.train.checkpoint.format import Checkpoint, require_space, understood
from beit_fast.train.checkpoint.run_folder import RunFolder
from beit_fast.train.checkpoint.state import restore_saved, tensors_to_save
from beit_fast.train.continuation import BestEvaluation, finished, keep_best
from beit_fast.train.cuda_graph import CudaRecorder, check_cuda_graph
from beit_fast.train.distributed import parallel
from beit_fast.train.distributed.agreement import check_built, check_settings
from beit_fast.train.distributed.watchdog import Watchdog
from beit_fast.train.distributed.world import (
    Interrupted,
    StopSignal,
    Vote,
    World,
    check_world,
    end_world,
    lost_rank,
    start_world,
)
from beit_fast.train.metrics import Interval, peak_memory_mib
from beit_fast.train.optim import LossScaler, build_optimizer, set_learning_rate
from beit_fast.train.precision import precision_of
from beit_fast.train.progress import duration, safe_output
from beit_fast.train.run_log import RunLog
from beit_fast.train.schedules import RunSchedule, accumulation, seed_of
from beit_fast.train.step import TrainStep
from beit_fast.train.task import Task

EXIT_RESUME = 75
"""EX_TEMPFAIL of sysexits.h: saved on a signal; the same command continues."""


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
    with safe_output(), naming(config.output_dir), contextlib.ExitStack() as stack:
        world = start_world(config.device)
        folder = RunFolder(config.output_dir)
        for end in (lambda: end_world(world), folder.release, task.close):  # called in reverse
            stack.callback(end)
        check_settings(world, config, task.name)
        check_world(config, world)
        if world.is_main:
            folder.claim(config, task.name)
        world.barrier()
        training = stack.enter_context(contextlib.closing(TrainingRun(task, world, folder)))
        try:
            return training.run()
        except RuntimeError as error:
            if memory.is_out_of_memory(error):
                raise memory.out_of_memory(error, config, world, training.micro_batch, training.memory) from error
            if (lost := lost_rank(error, world.rank, training.step)) is not None:
                raise lost from error
            raise
    raise AssertionError("unreachable")


class TrainingRun:
    """State of one run in one process."""

    def __init__(self, task: Task, world: World, folder: RunFolder) -> None:
        self.task, self.config, self.world, self.folder = task, task.config, world, folder
        self.accumulation = accumulation(self.config, world.size)
        self.micro_batch = -(-self.config.batch_size // world.size // self.accumulation)
        self.stop = StopSignal(world)
        self.output = RunLog(task, world, folder)
        self.log = self.output.message
        self.last_line: dict[str, Any] = {}
        self.skipped = self.step = self.saved_step = self.target = 0
        self.evaluated_step: int | None = None
        self.best: BestEvaluation | None = None
        self.interval_started, self.phase = 0.0, "starting"
        self.memory = memory.StateMemory()
        self.watchdog = Watchdog(
            folder.path, world.rank, world.size, self.config.hang_timeout_s,
            lambda: f"rank {world.rank} of {world.size} stands still, {self.phase}, {self.step} steps done",
        )  # fmt: skip
        task.alive = self.watchdog.slow

    def close(self) -> None:
        self.stop.close()
        self.watchdog.close()
        self.output.close()

    def run(self) -> RunResult:
        """Train from the newest checkpoint to the last step, or to the first signal."""
        try:
            checkpoint, notes = self.folder.newest_for_all(self.world)
            for note in notes:
                self.log(note)
            metrics = finished(checkpoint, self.config, self.folder, self.world, self.log)
            if checkpoint is not None and metrics is not None:
                return RunResult(0, checkpoint.step, metrics)
            with self.stop.interruptible():
                self.prepare(checkpoint)
                self.open_outputs()
                due = self.schedule.evaluates(self.step, self.target) if self.step else self.task.evaluates_start()
                if due and not self.world.agree(int(self.output.has_evaluation(self.step))):
                    self.evaluate()  # of the start, or the run ended before it
                self.stop_early()
            self.train()
            if self.step < self.target:
                raise Interrupted
            with self.stop.interruptible():
                if self.evaluated_step != self.step:
                    self.evaluate()
                self.finish()
            self.output.finished = True
        except Interrupted:
            if self.step > self.saved_step:
                self.save()
                self.wait_for_save()
            saved = f"saved step {self.step}" if self.step else "before the first step"
            self.log(f"stopped by a signal: {saved}; the same command continues (exit code {EXIT_RESUME})")
            return RunResult(EXIT_RESUME, self.step, self.last_line)
        return RunResult(0, self.step, self.last_line)

    def train(self) -> None:
        """The loop: to the target, or until the ranks agree to stop; the last state is saved."""
        config, world = self.config, self.world
        batches = iter(self.task.batches(self.schedule.requests(self.step, self.target, world.rank, world.size)))
        self.model.train()
        self.started = self.interval_started = time.perf_counter()
        self.first_step, self.waited, vote = self.step, 0.0, Vote.CONTINUE
        try:
            while self.step < self.target and vote is Vote.CONTINUE:
                self.train_step(self.next_batches(batches))
                self.step += 1
                vote = self.stop.poll(self.writer.failure is not None)
                if vote is Vote.FAILED:
                    self.wait_for_save()
                self.output.advance(self.step)
                last = self.step == self.target
                evaluate = self.schedule.evaluates(self.step, self.target)
                if last or self.step % config.log.every_steps == 0:
                    self.log_metrics()
                if last or evaluate or vote is Vote.STOP or self.step % config.checkpoint.every_steps == 0:
                    self.save()
                if evaluate and vote is Vote.CONTINUE:
                    with self.stop.interruptible():
                        self.evaluate()
                        self.stop_early()
        except Exception as error:  # what is done is saved, where this process can do so alone and the state is whole
            harmful = isinstance(error, PersistentNonFiniteGradients) or self.compute.updating or self.writer.failure
            if self.world.size == 1 and self.step > self.saved_step and not harmful:
                with contextlib.suppress(OSError):
                    self.save()
                    self.wait_for_save()
            raise
        self.stop.drain()
        self.wait_for_save()

    def prepare(self, checkpoint: Checkpoint | None) -> None:
        """Build everything that trains, and restore the checkpoint into it."""
        config, world = self.config, self.world
        if config.cuda_graph:
            check_cuda_graph(self.task, world)
        torch.manual_seed(config.seed)
        self.module = self.task.build(world)
        samples = self.task.num_samples()
        self.identity = {"num_samples": samples, **self.task.identity()}
        check_built(world, self.identity, self.module, precision_of(config, world.device))
        if checkpoint is not None:
            self.folder.check_identity(checkpoint.state["identity"], self.identity)
        position = (0, {}) if checkpoint is None else (checkpoint.step, checkpoint.state)
        self.schedule = RunSchedule.after(config, samples, *position)
        self.target = self.schedule.target
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
        averaged = config.optim.ema_decay is not None
        self.ema = {n: p.detach().clone() for n, p in self.module.named_parameters()} if averaged else None
        self.compute = TrainStep(self.task, world, self.module, self.model, self.optimizer, self.scaler, self.ema)
        if recorder is not None:
            self.compute.record_with(recorder)
        self.interval, self.anomalies, self.divergence = Interval(world), Anomalies(world), Divergence(world)
        self.memory = memory.state_memory(self.module, groups, self.ema)
        mode = config.checkpoint.background
        background = mode == "on" or (mode == "auto" and world.device.type == "cuda")
        kept = config.checkpoint.keep
        self.writer = CheckpointWriter(self.folder.checkpoints, kept, world, background, split, self.log)
        if checkpoint is not None:
            self.restore(checkpoint)

    def open_outputs(self) -> None:
        """Open metrics and progress, and say what begins."""
        config, world = self.config, self.world
        if world.is_main:
            require_space(self.folder.checkpoints, self.memory.saved, config.checkpoint.keep)
            if self.step < self.target:
                artefacts.unmark(self.folder.path)
        self.output.open(self.step, self.target)
        self.best = self.output.best_so_far()
        kind = world.device.type if world.size == 1 else f"{world.device.type} {config.parallel}"
        self.log(
            f"{self.task.name}: step {self.step} to {self.target} of {self.schedule.last}, batch {config.batch_size} = "
            f"{world.size} {kind} x {self.accumulation} x {self.micro_batch}, {self.precision}, warm-up "
            f"{self.schedule.warmup} steps, in {self.folder.path}"
        )

    def next_batches(self, batches: Iterator[Any]) -> list[Any]:
        """The micro-batches of a step."""
        before, self.phase = time.perf_counter(), "waiting for data"
        with self.stop.interruptible() if self.world.size == 1 else contextlib.nullcontext():
            micro_batches = [next(batches) for _ in range(self.accumulation)]
        self.waited += time.perf_counter() - before
        self.phase = "training"
        return micro_batches

    def train_step(self, batches: list[Any]) -> None:
        """One optimizer step from this rank's micro-batches. Nothing here waits for the device."""
        step = self.step + self.schedule.schedule_offset
        set_learning_rate(self.optimizer, self.schedule.rate(self.step))
        result = self.compute(batches, step)
        self.interval.add(result.loss, result.sums, result.norm, result.found_inf)
        self.divergence.add(result.global_loss, result.found_inf)
        self.anomalies.add(result.global_loss, result.loss, result.norm, result.found_inf, result.searching)
        torch.manual_seed(seed_of(self.config.seed, step))
        self.task.after_step(self.module, step)
        self.watchdog.beat()

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
            "epoch": self.schedule.epoch(self.step),
            "samples_seen": self.schedule.samples_seen(self.step),
            "loss": values["loss"],
            **(self.task.summarise(values["sums"]) if values["steps"] > values["skipped"] else {}),
            "lr": self.schedule.rate(self.step - 1),
            "grad_norm": values["grad_norm"],
            "skipped_steps": values["skipped"],
            f"{self.task.sample_noun}_per_s": rate,
            "step_ms": 1000 * seconds / steps,
            "data_wait_share": waited / seconds,
            "peak_memory_mib": peak_memory_mib(self.world.device),
            **self.task.counters(),
            **({"loss_scale": float(self.scaler.scale)} if self.precision == "fp16" else {}),
        }
        self.last_line = line
        self.output.metrics(line, eta)
        self.output.anomalies(self.anomalies.read(self.step), self.schedule)
        check_skipped(values, self.config.optim.max_skipped_steps, self.step, self.skipped, self.folder.checkpoints)

    def evaluate(self) -> None:
        """Evaluate this step, whose state is saved: what goes wrong, on any rank, ends no run before its last step."""
        began, self.phase = time.perf_counter(), "evaluating"
        self.watchdog.slow()
        torch.manual_seed(seed_of(self.config.seed, self.step))
        with_weights = parallel.evaluation_model(self.module, self.ema, self.unsplit)
        try:
            with with_weights as model, torch.no_grad(), self.compute.autocast, self.world.together():
                result = self.task.evaluate(model.eval(), self.step)
        except Exception as error:
            if self.step == self.target or lost_rank(error, self.world.rank, self.step):  # nothing to go on with
                raise
            self.output.failed(f"the evaluation of step {self.step}", error)
            result = {}
        finally:
            self.model.train()
        self.evaluated_step = self.step
        if result:
            self.last_line = self.last_line | result
            self.output.evaluation(self.step, result)
            self.log(f"step {self.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in result.items()))
        if self.config.checkpoint.best is not None and self.step:  # the start has no checkpoint
            self.keep_best(result)
        self.interval_started += time.perf_counter() - began  # throughput is that of training
        self.watchdog.beat()

    def keep_best(self, result: dict[str, Any]) -> None:
        """Keep checkpoint and model of this step where its evaluation is the best so far."""
        if not self.world.agree(int(self.best is not None and bool(result) and self.best.add(result))):
            return
        self.wait_for_save()
        with parallel.evaluation_model(self.module, self.ema, self.unsplit) as model:
            finish = functools.partial(self.task.finish, model.eval())
            if self.world.is_main:
                self.output.attempt("keeping the best", keep_best, self.folder.path, self.step, result, finish)
        self.module.train()

    def stop_early(self) -> None:
        """End the run here where the evaluations brought no better value for too long."""
        if self.world.agree(int(self.best is not None and self.best.is_exhausted(self.config.stop_after_no_gain))):
            self.log(f"step {self.step}: no better {self.config.checkpoint.best} for too long; the run ends here")
            self.target = self.step

    def save(self) -> None:
        """Checkpoint of this step; the sums of the open interval are part of it."""
        began, self.phase = time.perf_counter(), "saving"
        state = {
            **self.schedule.state(self.step), "identity": self.identity, "world_size": self.world.size,
            "precision": self.precision, "interval": self.interval.state(), "skipped": self.skipped,
            "anomalies": self.anomalies.state(self.step), "scaler": self.scaler.state(), "metrics": self.last_line,
            **self.divergence.state(self.step, self.log),
        }  # fmt: skip
        self.writer.save(self.step, tensors_to_save(self.module, self.optimizer, self.ema), state)
        self.saved_step = self.step
        if not self.writer.background:
            self.wait_for_save()
        self.interval_started += time.perf_counter() - began

    def wait_for_save(self) -> None:
        """Wait until what was saved is on the disk; raises, on every rank, where it could not be written."""
        self.writer.join()
        if self.world.any(self.writer.failure is not None):
            raise self.writer.failure or OSError("another rank could not write the checkpoint; its message says why")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint into model, optimizer, EMA, scaler, interval and counters."""
        restore_saved(checkpoint, self.module, self.optimizer, self.ema)
        state = checkpoint.state
        with understood(checkpoint.path):
            self.scaler.load(state["scaler"])
            self.interval.load(state["interval"])
            if "anomalies" in state:
                self.anomalies.load(state["anomalies"])
            self.divergence.load(state)
        self.skipped, self.last_line = int(state["skipped"]), dict(state["metrics"])
        self.step = self.saved_step = checkpoint.step
        self.log(f"continuing {checkpoint.path}")

    def finish(self) -> None:
        """Export what the run leaves; the marker that it is complete is written last."""
        self.phase = "finishing"
        self.watchdog.slow()
        work = artefacts.new_work_folder(self.folder.path) if self.world.is_main else self.folder.path
        with parallel.evaluation_model(self.module, self.ema, self.unsplit) as model:
            if self.world.is_main:
                self.task.finish(model, work)
        if self.world.is_main:
            self.log(f"complete: step {self.step} in {duration(time.perf_counter() - self.started)}")
            published = artefacts.publish(self.folder.path, work)
            self.output.pictures(self.step, published)
            for path in published:
                print(f"wrote {path}", flush=True)
            if (report := self.output.report()) is not None:
                self.log(f"report {report}")
                early, files = self.step < self.schedule.target, [*published, report]
                artefacts.mark_complete(self.folder.path, self.step, files, self.last_line, early)
        self.world.barrier()
