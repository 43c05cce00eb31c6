"""AdamW as BEiT uses it: the official decay groups, on-device skipping of bad steps, torch's or apex's implementation.

The saved form of the state is the same for both implementations (`optimizer_state`): per parameter name `exp_avg`,
`exp_avg_sq` (as the parameter) and `step` (0-d fp32), so a run may continue with the other one.
"""

import importlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from beit_fast.train.distributed.parallel import local, whole

if TYPE_CHECKING:
    from beit_fast.train.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_decayed(name: str, parameter: Tensor, exempt: set[str]) -> bool:
    """BEiT's rule: exempt are 1-D parameters, `*.bias`, and the names the model lists (`pos_embed`, `cls_token`).

    `mask_token` (3-D) and the relative position tables (2-D) are therefore decayed, as in the official code.
    """
    return parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups of `model`'s trainable parameters: decayed, and exempt (see `is_decayed`)."""
    listed = getattr(model, "no_weight_decay", None)
    exempt = set(listed()) if callable(listed) else {"pos_embed", "cls_token"}
    decayed: dict[str, Any] = {"params": [], "names": [], "weight_decay": weight_decay}
    others: dict[str, Any] = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = decayed if is_decayed(name, parameter, exempt) else others
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in (decayed, others) if group["params"]]


def load_apex() -> type[torch.optim.Optimizer]:
    """NVIDIA apex's FusedAdam, or one line that says why not.

    The package index has an unrelated web toolkit called apex; it is told apart by what it lacks.
    """
    advice = (
        "NVIDIA apex is built from its source (https://github.com/NVIDIA/apex, with APEX_CPP_EXT=1 APEX_CUDA_EXT=1); "
        "--optim.impl torch needs nothing"
    )
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise ModuleNotFoundError(f"--optim.impl apex: apex is not installed; {advice}")
    folders = [Path(place) for place in spec.submodule_search_locations or []]
    # The toolkit cannot even be imported without the web framework it extends, so its files are looked at instead.
    if not any((folder / "optimizers").is_dir() for folder in folders):
        where = folders[0] if folders else spec.origin
        raise ModuleNotFoundError(
            f"--optim.impl apex: the apex installed at {where} is not NVIDIA's (`pip install apex` gives an unrelated "
            f"web toolkit: pip uninstall apex); {advice}"
        )
    try:
        fused = importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise ModuleNotFoundError(f"--optim.impl apex: apex cannot be imported ({error}); {advice}") from None
    try:
        importlib.import_module("amp_C")
    except ImportError:
        raise ModuleNotFoundError(f"--optim.impl apex: this apex has no CUDA extensions (amp_C); {advice}") from None
    adam: type[torch.optim.Optimizer] = fused
    return adam


def build_optimizer(groups: list[dict[str, Any]], config: "OptimConfig") -> torch.optim.Optimizer:
    """AdamW over `groups` (with `names` and optionally `lr_scale`), in `config.impl`."""
    for group in groups:
        group.setdefault("lr_scale", 1.0)
        if len(group["names"]) != len(group["params"]):
            raise ValueError("parameter groups: `names` and `params` must have one entry each per parameter")
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.impl == "apex":
        adam = load_apex()
        return adam(groups, adam_w_mode=True, **common)  # type: ignore[call-arg]
    return torch.optim.AdamW(groups, fused=True, **common)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The scheduled rate times each group's `lr_scale` (layer decay); a rate that is a tensor is filled in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


def parameters_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every optimized parameter by name."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


