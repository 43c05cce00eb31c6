"""Anomalous steps: detected on the device without waiting for it, written down when a line is logged.

Not finite: the loss of any rank, or the gradient; such a step changes nothing. Spike: the loss, or the logarithm of the
gradient's norm, lies more than `SIGMAS` standard deviations above its running mean; such a step counts like any other.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_fast.train.checkpoint.format import list_checkpoints
from beit_fast.train.distributed.world import World

SIGMAS = 6.0
MEMORY_STEPS = 200
"""Time constant of the running means, and the steps before the first spike can be called one."""
SLOTS = 16
"""Anomalies kept between two lines of the log; more are counted."""
KINDS = ("", "non_finite", "loss_spike", "gradient_spike")


class PersistentNonFiniteGradients(RuntimeError):
    """Too many steps in a row had a gradient that was not finite."""


class Anomalies:
    """Running statistics and the anomalies since the last `read`, in fp64 on the device; the same on every rank."""

    def __init__(self, world: World) -> None:
        self._world = world
        device = world.device
        self._steps = torch.zeros((), dtype=torch.float64, device=device)  # clean steps that the statistics have seen
        self._mean = torch.zeros(2, dtype=torch.float64, device=device)  # of the loss, of the log gradient norm
        self._variance = torch.zeros(2, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        # per anomaly: steps since the last read, kind, loss, gradient norm, this rank's own loss, mean, deviation
        self._slots = torch.zeros(SLOTS, 7, dtype=torch.float64, device=device)
        self._numbers = torch.arange(SLOTS, device=device)
        self._since = torch.zeros((), dtype=torch.float64, device=device)
        self._carried: list[dict[str, Any]] = []

    def add(self, loss: Tensor, own_loss: Tensor, norm: Tensor, found_inf: Tensor, expected: Tensor) -> None:
        """One step: the global loss, this rank's share of it, the gradient's norm, and whether it was skipped.

        `expected`: skipped as a matter of course, which is not written down.
        """
        loss, own, norm = loss.double(), own_loss.double(), norm.double()
        bad = found_inf > 0
        values = torch.stack([loss, norm.clamp_min(1e-30).log()])
        deviation = self._variance.sqrt()
        known = (self._steps >= MEMORY_STEPS) & ~bad
        # a deviation of nearly nothing (a constant loss) is none to measure with
        high = known & (values - self._mean > SIGMAS * deviation.clamp_min(1e-6 * self._mean.abs()))
        kind = torch.where(bad, (expected <= 0).long(), torch.where(high[0], 2, torch.where(high[1], 3, 0)))
        self._since = self._since + 1
        # not indexed by a tensor without dimensions: the host would wait for its value
        of_norm = kind == 3
        mean = torch.where(of_norm, self._mean[1], self._mean[0])
        row_deviation = torch.where(of_norm, deviation[1], deviation[0])
        row = torch.stack([self._since, kind.double(), loss, norm, own, mean, row_deviation])
        self._slots = torch.where(((self._numbers == self._count) & (kind > 0))[:, None], row, self._slots)
        self._count = self._count + (kind > 0)
        # a spike enters the statistics cut off at what is still ordinary, so that it does not excuse the next one
        ordinary = torch.minimum(values, torch.where(known, self._mean + SIGMAS * deviation, values))
        weight = torch.clamp(1 / (self._steps + 1), min=1 / MEMORY_STEPS)
        change = torch.where(bad, torch.zeros_like(values), ordinary - self._mean)
        self._mean = self._mean + weight * change
        self._variance = torch.where(bad, self._variance, (1 - weight) * (self._variance + weight * change.square()))
        self._steps = self._steps + (~bad).double()

    def _unread(self, step: int) -> list[dict[str, Any]]:
        """The anomalies since the last read, as JSON values; waits for the device, and for the other ranks."""
        count = int(self._count.item())
        if not count:
            return []
        losses = self._slots.new_zeros(SLOTS, self._world.size)
        losses[:, self._world.rank] = self._slots[:, 4]
        by_rank, since = self._world.sum(losses).tolist(), int(self._since.item())
        entries = []
        for (when, kind, loss, norm, _, mean, deviation), own in zip(
            self._slots.tolist()[:count], by_rank, strict=False
        ):
            entry = {"kind": KINDS[int(kind)], "step": step - since + int(when), "loss": loss, "grad_norm": norm}
            if kind == 1:
                entry["loss_by_rank"] = [str(value) for value in own]
            else:
                entry |= {"running_mean": mean, "running_deviation": deviation}
            entries.append(entry)
        if count > SLOTS:
            entries.append({"kind": "more", "step": step, "count": count - SLOTS})
        return entries

    def read(self, step: int) -> list[dict[str, Any]]:
        """The anomalies up to step number `step` that no read has given before."""
        entries, self._carried = self._carried + self._unread(step), []
        self._count, self._since = torch.zeros_like(self._count), torch.zeros_like(self._since)
        return entries

    def state(self, step: int) -> dict[str, Any]:
        """For the checkpoint of `step`: JSON values."""
        return {
            "steps": float(self._steps), "mean": self._mean.tolist(), "variance": self._variance.tolist(),
            "unread": self._carried + self._unread(step),
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        device = self._world.device
        self._steps.fill_(state["steps"])
        self._mean = torch.tensor(state["mean"], dtype=torch.float64, device=device)
        self._variance = torch.tensor(state["variance"], dtype=torch.float64, device=device)
        self._carried = list(state["unread"])


class Divergence:
    """Whether the loss has left its level: a recent mean beside a slow one that spikes cannot move. On the device."""

    def __init__(self, world: World) -> None:
        self._levels = torch.full((2,), math.nan, dtype=torch.float64, device=world.device)  # recent, slow
        self.diverged = False

    def add(self, loss: Tensor, found_inf: Tensor) -> None:
        """One step's global loss."""
        loss = loss.double()
        recent, slow = torch.where(self._levels.isnan(), loss, self._levels).unbind()
        usual = torch.minimum(loss, slow + 2 * slow.abs())
        levels = torch.stack([recent + (loss - recent) / 5, slow + (usual - slow) / 100])
        self._levels = torch.where(found_inf > 0, self._levels, levels)

    def state(self, step: int, log: Callable[[str], None]) -> dict[str, Any]:
        """For the checkpoint of `step`, JSON values; says so where the loss has diverged since the last one."""
        recent, slow = self._levels.tolist()
        if math.isnan(recent):
            return {"diverged": False, "levels": None}
        before, self.diverged = self.diverged, recent > slow + 3 * abs(slow)
        if self.diverged and not before:
            log(
                f"the loss rose from about {slow:.4g} to {recent:.4g} up to step {step}: the weights may be ruined; "
                "the last checkpoint before is kept: --resume-from STEP with a lower --optim.lr continues from it"
            )
        return {"diverged": self.diverged, "levels": [recent, slow]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state; runs of before there was one begin anew."""
        self.diverged = bool(state.get("diverged"))
        if state.get("levels") is not None:
            self._levels = torch.tensor(state["levels"], dtype=torch.float64, device=self._levels.device)


def samples_of(step: int, steps_per_epoch: int, batch_size: int) -> dict[str, Any]:
    """The samples of step number `step`: their epoch, and the range of their positions in its order."""
    epoch, within = divmod(step - 1, steps_per_epoch)
    return {"epoch": epoch, "positions": [within * batch_size, (within + 1) * batch_size]}


def check_skipped(values: Mapping[str, Any], limit: int, step: int, total: int, checkpoints: Path) -> None:
    """Raise PersistentNonFiniteGradients where an interval (`Interval.read`) skipped over `limit` steps in a row."""
    if values["longest_skipped"] <= limit:
        return
    saved = list_checkpoints(checkpoints)
    raise PersistentNonFiniteGradients(
        f"the gradient was not finite in {values['longest_skipped']} steps in a row up to step {step} ({total} skipped "
        f"in all; --optim.max-skipped-steps {limit}); those steps changed nothing, the last checkpoint is "
        f"{saved[-1].name if saved else 'none'}; --replay {step} says where it began; lower --optim.lr or use "
        "--precision bf16"
    )
