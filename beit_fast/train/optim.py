"""AdamW as BEiT uses it: the official groups, on-device skipping of bad steps, torch's or apex's implementation."""

import importlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast.train.config import OptimConfig

STEM = re.compile(r"(cls_token|mask_token|pos_embed|patch_embed\..*)")
BLOCK = re.compile(r"blocks\.(\d+)\.")


def is_decayed(name: str, parameter: Tensor, exempt: set[str]) -> bool:
    """BEiT's rule: exempt are 1-D parameters, `*.bias`, and the names the model lists (`pos_embed`, `cls_token`).

    `mask_token` (3-D) and the relative position tables (2-D) are therefore decayed, as in the official code.
    """
    return parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt


def decay_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None, depth: int = 0, prefix: str = ""
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters by weight decay (`is_decayed`), and by layer for layer decay.

    The group of layer k has `lr_scale` = layer_decay ** (depth + 1 - k); BEiT-B at 0.65: stem 0.003697, first block
    0.005688, last block 0.65, head 1, which makes 28 groups.

    Args:
        depth: blocks of the backbone.
        prefix: of the backbone's names in `model`, e.g. `backbone.`; names without it belong to the last layer.

    Raises:
        ValueError: layer_decay outside (0, 1].
    """
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"--layer-decay must be in (0, 1], got {layer_decay}")
    listed = getattr(model, "no_weight_decay", None)
    exempt = {prefix + name for name in (listed() if callable(listed) else ("pos_embed", "cls_token"))}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = depth + 1
        if layer_decay is not None and name.startswith(prefix):
            layer = layer_of(name.removeprefix(prefix), depth)
        decayed = is_decayed(name, parameter, exempt)
        scale = (layer_decay or 1.0) ** (depth + 1 - layer)
        new = {"params": [], "names": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        group = groups.setdefault((layer, decayed), new)
        group["params"].append(parameter)
        group["names"].append(name)
    # decayed first, without layers: norms are added in this order, and rounded as in earlier runs
    return [groups[key] for key in sorted(groups, reverse=layer_decay is None)]


def layer_of(name: str, depth: int) -> int:
    """0 for the tokens, the position embedding and the patch embedding, i + 1 for block i, depth + 1 for the rest.

    The rest is the head, the last norm and, as in the official code, a relative position table shared by all blocks.
    """
    if STEM.fullmatch(name):
        return 0
    block = BLOCK.match(name)
    return int(block[1]) + 1 if block else depth + 1


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


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
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
    norm = torch.nn.utils.get_total_norm(gradients, 2.0, foreach=True)
    if hasattr(norm, "full_tensor"):  # of parts that FSDP2 split over the ranks
        norm = norm.full_tensor()
    norm = norm.float() / loss_scale
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
