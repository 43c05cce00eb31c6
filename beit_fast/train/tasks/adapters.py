"""What of a model learns: frozen blocks, and LoRA (Hu et al., 2022) by peft, merged into the weights on export."""

import copy
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from beit_fast.models.backbone import BeitBackbone
from beit_fast.train.optim import layer_of

Model = TypeVar("Model", bound=nn.Module)

_TARGETS = r"(.*\.)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
_TRAINED = ("head.", "fc_norm.", "norm.", "lm_head.", "mask_token", "cls_pt_layers.")
"""Starts of the names of what learns as a whole: heads, the norm before them, the mask token, extra blocks."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates in place of training the blocks (LoRA); needs the extra `peft`."""

    rank: int = 0
    """Rank of the updates of every matrix of the blocks; the weights themselves stay, heads learn. 0: no LoRA."""
    alpha: float | None = None
    """The updates are scaled by alpha / rank; None: twice the rank."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"--lora.rank is {self.rank}, it must be at least 0")


def freeze(model: BeitBackbone, blocks: int) -> None:
    """Keep the first `blocks` of a model as they are, and the patch and position embeddings before them.

    Raises:
        ValueError: it has not so many.
    """
    depth = model.config.depth
    if not 0 <= blocks <= depth:
        raise ValueError(f"--frozen-blocks is {blocks}, the model has {depth} blocks")
    if not blocks:
        return
    for name, parameter in model.named_parameters():
        if name != "mask_token" and layer_of(name, depth) <= blocks:
            parameter.requires_grad_(False)
    if blocks == depth and model.rel_pos_bias is not None:
        model.rel_pos_bias.requires_grad_(False)


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Put the updates into `model`, in place; all but them, heads and mask token is frozen. Rank 0 does nothing.

    Raises:
        ModuleNotFoundError: peft is not installed.
    """
    if not config.rank:
        return
    try:
        import peft
    except ImportError as error:
        raise ModuleNotFoundError(f"--lora.rank needs peft ({error}): pip install 'beit-fast[peft]'") from None
    alpha = 2.0 * config.rank if config.alpha is None else config.alpha
    options = peft.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=_TARGETS, lora_dropout=0.0)
    peft.inject_adapter_in_model(options, model)
    for name, parameter in model.named_parameters():
        if name.startswith(_TRAINED):
            parameter.requires_grad_(True)


def merged(model: Model) -> Model:
    """A copy of the model with its updates added to the weights; a model without LoRA itself."""
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    if not adapted:
        return model
    model = copy.deepcopy(model)
    for name in adapted:
        layer = model.get_submodule(name)
        layer.merge()  # type: ignore[operator]
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.base_layer)
    return model.requires_grad_(True)
