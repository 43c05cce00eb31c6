"""A model on several processes: DDP, or FSDP2 for models beyond one card; and regional compilation.

Both average the gradients of the ranks, so that losses and weights agree to rounding.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from beit_fast.models.backbone import BeitBackbone
from beit_fast.nn import Block
from beit_fast.train.distributed.world import World

BUCKET_MIB = 50  # 25 are DDP's default; fewer, larger reductions cost less where a block has 50 MB of gradients


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile what a block computes, once for all blocks of equal shapes: minutes less than compiling the whole model.

    Each is compiled as a function of its own weights, so it does not matter whether DDP or FSDP2 holds those.
    """
    if not blocks:
        raise ValueError("--compile compiles block by block, and this model has no blocks")
    for block in blocks:
        if isinstance(block, Block):  # what a pass calls of it where it can
            block.forward_fused = torch.compile(block.forward_fused)  # type: ignore[method-assign]
        else:
            block.forward = torch.compile(block.forward)


def parallelise(
    model: nn.Module, blocks: Sequence[nn.Module], world: World, kind: Literal["ddp", "fsdp2"], accumulation: int
) -> nn.Module:
    """The module to call in training: `model` itself on one process, else wrapped by DDP, or split in place (FSDP2)."""
    if world.size == 1:
        return model
    if kind == "fsdp2":
        return shard(model, blocks, world)
    ids = [world.device.index] if world.device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel
    # renamed in torch 2.13; buffers are the same on every rank anyway
    sync = "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
    # A static graph needs no search for unused parameters and no order of buckets to be found anew. It cannot begin
    # with a micro-batch that is not reduced, so accumulation goes without.
    if accumulation == 1:
        model.register_forward_hook(check_output)
    options: dict[str, Any] = {sync: False, "static_graph": accumulation == 1}
    return ddp(model, device_ids=ids, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MIB, **options)


def check_output(model: nn.Module, inputs: Any, output: Any) -> None:
    """TypeError where DDP would not see a tensor in what the model returns: its gradients would not be reduced."""
    for leaf in tree_leaves(output):
        if not isinstance(leaf, (Tensor, int, float, bool, str, type(None))):
            raise TypeError(
                f"{type(model).__name__} returns a {type(leaf).__name__}, in which DDP finds no tensors: return "
                "tensors or tuples, or register the class with torch.utils._pytree.register_dataclass"
            )


def shard(model: nn.Module, blocks: Sequence[nn.Module], world: World) -> nn.Module:
    """Split every parameter over the ranks, gathered block by block while it is used.

    The last block stays with the root, which is gathered once per step: pre-training reads it in two pieces.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in model.modules():
        if isinstance(module, BeitBackbone):
            module.bias_within_blocks = True
    for block in blocks[:-1]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # in place
    return model


def is_split(model: nn.Module) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a split tensor; any other tensor itself."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """A split tensor, gathered on every rank (all of them have to call it); any other tensor itself."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


@torch.no_grad()
def average(averages: Mapping[str, Tensor], model: nn.Module, weight: Tensor) -> None:
    """Move every average by `weight` (0-d) of the way towards its parameter; of split ones, this rank's part."""
    for name, parameter in model.named_parameters():
        local(averages[name]).lerp_(local(parameter), weight)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass of a model on several ranks reduces its gradients over them."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = enabled  # what its no_sync() sets
    else:
        sharded: Any = model
        sharded.set_requires_gradient_sync(enabled)


@contextlib.contextmanager
def evaluation_model(
    model: nn.Module, average: Mapping[str, Tensor] | None, unsplit: nn.Module | None
) -> Iterator[nn.Module]:
    """A module with the weights to evaluate: those of `model`, or `average` in their place.

    A split model is gathered into a copy of `unsplit` (what it was before), so that every rank can evaluate its share
    of the data at its own pace. Otherwise the average changes places with the weights, bit for bit, and back.
    """
    if unsplit is not None:
        copied = copy.deepcopy(unsplit).to(next(model.parameters()).device)
        targets = copied.state_dict()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                targets[name].copy_(whole((average or {}).get(name, tensor)))
        yield copied
        return
    exchange(model, average)
    try:
        yield model
    finally:
        exchange(model, average)


@torch.no_grad()
def exchange(model: nn.Module, average: Mapping[str, Tensor] | None) -> None:
    """Swap the values of the parameters and of their averages."""
    if average is not None:
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.copy_(average[name])
            average[name].copy_(kept)
