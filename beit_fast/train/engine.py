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
from torch import Tensor, nn

from beit_fast.train import checkpoint
from beit_fast.train.batching import accumulation, requests_of, seed_of
from beit_fast.train.checkpoint import Checkpoint
from beit_fast.train.config import RunConfig
from beit_fast.train.distributed import StopSignal, World, end_world, start_world, wrap
from beit_fast.train.metrics import Interval, MetricsFile, peak_memory_mib
from beit_fast.train.optim import (
    LossScaler,
    build_optimizer,
    expected_optimizer_bytes,
    load_optimizer_state,
    optimizer_state,
    optimizer_step,
    set_learning_rate,
)
from beit_fast.train.progress import Progress, duration
from beit_fast.train.run_folder import RunFolder
from beit_fast.train.schedules import learning_rate, run_length
from beit_fast.train.task import Task

EXIT_RESUME = 75
"""EX_TEMPFAIL of sysexits.h: saved on a signal; the same command continues."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
        with contextlib.closing(_Run(task, config, world, folder)) as job:
            return job.go()
    finally:
        task.close()
        folder.release()
        end_world(world)


def check(config: RunConfig) -> None:
    """What can be said of a configuration before anything is started."""
    for name in ("batch_size", "batch_per_device"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}, it must be at least 1")
    for name, value in (("--checkpoint.every-steps", config.checkpoint.every_steps),
                        ("--log.every-steps", config.log.every_steps),
                        ("--max-steps", config.max_steps), ("--steps", config.steps),
                        ("--eval-every", config.eval_every)):  # fmt: skip
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, it must be at least 1")
    if config.checkpoint.keep < 2:
        raise ValueError("--checkpoint.keep must be at least 2: a damaged checkpoint needs a predecessor")


def check_world(config: RunConfig, world: World) -> None:
    if config.batch_size % world.size:
        raise ValueError(f"--batch-size {config.batch_size} is not divisible by the {world.size} processes")


def precision_of(config: RunConfig, device: torch.device) -> str:
    """`auto` is bf16 where the GPU has it, fp16 on older GPUs, fp32 on the CPU."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


