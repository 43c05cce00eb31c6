"""Batch norm with the statistics of all processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit_fast.train.distributed.world import World


def synchronised(model: nn.Module, world: World) -> nn.Module:
    """`model` with every batch norm over the batch of all processes; as it is where there is one process.

    On GPUs that is torch's SyncBatchNorm. It has no version for CPUs, so there `CpuSyncBatchNorm` takes its place.
    """
    if world.size == 1:
        return model
    if world.device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm
    return model


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batch of all processes, through sums in float64."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        wide = x.double()
        count = wide.new_tensor([x.numel() / x.shape[1]])
        sums = _Sum.apply(torch.cat([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)), count]))
        number = sums[-1].detach()
        mean, square = (sums[:-1] / number).chunk(2)
        var = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            momentum = self.momentum if self.momentum is not None else 0.1
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_((var * number / (number - 1)).to(self.running_var.dtype), momentum)
        normed = ((wide - mean[:, None, None]) * (var + self.eps).rsqrt()[:, None, None]).to(x.dtype)
        return torch.addcmul(self.bias[:, None, None], normed, self.weight[:, None, None])
