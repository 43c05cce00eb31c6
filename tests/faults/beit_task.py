"""A real, small BEiT in pre-training, on images and tokens that are a function of (seed, epoch, position)."""

import time
from dataclasses import dataclass, replace

import torch

from beit_fast.models import BeitConfig, BeitForMaskedImageModeling
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig, RunConfig, free
from beit_fast.train.schedules import seed_of
from beit_fast.train.task import StepOutput, Task


@dataclass(frozen=True, kw_only=True)
class BeitTaskConfig(RunConfig):
    """A run of the small BEiT."""

    depth: int = 3
    """Blocks."""
    head_layers: int = 0
    """Of BEiT v2's extra head, which takes the patches after the first block."""
    bad: str | None = free(None)
    """`step,rank,place`: what becomes NaN there: `loss`, `image`, `gradient` (all), or that of the parameter named."""
    stuck: str | None = free(None)
    """`step,rank`: that rank never gets any further."""
    grad_checkpointing: bool = free(False)
    """Recompute activations."""


@dataclass(frozen=True)
class SmallBatch:
    """What `PretrainBatch` holds, without the tokenizer's view."""

    images: torch.Tensor
    mask: torch.Tensor
    visual_tokens: torch.Tensor
    sample_keys: torch.Tensor


class SmallBeit(Task):
    """Masked image modelling with the real model and loss."""

    name = "small_beit"
    can_shard = True

    def build(self, world):
        self.world = world
        architecture = BeitConfig.from_preset(
            "base", "plus", image_size=32, patch_size=8, width=32, depth=self.config.depth, num_heads=4, vocab_size=64,
            drop_path_rate=0.1, head_layers=self.config.head_layers, early_layers=1 if self.config.head_layers else 0,
        )  # fmt: skip
        model = BeitForMaskedImageModeling(architecture)
        model.set_grad_checkpointing(self.config.grad_checkpointing)
        self.step = -1
        where = self.at(self.config.bad)
        for name, parameter in model.named_parameters():
            if where is not None and where[2] == name:
                parameter.register_hook(lambda g: g * float("nan") if self.is_here(where) else g)
        return model.to(world.device)

    @staticmethod
    def at(text):
        if text is None:
            return None
        step, rank, *place = text.split(",")
        return int(step), int(rank), *place

    def is_here(self, where):
        return where is not None and (self.step, self.world.rank) == where[:2]

    def num_samples(self):
        return 60

    def batches(self, requests):
        for request in requests:
            samples = [self.sample(request.epoch, int(p)) for p in request.positions]
            yield SmallBatch(*map(torch.stack, zip(*samples, strict=True)))

    def sample(self, epoch, position):
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, epoch, position))
        image = torch.randn(3, 32, 32, generator=generator)
        mask = torch.zeros(16, dtype=torch.bool)
        mask[torch.randperm(16, generator=generator)[:6]] = True
        tokens = (image.mean(0).unfold(0, 8, 8).unfold(1, 8, 8).mean((2, 3)).flatten() * 40).long().clamp(-32, 31) + 32
        return image, mask, tokens, torch.tensor(seed_of(7, epoch, position))

    def num_targets(self, batch):
        return int(batch.mask.sum())

    def prepare(self, batch, step):
        self.step = step
        if self.is_here(self.at(self.config.stuck)):
            time.sleep(600)
        if self.is_here(self.at(self.config.bad)) and self.at(self.config.bad)[2] == "image":
            batch = replace(batch, images=batch.images * float("nan"))
        return batch

    def loss(self, model, batch, num_targets):
        tokens = batch.visual_tokens[batch.mask]
        output = model(batch.images, batch.mask, tokens, batch.sample_keys, num_targets)
        loss = output.loss
        where = self.at(self.config.bad)
        if self.is_here(where) and where[2] == "loss":
            loss = loss * float("nan")
        if self.is_here(where) and where[2] == "gradient":
            loss.register_hook(lambda g: g * float("nan"))
        return StepOutput(loss, {"correct": output.num_correct})

    def evaluate(self, model, step):
        images, mask, tokens, _ = map(torch.stack, zip(*(self.sample(10**6, p) for p in range(4)), strict=True))
        return {"held_out_loss": float(model(images, mask, tokens).loss)}


TASK = SmallBeit
RECIPE = BeitTaskConfig(
    batch_size=12,
    batch_per_device=12,
    steps=12,
    optim=OptimConfig(lr=1e-2, warmup_steps=2, ema_decay=0.9),
    checkpoint=CheckpointConfig(every_steps=4),
    log=LogConfig(every_steps=1, progress="lines"),
)

if __name__ == "__main__":
    from beit_fast.cli.train import main

    torch.set_num_threads(1)
    main(RECIPE, SmallBeit)