class _Run:
    """State of one run in one process."""

    def __init__(self, task: Task, config: RunConfig, world: World, folder: RunFolder) -> None:
        self.task, self.config, self.world, self.folder = task, config, world, folder
        self.stop = StopSignal(world)
        self.progress: Progress | None = None
        self.metrics_file: MetricsFile | None = None
        self.last_line: dict[str, Any] = {}
        self.skipped = 0
        self.saved_step = 0

    def close(self) -> None:
        self.stop.close()
        if self.progress is not None:
            self.progress.close()
        if self.metrics_file is not None:
            self.metrics_file.close()

    def say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)
        elif self.world.is_main and self.config.log.progress != "none":
            print(text, flush=True)

    def go(self) -> RunResult:
        config, world = self.config, self.world
        found, notes = self.folder.newest() if world.is_main else (None, [])
        world.barrier()
        if not world.is_main:
            found, _ = checkpoint.newest_checkpoint(self.folder.checkpoints)
        for note in notes:
            self.say(note)
        if found is not None and found.step >= min(found.state["total_steps"], config.max_steps or 2**62):
            return self.already_finished(found)

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
        self.model = wrap(self.bare, world)
        groups = self.task.parameter_groups(self.bare, config.optim.weight_decay)
        self.optimizer = build_optimizer(groups, config.optim)
        self.precision = precision_of(config, world.device)
        self.scaler = LossScaler(world.device, enabled=self.precision == "fp16")
        self.ema = self.copy_weights() if config.optim.ema_decay is not None else None
        self.interval = Interval(world)
        self.step = self.restore(found) if found is not None else 0
        if world.is_main:
            state_bytes = expected_optimizer_bytes(groups) + checkpoint.tensor_bytes(self.bare.state_dict())
            checkpoint.require_space(
                self.folder.checkpoints, state_bytes + checkpoint.tensor_bytes(self.ema or {}), config.checkpoint.keep
            )
            self.metrics_file = MetricsFile(self.folder.metrics, self.step)
            self.folder.record_start(self.step, world.size, world.device)
            self.progress = Progress(config.log.progress, self.task.name, self.step, self.target)
        micro = accumulation(config, world.size)
        self.say(
            f"{self.task.name}: step {self.step} to {self.target} of {self.total}, batch {config.batch_size} = "
            f"{world.size} {world.device.type} x {micro} x {-(-config.batch_size // world.size // micro)}, "
            f"{self.precision}, run folder {self.folder.path}"
        )
        return self.loop()

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
        stopping = False
        while self.step < self.target and not stopping:
            before = time.perf_counter()
            try:
                group = [next(batches) for _ in range(micro)]
            except Exception:
                if self.world.size == 1 and self.step > self.saved_step:  # saving together needs the other ranks
                    self.save()
                raise
            self.waited += time.perf_counter() - before
            self.train_step(group)
            del group
            self.step += 1
            stopping = self.stop.poll() and self.step < self.target
            if self.progress is not None:
                self.progress.advance(self.step)
            last = self.step == self.target
            if last or self.step % config.log.every_steps == 0:
                self.log()
            if last or (config.eval_every and self.step % config.eval_every == 0):
                self.evaluate()
            if last or stopping or self.step % config.checkpoint.every_steps == 0:
                self.save()
        self.stop.drain()
        if stopping:
            self.say(
                f"stopped by a signal: saved step {self.step}; the same command continues (exit code {EXIT_RESUME})"
            )
            return RunResult(EXIT_RESUME, self.step, self.last_line)
        self.finish()
        return RunResult(0, self.step, self.last_line)

    def train_step(self, group: list[Any]) -> None:
        """One optimizer step from this rank's micro-batches. Nothing here waits for the device."""
        world, step, device = self.world, self.step, self.world.device
        counts = [torch.as_tensor(self.task.num_targets(b), dtype=torch.float64, device=device) for b in group]
        num_targets = (world.sum(torch.stack(counts).sum()) / world.size).float()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(group):
            torch.manual_seed(seed_of(self.config.seed, step, world.rank, index))
            with torch.no_grad():
                ready = self.task.prepare(batch, step)
            last = index == len(group) - 1
            quiet = contextlib.nullcontext() if last or world.size == 1 else self.model.no_sync()  # type: ignore[operator]
            with quiet:
                with self.autocast():
                    output = self.task.loss(self.model, ready, num_targets)
                (output.loss * self.scaler.scale).backward()
            loss = loss + output.loss.detach()
            sums = {name: value.detach() + sums.get(name, 0) for name, value in output.sums.items()}
        optim = self.config.optim
        set_learning_rate(self.optimizer, learning_rate(step, optim, self.total, self.warmup))
        norm, found_inf = optimizer_step(self.optimizer, self.scaler.scale, optim.clip_grad)
        self.scaler.update(found_inf)
        if self.ema is not None and optim.ema_decay is not None:
            weight = (1 - optim.ema_decay) * (1 - found_inf)
            with torch.no_grad():
                for name, parameter in self.bare.named_parameters():
                    self.ema[name].lerp_(parameter, weight)
        self.interval.add(loss, sums, norm, found_inf)
        torch.manual_seed(seed_of(self.config.seed, step))
        self.task.after_step(self.bare, step)

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype != torch.float32)

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
        if self.metrics_file is not None and self.progress is not None:
            self.metrics_file.write(line)
            self.progress.interval(line, self.task.sample_noun, eta)
        limit = self.config.optim.max_skipped_steps
        if values["longest_skipped"] > limit:
            saved = checkpoint.list_checkpoints(self.folder.checkpoints)
            raise PersistentNonFiniteGradients(
                f"the gradient was not finite in {values['longest_skipped']} steps in a row up to step {self.step} "
                f"({self.skipped} skipped in all; --optim.max-skipped-steps {limit}); weights are unharmed, the last "
                f"checkpoint is {saved[-1].name if saved else 'none'}; lower --optim.lr or use --precision bf16"
            )

    def evaluate(self) -> None:
        began = time.perf_counter()
        model = self.averaged_model()
        model.eval()
        torch.manual_seed(seed_of(self.config.seed, self.step))
        with torch.no_grad(), self.autocast():
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

    def averaged_model(self) -> nn.Module:
        """The model itself, or a copy with the averaged weights where an EMA is kept."""
        if self.ema is None:
            return self.bare
        model = copy.deepcopy(self.bare)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.ema[name])
        return model

    def save(self) -> None:
        """Checkpoint of this step, by rank 0; the sums of the open interval are part of it."""
        began = time.perf_counter()
        state = {
            "total_steps": self.total,
            "identity": self.identity,
            "epoch": self.step // self.steps_per_epoch,
            "world_size": self.world.size,
            "precision": self.precision,
            "interval": self.interval.state(),
            "skipped": self.skipped,
            "scaler": self.scaler.state(),
            "metrics": self.last_line,
        }
        if self.world.is_main:
            files = {"model": self.bare.state_dict(), "optimizer": optimizer_state(self.optimizer)}
            if self.ema is not None:
                files["ema"] = self.ema
            path = checkpoint.save_checkpoint(
                self.folder.checkpoints, self.step, files, state, self.config.checkpoint.keep
            )
            size = checkpoint.mib(sum(checkpoint.tensor_bytes(tensors) for tensors in files.values()))
            self.say(f"saved {path.name} ({size} in {duration(time.perf_counter() - began)})")
        self.saved_step = self.step
        self.world.barrier()
        self.interval_started += time.perf_counter() - began

    def restore(self, found: Checkpoint) -> int:
        """Put a checkpoint into model, optimizer, EMA, scaler and interval; returns its step."""
        checkpoint.copy_into(self.bare.state_dict(), found.tensors("model"), "the model")
        load_optimizer_state(self.optimizer, dict(found.tensors("optimizer")))
        if self.ema is not None:
            if not found.has("ema"):
                raise ValueError(f"{found.path} holds no averaged weights, but --optim.ema-decay asks to continue them")
            checkpoint.copy_into(self.ema, found.tensors("ema"), "the averaged weights")
        self.scaler.load(found.state["scaler"])
        self.interval.load(found.state["interval"])
        self.skipped = int(found.state["skipped"])
        self.last_line = dict(found.state["metrics"])
        self.saved_step = found.step
        self.say(f"continuing {found.path}")
        return found.step

    def finish(self) -> None:
        """Pictures and exports of a run that reached its target."""
        if self.world.is_main:
            self.task.finish(self.averaged_model(), self.folder.path)
            from beit_fast.visualize.run_report import write_report

            took = duration(time.perf_counter() - self.started)
            self.say(f"complete: step {self.step} in {took}; report {write_report(self.folder.path)}")
        self.world.barrier()
