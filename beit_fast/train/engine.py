"""The loop of every training: `run(task, config)`. It alone touches optimizer, clock and disk.

A run is a function of its configuration: step `s` always sees the same samples, whatever the world size, the split into
micro-batches or the number of interruptions before it. The gradient of a step is that of the sum of all target losses
in the global batch divided by their global number.
"""

import contextlib
import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from beit_fast.train import memory
from beit_fast.train.anomalies import Anomalies, located
from beit_fast.train.batching import accumulation, requests_of, seed_of
from beit_fast.train.checkpoint import format as checkpoint
from beit_fast.train.checkpoint.async_writer import CheckpointWriter
from beit_fast.train.checkpoint.format import Checkpoint
from beit_fast.train.checkpoint.run_folder import RunFolder
from beit_fast.train.checkpoint.state import files_of, restore_files
from beit_fast.train.config import RunConfig, check
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
from beit_fast.train.schedules import learning_rate, run_length
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


def run(task: Task, config: RunConfig) -> RunResult:
    """Train `task` until the schedule (or --max-steps) ends, continuing the run found in `config.output_dir`.

    Raises ValueError, OSError or RuntimeError with one clear line; what was saved before stays intact.
    """
    check(config)
    world = start_world(config.device)
    folder = RunFolder(config.output_dir)
    try:
        check_world(config, world)
        if world.is_main:
            folder.claim(config, task.name)
        world.barrier()
        with contextlib.closing(TrainingRun(task, config, world, folder)) as job:
            try:
                return job.go()
            except RuntimeError as error:
                if memory.is_out_of_memory(error):
                    raise job.out_of_memory(error) from error
                if is_lost_rank(error):
                    first = str(error).splitlines()[0][:200]
                    raise LostRank(f"rank {world.rank} lost another one at step {job.step} ({first})") from error
                raise
    finally:
        task.close()
        folder.release()
        end_world(world)


