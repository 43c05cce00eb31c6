"""What the parameters of a BEiT are called by the official code, timm and transformers, and translations between them.

The names of this library are the official ones, which are also timm's. Each row of the tables below is one parameter:
its official name, its name in transformers 5, and its name in transformers 4 (the files of the hub, which transformers
5 also writes) where that differs. `{i}` stands for a number and `{s}` for the last part (`weight`, ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Naming = Literal["official", "timm", "transformers", "transformers_v4"]
NAMINGS = ("official", "timm", "transformers", "transformers_v4")

_TABLE = "relative_position_bias_table"
_BACKBONE: list[tuple[str, ...]] = [
    ("cls_token", "beit.embeddings.cls_token"),
    ("mask_token", "beit.embeddings.mask_token"),
    ("pos_embed", "beit.embeddings.position_embeddings"),
    ("patch_embed.proj.{s}", "beit.embeddings.patch_embeddings.projection.{s}"),
    (f"rel_pos_bias.{_TABLE}", f"beit.shared_position_bias.{_TABLE}", f"beit.encoder.relative_position_bias.{_TABLE}"),
    ("fc_norm.{s}", "beit.pooler.layernorm.{s}"),
    ("norm.{s}", "beit.layernorm.{s}"),
    ("lm_head.{s}", "lm_head.{s}"),
    ("head.{s}", "classifier.{s}"),
]
_BLOCK: list[tuple[str, ...]] = [  # within `blocks.{i}.`, `beit.layers.{i}.` and `beit.encoder.layer.{i}.`
    ("norm1.{s}", "layernorm_before.{s}"),
    ("norm2.{s}", "layernorm_after.{s}"),
    ("attn.q_bias", "attention.q_proj.bias", "attention.attention.query.bias"),
    ("attn.v_bias", "attention.v_proj.bias", "attention.attention.value.bias"),
    # The three below are slices of the official `attn.qkv.weight`.
    ("attn.q.weight", "attention.q_proj.weight", "attention.attention.query.weight"),
    ("attn.k.weight", "attention.k_proj.weight", "attention.attention.key.weight"),
    ("attn.v.weight", "attention.v_proj.weight", "attention.attention.value.weight"),
    (
        f"attn.{_TABLE}",
        f"relative_position_bias.{_TABLE}",
        f"attention.attention.relative_position_bias.{_TABLE}",
    ),
    ("attn.proj.{s}", "attention.o_proj.{s}", "attention.output.dense.{s}"),
    ("mlp.fc1.{s}", "mlp.fc1.{s}", "intermediate.dense.{s}"),
    ("mlp.fc2.{s}", "mlp.fc2.{s}", "output.dense.{s}"),
    ("gamma_1", "lambda_1"),
    ("gamma_2", "lambda_2"),
]
_SEGMENTATION: list[tuple[str, ...]] = [
    ("fpn1.0.{s}", "fpn.fpn1.conv_transpose1.{s}", "fpn1.0.{s}"),
    ("fpn1.1.{s}", "fpn.fpn1.normalization.{s}", "fpn1.1.{s}"),
    ("fpn1.3.{s}", "fpn.fpn1.conv_transpose2.{s}", "fpn1.3.{s}"),
    ("fpn2.0.{s}", "fpn.fpn2.{s}", "fpn2.0.{s}"),
    ("decode_head.conv_seg.{s}", "decode_head.classifier.{s}"),
    ("auxiliary_head.conv_seg.{s}", "auxiliary_head.classifier.{s}"),
]
_CONV_MODULES: list[tuple[str, ...]] = [  # each with a convolution and a batch norm
    *((f"decode_head.{name}.{{i}}",) * 2 for name in ("lateral_convs", "fpn_convs", "convs")),
    *((f"auxiliary_head.{name}",) * 2 for name in ("convs.{i}", "conv_cat")),
    ("decode_head.fpn_bottleneck", "decode_head.fpn_bottleneck"),
    ("decode_head.bottleneck", "decode_head.psp_bottleneck"),
    ("decode_head.psp_modules.{i}.1", "decode_head.psp_modules.blocks.{i}.conv"),
]
_ROWS = [(row[0], row[1], row[-1]) for row in _BACKBONE + _SEGMENTATION]
_ROWS += [(f"blocks.{{i}}.{r[0]}", f"beit.layers.{{i}}.{r[1]}", f"beit.encoder.layer.{{i}}.{r[-1]}") for r in _BLOCK]
_ROWS += [
    (f"{official}.{ours}.{{s}}", f"{theirs}.{renamed}.{{s}}", f"{official}.{ours}.{{s}}")
    for ours, renamed in (("conv", "convolution"), ("bn", "normalization"))
    for official, theirs in _CONV_MODULES
]


class _Translation:
    """Renames by a table of (from, to) templates; None for a name that no template fits."""

    def __init__(self, templates: list[tuple[str, str]]) -> None:
        self.rules = [(re.compile(self._pattern(source)), self._replacement(target)) for source, target in templates]

    @staticmethod
    def _pattern(template: str) -> str:
        return re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{s\}", r"(?P<s>\w+)")

    @staticmethod
    def _replacement(template: str) -> str:
        return template.replace("{i}", r"\g<i>").replace("{s}", r"\g<s>")

    def __call__(self, name: str) -> str | None:
        for pattern, replacement in self.rules:
            match = pattern.fullmatch(name)
            if match:
                return match.expand(replacement)
        return None


_MASKED_NORM = ("layernorm.{s}", "norm.{s}")  # in a masked image model the final norm lies outside the backbone
_FROM_TRANSFORMERS = _Translation([(name, o) for o, *names in _ROWS for name in names] + [_MASKED_NORM])
_KNOWN = _Translation(
    [(o, o) for o, *_ in _ROWS]
    + [(f"{blocks}.{{i}}.attn.qkv.weight",) * 2 for blocks in ("blocks", "cls_pt_layers")]
    + [(f"cls_pt_layers.{{i}}.{row[0]}",) * 2 for row in _BLOCK]  # of BEiT v2's extra head; others have no such blocks
)
# SETR-PUP has no counterpart in transformers.
_SETR = re.compile(r"(decode_head|auxiliary_head\.\d+)\.(norm\.\w+|up_convs\.\d+\.0\.(conv|bn)\.\w+|conv_seg\.\w+)")
_TO = {
    "transformers": _Translation([(o, v5) for o, v5, _ in _ROWS]),
    "transformers_v4": _Translation([(o, v4) for o, _, v4 in _ROWS]),
}
_PRETRAINING = ("mask_token", "lm_head.", "cls_pt_layers.")
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def to_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Any known naming to the official one; a segmentation model's backbone loses its prefix `backbone.`.

    Returns:
        The renamed tensors, and the names that belong to no parameter of a BEiT (relative position indices among them).

    Raises:
        ValueError: two names come to the same, or one of a block's q, k and v weights is missing or does not fit.
    """
    names = _unwrapped(list(state))
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unknown = []
    for given, name in zip(state, names, strict=True):
        official = _FROM_TRANSFORMERS(name) or _KNOWN(name) or (name if _SETR.fullmatch(name) else None)
        if official is None:
            unknown.append(given)
            continue
        if official in renamed:
            raise ValueError(f"{origin[official]!r} and {given!r} are both {official!r}: the names are of two kinds")
        renamed[official], origin[official] = state[given], given
    return _join_qkv(renamed), unknown


