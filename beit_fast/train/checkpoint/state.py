"""What a checkpoint holds of a run: model, optimizer and averages, as named tensors.

The optimizer's are the same for torch's and apex's AdamW, so a run may continue with the other one: per parameter name
`exp_avg`, `exp_avg_sq` (as the parameter) and `step` (0-d fp32).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast.train.checkpoint.format import Checkpoint
from beit_fast.train.checkpoint.resharding import restore_tensors, saved_names, whole_tensors
from beit_fast.train.distributed.parallel import is_split, local

MOMENTS = ("exp_avg", "exp_avg_sq")


def tensors_to_save(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None
) -> dict[str, Mapping[str, Tensor]]:
    """The live tensors of a run, by file."""
    files: dict[str, Mapping[str, Tensor]] = {"model": model.state_dict(), "optimizer": optimizer_state(optimizer)}
    return files if average is None else files | {"ema": average}


def restore_saved(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None
) -> None:
    """Copy a checkpoint into live tensors, whichever of the two was split over whichever number of ranks.

    Raises:
        ValueError: names or shapes differ, or averages are to be continued and there are none.
    """
    restore_tensors(checkpoint, "model", model.state_dict(), "the model")
    if is_split(model):
        state = empty_optimizer_state(optimizer, saved_names(checkpoint, "optimizer"))
        restore_tensors(checkpoint, "optimizer", state, "the optimizer")
    else:
        load_optimizer_state(optimizer, dict(whole_tensors(checkpoint, "optimizer")))
    if average is not None:
        if not checkpoint.has("ema"):
            raise ValueError(
                f"{checkpoint.path} holds no averaged weights, but --optim.ema-decay asks to continue them"
            )
        restore_tensors(checkpoint, "ema", average, "the averaged weights")


def named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every optimized parameter with its name."""
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state to save, by `<parameter>.<slot>`; tensors are the live ones, not copies."""
    state: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            slots = optimizer.state.get(parameter)
            if slots:  # a parameter that never had a gradient has none
                state |= {f"{name}.{slot}": slots[slot] for slot in MOMENTS}
                step = slots.get("step", group.get("step", 0))  # apex counts per group
                state[f"{name}.step"] = torch.as_tensor(step, dtype=torch.float32)
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put a saved state, of either implementation, into `optimizer`; ValueError where names or shapes differ."""
    known = {f"{name}.{slot}" for name, _ in named_parameters(optimizer) for slot in (*MOMENTS, "step")}
    if surplus := sorted(set(state) - known):
        raise ValueError(f"optimizer state holds {len(surplus)} tensors the model lacks, e.g. {surplus[0]}")
    per_group = not isinstance(optimizer, torch.optim.AdamW)
    if per_group:
        _load_group_steps(optimizer, state)
    for name, parameter in named_parameters(optimizer):
        if f"{name}.step" not in state:
            continue
        slots: dict[str, Any] = {}
        for slot in MOMENTS:
            saved = state[f"{name}.{slot}"]
            if saved.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state {name}.{slot} has shape {tuple(saved.shape)}, not {tuple(parameter.shape)}"
                )
            # strides of the parameter (channels last): the fused step walks all of them as flat memory
            slots[slot] = torch.empty_like(parameter, dtype=torch.float32).copy_(saved)
        if not per_group:
            slots["step"] = state[f"{name}.step"].to(device=parameter.device, dtype=torch.float32, copy=True)
        optimizer.state[parameter] = slots


def _load_group_steps(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """apex counts steps per group."""
    for group in optimizer.param_groups:
        steps = {float(state[f"{name}.step"]) for name in group["names"] if f"{name}.step" in state}
        if len(steps) > 1:
            raise ValueError(
                f"apex counts steps per group, but this state has counts from {min(steps):g} to {max(steps):g} in one "
                "group; continue it with --optim.impl torch"
            )
        if steps:
            group["step"] = int(steps.pop())


def empty_optimizer_state(optimizer: torch.optim.Optimizer, names: set[str]) -> dict[str, Tensor]:
    """Give AdamW the state that `optimizer_state` calls by these names, as live tensors to be filled.

    Unlike `load_optimizer_state` it needs no whole tensor: with FSDP2 every rank has just its part.
    """
    for name, parameter in named_parameters(optimizer):
        if f"{name}.step" in names:
            moments = {slot: torch.zeros_like(parameter, dtype=torch.float32) for slot in MOMENTS}
            step = torch.zeros((), dtype=torch.float32, device=local(parameter).device)
            optimizer.state[parameter] = {"step": step, **moments}
    return optimizer_state(optimizer)