class TrainingRun:
    """State of one run in one process."""

    def __init__(self, task: Task, config: RunConfig, world: World, folder: RunFolder) -> None:
        self.task, self.config, self.world, self.folder = task, config, world, folder
        self.stop = StopSignal(world)
        self.progress: Progress | None = None
        self.metrics_file: MetricsFile | None = None
        self.anomalies_file: MetricsFile | None = None
        self.watchdog: Watchdog | None = None
        self.last_line: dict[str, Any] = {}
        self.skipped = self.step = self.saved_step = 0
        self.memory = memory.StateMemory()
        self.doing = "starting"

    def close(self) -> None:
        self.stop.close()
        for part in (self.watchdog, self.progress, self.metrics_file, self.anomalies_file):
            if part is not None:
                part.close()

    def say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)
        elif self.world.is_main and self.config.log.progress != "none":
            print(text, flush=True)

    def go(self) -> RunResult:
        config, world = self.config, self.world
        found, notes = self.folder.agreed_newest(world)
        for note in notes:
            self.say(note)
        if found is not None and found.step >= min(found.state["total_steps"], config.max_steps or 2**62):
            return self.already_finished(found)
        self.prepare(found)
        if world.is_main:
            checkpoint.require_space(self.folder.checkpoints, self.memory.saved, config.checkpoint.keep)
            self.metrics_file = MetricsFile(self.folder.metrics, self.step)
            self.anomalies_file = MetricsFile(self.folder.anomalies, self.step)
            self.folder.record_start(self.step, world.size, world.device)
            self.progress = Progress(config.log.progress, self.task.name, self.step, self.target)
        micro = accumulation(config, world.size)
        how = "" if world.size == 1 else f" {config.parallel}"
        self.say(
            f"{self.task.name}: step {self.step} to {self.target} of {self.total}, batch {config.batch_size} = "
            f"{world.size} {world.device.type}{how} x {micro} x {-(-config.batch_size // world.size // micro)}, "
            f"{self.precision}, run folder {self.folder.path}"
        )
        report = self.folder.path / f"hang_rank{world.rank}.txt"
        where = f"rank {world.rank} of {world.size}"
        self.watchdog = Watchdog(
            report, config.hang_timeout_s, lambda: f"{where} stands still, {self.doing}, {self.step} steps done"
        )
        return self.loop()

    def prepare(self, found: Checkpoint | None) -> None:
        """Build everything that trains, and put the checkpoint `found` into it."""
        config, world = self.config, self.world
        if config.cuda_graph:
            check_cuda_graph(config, world, self.task)
        torch.manual_seed(config.seed)
        self.bare = self.task.build(config, world)
        samples = self.task.num_samples()
        self.identity = {"num_samples": samples, **self.task.identity()}
        before = self.identity if found is None else found.state["identity"]
        if changed := [name for name in before if before[name] != self.identity.get(name)]:
            pairs = ", ".join(f"{name} {before[name]}, now {self.identity.get(name)}" for name in changed)
            raise ValueError(
                f"the run in {self.folder.path} began with {pairs}; restore what it was trained on, or start anew with "
                "--fresh"
            )
        self.steps_per_epoch, self.total, self.warmup = run_length(config, samples)
        self.target = min(self.total, config.max_steps or self.total)
        blocks = self.task.blocks(self.bare)
        if config.parallel == "fsdp2" and not self.task.can_shard:
            raise ValueError(f"--parallel fsdp2: {self.task.name} cannot be split; use --parallel ddp")
        split = config.parallel == "fsdp2" and world.size > 1
        self.plain = copy.deepcopy(self.bare).cpu() if split else None
        recorder = CudaRecorder(world.device) if config.cuda_graph and config.replay is None else None
        with recorder.on_its_stream() if recorder else contextlib.nullcontext():
            self.model = parallel.spread(self.bare, blocks, world, config.parallel, accumulation(config, world.size))
        if config.compile:
            parallel.compile_blocks(blocks)
        groups = self.task.parameter_groups(self.bare, config.optim.weight_decay)
        self.optimizer = build_optimizer(groups, config.optim)
        self.precision = precision_of(config, world.device)
        self.scaler = LossScaler(world.device, enabled=self.precision == "fp16")
        self.ema = self.copy_weights() if config.optim.ema_decay is not None else None
        self.work = TrainStep(self.task, config, world, self.bare, self.model, self.optimizer, self.scaler, self.ema)
        if recorder is not None:
            self.work.record_with(recorder)
        self.interval, self.anomalies = Interval(world), Anomalies(world)
        self.memory = memory.state_memory(self.bare, groups, self.ema)
        wish = config.checkpoint.background
        background = wish == "on" or (wish == "auto" and world.device.type == "cuda")
        self.writer = CheckpointWriter(
            self.folder.checkpoints, config.checkpoint.keep, world, background, split, self.say
        )
        if found is not None:
            self.restore(found)

    def already_finished(self, found: Checkpoint) -> RunResult:
        total = found.state["total_steps"]
        more = f"trains on to step N (of {total})" if found.step < total else "stops a run early"
        self.say(
            f"{self.folder.path}: this run is complete at step {found.step}; --fresh starts anew (and moves this run "
            f"aside), --max-steps N {more}"
        )
        return RunResult(0, found.step, dict(found.state.get("metrics", {})))

    def loop(self) -> RunResult:
        config, task = self.config, self.task
        micro = accumulation(config, self.world.size)
        requests = requests_of(self.step, self.target, self.steps_per_epoch, config, self.world.rank, self.world.size)
        batches = iter(task.batches(requests))
        self.model.train()
        self.started = self.interval_started = time.perf_counter()
        self.first_step, self.waited = self.step, 0.0
        vote = Vote.GO
        while self.step < self.target and vote is Vote.GO:
            before = time.perf_counter()
            self.doing = "waiting for data"
            try:
                group = [next(batches) for _ in range(micro)]
            except Exception:
                if self.world.size == 1 and self.step > self.saved_step:  # saving together needs the other ranks
                    self.save()
                    self.settle()
                raise
            self.waited += time.perf_counter() - before
            self.doing = "training"
            self.train_step(group)
            del group
            self.step += 1
            if self.watchdog is not None:
                self.watchdog.beat()
            vote = self.stop.poll(self.writer.failed())
            if vote is Vote.FAILED:
                self.settle()
            if self.progress is not None:
                self.progress.advance(self.step)
            last = self.step == self.target
            if last or self.step % config.log.every_steps == 0:
                self.log()
            if last or (config.eval_every and self.step % config.eval_every == 0):
                self.evaluate()
            if last or vote is Vote.STOP or self.step % config.checkpoint.every_steps == 0:
                self.save()
        self.stop.drain()
        self.settle()
        if self.step < self.target:
            self.say(
                f"stopped by a signal: saved step {self.step}; the same command continues (exit code {EXIT_RESUME})"
            )
            return RunResult(EXIT_RESUME, self.step, self.last_line)
        self.finish()
        return RunResult(0, self.step, self.last_line)

    def train_step(self, group: list[Any]) -> None:
        """One optimizer step from this rank's micro-batches. Nothing here waits for the device."""
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config.optim, self.total, self.warmup))
        done = self.work(group, self.step)
        self.interval.add(done.loss, done.sums, done.norm, done.found_inf)
        self.anomalies.add(done.global_loss, done.loss, done.norm, done.found_inf, done.searching)
        torch.manual_seed(seed_of(self.config.seed, self.step))
        self.task.after_step(self.bare, self.step)

    def log(self) -> None:
        """Read the interval (the only wait for the device), write its line.

        A run that stops inside an interval reports it, but hands it on unread to whoever continues.
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
        found = self.anomalies.read(self.step)
        if self.metrics_file is not None and self.progress is not None:
            self.metrics_file.write(line)
            self.progress.interval(line, self.task.sample_noun, eta)
        self.report(found)
        limit = self.config.optim.max_skipped_steps
        if values["longest_skipped"] > limit:
            saved = checkpoint.list_checkpoints(self.folder.checkpoints)
            raise PersistentNonFiniteGradients(
                f"the gradient was not finite in {values['longest_skipped']} steps in a row up to step {self.step} "
                f"({self.skipped} skipped in all; --optim.max-skipped-steps {limit}); weights are unharmed, the last "
                f"checkpoint is {saved[-1].name if saved else 'none'}; --replay {self.step} says where it began; lower "
                "--optim.lr or use --precision bf16"
            )

    def report(self, found: list[dict[str, Any]]) -> None:
        """Write down anomalies, and keep what a replay of a step that was not finite needs."""
        if self.anomalies_file is None:
            return
        for entry in found:
            place = located(entry["step"], self.steps_per_epoch, self.config.batch_size)
            if entry["kind"] == "non_finite":
                place["replay_from"] = self.folder.keep_for_replay(entry["step"])
            self.anomalies_file.write(entry | place)
        for kind in sorted({entry["kind"] for entry in found}):
            steps = [str(entry["step"]) for entry in found if entry["kind"] == kind]
            self.say(f"{kind.replace('_', ' ')} at step {', '.join(steps)}: {self.folder.anomalies}")

    def evaluate(self) -> None:
        began, self.doing = time.perf_counter(), "evaluating"
        if self.watchdog is not None:
            self.watchdog.pause()
        torch.manual_seed(seed_of(self.config.seed, self.step))
        precision = autocast(self.world.device, self.precision)
        with parallel.evaluated(self.bare, self.ema, self.plain) as model, torch.no_grad(), precision:
            model.eval()
            result = self.task.evaluate(model, self.step)
        self.model.train()
        if result:
            self.last_line = self.last_line | result
            if self.metrics_file is not None:
                self.metrics_file.write({"kind": "evaluation", "step": self.step, **result})
            self.say(f"step {self.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in result.items()))
        self.interval_started += time.perf_counter() - began  # throughput is that of training

    def copy_weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.bare.named_parameters()}

    def save(self) -> None:
        """Checkpoint of this step; the sums of the open interval are part of it."""
        began, self.doing = time.perf_counter(), "saving"
        state = {
            "total_steps": self.total,
            "identity": self.identity,
            "epoch": self.step // self.steps_per_epoch,
            "world_size": self.world.size,
            "precision": self.precision,
            "interval": self.interval.state(),
            "anomalies": self.anomalies.state(self.step),
            "skipped": self.skipped,
            "scaler": self.scaler.state(),
            "metrics": self.last_line,
        }
        self.writer.save(self.step, files_of(self.bare, self.optimizer, self.ema), state)
        self.saved_step = self.step
        if not self.writer.background:
            self.settle()
        self.interval_started += time.perf_counter() - began

    def settle(self) -> None:
        """Wait until what was saved is on the disk; raises, on every rank, where it could not be written."""
        self.writer.join()
        if self.world.any(self.writer.failed()):
            raise self.writer.failure or OSError("another rank could not write the checkpoint; its message says why")

    def restore(self, found: Checkpoint) -> None:
        """Put a checkpoint into model, optimizer, EMA, scaler, interval and counters."""
        restore_files(found, self.bare, self.optimizer, self.ema)
        state = found.state
        self.scaler.load(state["scaler"])
        self.interval.load(state["interval"])
        if "anomalies" in state:
            self.anomalies.load(state["anomalies"])
        self.skipped = int(state["skipped"])
        self.last_line = dict(state["metrics"])
        self.step = self.saved_step = found.step
        self.say(f"continuing {found.path}")

    def out_of_memory(self, error: BaseException) -> memory.OutOfMemory:
        size = accumulation(self.config, self.world.size)
        share = -(-self.config.batch_size // self.world.size // size)
        return memory.explained(error, self.config, self.world, share, self.memory)

    def finish(self) -> None:
        """Pictures and exports of a run that reached its target."""
        if self.watchdog is not None:
            self.watchdog.pause()
        with parallel.evaluated(self.bare, self.ema, self.plain) as model:
            if self.world.is_main:
                self.task.finish(model, self.folder.path)
        if self.world.is_main:
            from beit_fast.visualize.run_report import write_report

            took = duration(time.perf_counter() - self.started)
            self.say(f"complete: step {self.step} in {took}; report {write_report(self.folder.path)}")
        self.world.barrier()