def _unwrapped(names: list[str]) -> list[str]:
    """Without what DistributedDataParallel, torch.compile or a segmentor put in front; with `beit.` where it is out."""
    while names and any(all(name.startswith(wrapper) for name in names) for wrapper in _WRAPPERS):
        names = [name.split(".", 1)[1] for name in names]
    names = [name.removeprefix("backbone.") for name in names]
    bare = ("embeddings.", "encoder.", "layers.", "pooler.", "shared_position_bias.")
    return [f"beit.{name}" if name.startswith(bare) else name for name in names]


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn)\.[qkv]\.weight", name)
        if match is None:
            joined[name] = tensor
        elif f"{match[1]}.qkv.weight" not in joined:
            parts = [state.get(f"{match[1]}.{part}.weight") for part in "qkv"]
            if any(part is None or part.shape != tensor.shape for part in parts):
                shapes = ", ".join("none" if part is None else str(tuple(part.shape)) for part in parts)
                raise ValueError(f"the weights of q, k and v of {match[1]!r} must be three of one shape, got {shapes}")
            joined[f"{match[1]}.qkv.weight"] = torch.cat([part for part in parts if part is not None])
    return joined


def convert_state_dict(state: Mapping[str, Tensor], to: Naming) -> dict[str, Tensor]:
    """Rename the tensors of a state dict, whatever naming it has.

    q, k and v are split or joined as the new naming has them; values are kept.

    Args:
        state: of a BEiT of this library, the official code, timm or transformers (4 or 5), segmentation models
            included.
        to: "official"; "timm" (the same names, without what only pre-training has); "transformers" (names of the
            modules of version 5) or "transformers_v4" (names in its files).

    Returns:
        A new dictionary, of the same dtypes and devices.

    Raises:
        ValueError: `to` is unknown, or a name belongs to no parameter of a BEiT.

    Examples:
        >>> import beit_fast
        >>> from beit_fast.models import convert_state_dict
        >>> model = beit_fast.create_model("beit_tiny_patch16_224", depth=1)
        >>> names = convert_state_dict(model.state_dict(), to="transformers")
        >>> "beit.layers.0.attention.q_proj.weight" in names
        True
    """
    if to not in NAMINGS:
        raise ValueError(f"to {to!r} is unknown; choose one of {', '.join(NAMINGS)}")
    official, unknown = to_official(state)
    unknown = [name for name in unknown if not name.endswith("relative_position_index")]
    if unknown:
        raise ValueError(f"{unknown[0]!r} (of {len(unknown)}) is no parameter of a BEiT: leave it out to convert")
    if to == "timm":
        return {name: t for name, t in official.items() if not name.startswith(_PRETRAINING)}
    if to == "official":
        if not any(name.startswith("decode_head.") for name in official):
            return official
        heads = ("decode_head.", "auxiliary_head.")
        return {name if name.startswith(heads) else f"backbone.{name}": t for name, t in official.items()}
    converted: dict[str, Tensor] = {}
    for name, tensor in official.items():
        if name.endswith("attn.qkv.weight"):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[_transformers_name(name.replace("qkv", part), to)] = rows.contiguous()
        else:
            converted[_transformers_name(name, to)] = tensor
    if "lm_head.weight" in official:
        return {name.replace("beit.layernorm.", "layernorm."): tensor for name, tensor in converted.items()}
    return converted


def _transformers_name(name: str, to: Naming) -> str:
    renamed = _TO[to](name)
    if renamed is None:
        raise ValueError(f"{name!r} has no counterpart in transformers")
    return renamed
