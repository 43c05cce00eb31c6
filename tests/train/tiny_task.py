"""The engine's test task: a real, small network on data that is a function of (seed, epoch, position).

As a program it is a recipe: `python tiny_task.py --output-dir runs/x --steps 12`.
"""

import json
import os
import signal
import time
from dataclasses import dataclass, field

import torch
import torch._dynamo  # an optimizer's first step imports it: once here instead of in every forked process
from torch import nn
from torch.nn.functional import cross_entropy

from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig, RunConfig, free, local
from beit_fast.train.schedules import seed_of
from beit_fast.train.task import StepOutput, Task


@dataclass(frozen=True, kw_only=True)
class TinyConfig(RunConfig):
    """A run of the tiny task."""

    samples: int = 40
    """Samples per epoch."""
    width: int = 16
    """Hidden width."""
    dropout: float = 0.0
    """Dropout, which draws from torch's generator."""
    bad_steps: tuple[int, ...] = field(default=(), metadata={"free": True})
    """Steps whose loss is not finite."""
    step_s: float = free(0.0)
    """Seconds to sleep per step."""
    slow_s: float = free(0.0)
    """Seconds that opening the data takes, and every evaluation."""
    bad_evaluation: int | None = free(None)
    """Step whose evaluation fails."""
    bad_rank: int | None = free(None)
    """Rank on which it does; None: on all."""
    signal_at: int | None = local(None)
    """Step at which the process sends itself SIGTERM."""


@dataclass(frozen=True)
class TinyBatch:
    """Targets of several samples, one after the other."""

    features: torch.Tensor
    targets: torch.Tensor

    def __len__(self):
        return len(self.targets)


class TinyTask(Task):
    """Each sample has one to four targets, so the split of a batch would show in a loss normalised per micro-batch."""

    name = "tiny"
    sample_noun = "samples"
    can_shard = True

    def __init__(self, config):
        super().__init__(config)
        self.closed = False
        self.seen = []

    def build(self, world):
        self.world, width = world, self.config.width
        self.be_slow()
        layers = [nn.Linear(8, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(self.config.dropout)]
        model = nn.Sequential(*layers, nn.Linear(width, 10))
        model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        return model.to(world.device)

    def be_slow(self):
        for _ in range(round(self.config.slow_s / 0.01)):
            time.sleep(0.01)

    def num_samples(self):
        return self.config.samples

    def batches(self, requests):
        for request in requests:
            samples = [self.sample(request.epoch, int(p)) for p in request.positions]
            self.seen.append((request.epoch, request.positions.tolist()))
            yield TinyBatch(torch.cat([s[0] for s in samples]), torch.cat([s[1] for s in samples]))

    def sample(self, epoch, position):
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, epoch, position))
        targets = int(torch.randint(1, 5, (), generator=generator))
        features = torch.randn(targets, 8, generator=generator)
        return features, (features @ torch.linspace(-1, 1, 8) * 2).long().clamp(-4, 5) + 4

    def prepare(self, batch, step):
        assert not torch.is_grad_enabled()
        if self.config.step_s:
            time.sleep(self.config.step_s)
        if step == self.config.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.bad = step in self.config.bad_steps
        return batch

    def loss(self, model, batch, num_targets):
        logits, targets = model(batch.features), batch.targets
        loss = cross_entropy(logits.float(), targets, reduction="sum") / num_targets
        if self.bad:
            loss = loss * float("nan")
        correct = (logits.argmax(-1) == targets).sum()
        return StepOutput(loss, {"correct": correct, "targets": torch.tensor(len(targets))})

    def after_step(self, model, step):
        model.steps += 1

    def summarise(self, sums):
        return {"accuracy": sums["correct"] / sums["targets"]}

    def evaluate(self, model, step):
        assert not model.training
        self.be_slow()
        if step == self.config.bad_evaluation and self.config.bad_rank in (None, self.world.rank):
            raise FileNotFoundError("the validation images vanished")
        features, targets = self.sample(10**6, 0)
        share = cross_entropy(model(features).float(), targets) / self.world.size
        return {"held_out_loss": float(self.world.sum(share))}

    def finish(self, model, folder):
        (folder / "model").mkdir()
        sums = {name: float(value.double().sum()) for name, value in model.state_dict().items()}
        (folder / "model" / "sums.json").write_text(json.dumps(sums))
        (folder / "table.tsv").write_text("step\tsteps\n" * 2000)

    def close(self):
        self.closed = True


TASK = TinyTask
RECIPE = TinyConfig(
    batch_size=8,
    batch_per_device=8,
    steps=12,
    optim=OptimConfig(lr=1e-2, warmup_epochs=0.4),
    checkpoint=CheckpointConfig(every_steps=3),
    log=LogConfig(every_steps=2, progress="lines"),
)

if __name__ == "__main__":
    from beit_fast.cli.train import main

    torch.set_num_threads(1)
    main(RECIPE, TinyTask)