class LossScaler:
    """Dynamic loss scale for fp16 without a host sync: doubles after `interval` clean steps, halves on overflow.

    The rule and its constants are those of `torch.amp.GradScaler`; the state is two 0-d fp32 tensors on `device`.
    Disabled, the scale stays 1.
    """

    def __init__(self, device: torch.device, enabled: bool, initial: float = 65536.0, interval: int = 2000) -> None:
        self.enabled = enabled
        self.interval = interval
        self.scale = torch.tensor(initial if enabled else 1.0, device=device)
        self.clean_steps = torch.tensor(0.0, device=device)

    def update(self, found_inf: Tensor) -> None:
        """`found_inf`: 0-d fp32, 1 where the step was skipped."""
        if not self.enabled:
            return
        clean = (self.clean_steps + 1) * (1 - found_inf)
        grow = clean >= self.interval
        grown = torch.where(grow, self.scale * 2, self.scale)
        kept = torch.where(torch.isfinite(grown), grown, self.scale)
        self.scale.copy_(torch.where(found_inf > 0, self.scale * 0.5, kept))  # in place: a CUDA graph reads it here
        self.clean_steps.copy_(torch.where(grow, torch.zeros_like(clean), clean))

    def state(self) -> dict[str, float]:
        return {"scale": float(self.scale), "clean_steps": float(self.clean_steps)}

    def load(self, state: Mapping[str, float]) -> None:
        if self.enabled:
            self.scale.fill_(state["scale"])
            self.clean_steps.fill_(state["clean_steps"])


def optimizer_step(
    optimizer: torch.optim.Optimizer, loss_scale: Tensor, clip_grad: float | None, loss: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Unscale, clip to `clip_grad`, step; a gradient or `loss` that is not finite changes nothing, bit for bit.

    Returns (gradient norm before clipping, found_inf), both 0-d fp32 on the device: nothing here waits for the device
    with torch's implementation. apex cannot skip on the device, so there the host waits once per step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients, 2.0, foreach=True)).float() / loss_scale
    finite = torch.isfinite(norm) if loss is None else torch.isfinite(norm) & torch.isfinite(loss)
    found_inf = (~finite).float()
    divisor = loss_scale
    if clip_grad is not None:  # the same 1e-6 as torch.nn.utils.clip_grad_norm_
        divisor = loss_scale / torch.clamp(clip_grad / (norm + 1e-6), max=1.0)
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(found_inf):
        torch._foreach_div_(gradients, divisor)
        optimizer.step()
    return norm, found_inf


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
    """Put a saved state, of either implementation, into `optimizer`; names and shapes have to match."""
    expected = parameters_of(optimizer)
    known = {f"{name}.{slot}" for name in expected for slot in (*MOMENTS, "step")}
    surplus = sorted(set(state) - known)
    if surplus:
        raise ValueError(f"optimizer state holds {len(surplus)} tensors the model lacks, e.g. {surplus[0]}")
    per_group = not isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        steps = {float(state[f"{n}.step"]) for n in group["names"] if f"{n}.step" in state}
        if per_group and len(steps) > 1:
            raise ValueError(
                f"apex counts steps per group, but this state has counts from {min(steps):g} to {max(steps):g} in one "
                "group; continue it with --optim.impl torch"
            )
        if per_group and steps:
            group["step"] = int(steps.pop())
        for name, parameter in zip(group["names"], group["params"], strict=True):
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


def empty_optimizer_state(optimizer: torch.optim.Optimizer, names: set[str]) -> dict[str, Tensor]:
    """Give AdamW the state that `optimizer_state` calls by these names, as live tensors to be filled.

    Unlike `load_optimizer_state` it needs no whole tensor: with FSDP2 every rank has just its part.
    """
    for name, parameter in parameters_of(optimizer).items():
        if f"{name}.step" in names:
            moments = {slot: torch.zeros_like(parameter, dtype=torch.float32) for slot in MOMENTS}
            step = torch.zeros((), dtype=torch.float32, device=local(parameter).device)
            optimizer.state[parameter] = {"step": step, **moments}
    return optimizer_state(optimizer)


def expected_optimizer_bytes(groups: list[dict[str, Any]]) -> int:
    """Bytes of AdamW's two fp32 moments."""
    return 8 * sum(math.prod(p.shape) for group in groups for p in group["params"])
