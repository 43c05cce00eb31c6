"""What the parameters of a BEiT are called by the official code, timm and transformers, and translations between them.

The names of this library are the official ones, which are also timm's. Each row of the tables below is one parameter:
its official name, its name in transformers 5, and its name in transformers 4 (the files of the hub, which transformers
5 also writes). `{i}` stands for a number and `{s}` for the last part (`weight`, `running_mean`, ...).
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
_V5, _V4 = "beit.layers.{i}.", "beit.encoder.layer.{i}."

_BACKBONE = [
    ("cls_token", "beit.embeddings.cls_token", "beit.embeddings.cls_token"),
    ("mask_token", "beit.embeddings.mask_token", "beit.embeddings.mask_token"),
    ("pos_embed", "beit.embeddings.position_embeddings", "beit.embeddings.position_embeddings"),
    (
        "patch_embed.proj.{s}",
        "beit.embeddings.patch_embeddings.projection.{s}",
        "beit.embeddings.patch_embeddings.projection.{s}",
    ),
    (
        f"rel_pos_bias.{_TABLE}",
        f"beit.shared_position_bias.{_TABLE}",
        f"beit.encoder.relative_position_bias.{_TABLE}",
    ),
    ("blocks.{i}.norm1.{s}", _V5 + "layernorm_before.{s}", _V4 + "layernorm_before.{s}"),
    ("blocks.{i}.norm2.{s}", _V5 + "layernorm_after.{s}", _V4 + "layernorm_after.{s}"),
    ("blocks.{i}.attn.q_bias", _V5 + "attention.q_proj.bias", _V4 + "attention.attention.query.bias"),
    ("blocks.{i}.attn.v_bias", _V5 + "attention.v_proj.bias", _V4 + "attention.attention.value.bias"),
    # The three below are slices of the official `attn.qkv.weight`.
    ("blocks.{i}.attn.q.weight", _V5 + "attention.q_proj.weight", _V4 + "attention.attention.query.weight"),
    ("blocks.{i}.attn.k.weight", _V5 + "attention.k_proj.weight", _V4 + "attention.attention.key.weight"),
    ("blocks.{i}.attn.v.weight", _V5 + "attention.v_proj.weight", _V4 + "attention.attention.value.weight"),
    (
        "blocks.{i}.attn." + _TABLE,
        _V5 + f"relative_position_bias.{_TABLE}",
        _V4 + f"attention.attention.relative_position_bias.{_TABLE}",
    ),
    ("blocks.{i}.attn.proj.{s}", _V5 + "attention.o_proj.{s}", _V4 + "attention.output.dense.{s}"),
    ("blocks.{i}.mlp.fc1.{s}", _V5 + "mlp.fc1.{s}", _V4 + "intermediate.dense.{s}"),
    ("blocks.{i}.mlp.fc2.{s}", _V5 + "mlp.fc2.{s}", _V4 + "output.dense.{s}"),
    ("blocks.{i}.gamma_1", _V5 + "lambda_1", _V4 + "lambda_1"),
    ("blocks.{i}.gamma_2", _V5 + "lambda_2", _V4 + "lambda_2"),
    ("fc_norm.{s}", "beit.pooler.layernorm.{s}", "beit.pooler.layernorm.{s}"),
    ("norm.{s}", "beit.layernorm.{s}", "beit.layernorm.{s}"),
    ("lm_head.{s}", "lm_head.{s}", "lm_head.{s}"),
    ("head.{s}", "classifier.{s}", "classifier.{s}"),
]

_CONVOLUTIONS = [f"decode_head.{name}.{{i}}" for name in ("lateral_convs", "fpn_convs", "convs")]
_CONVOLUTIONS += ["auxiliary_head.convs.{i}", "auxiliary_head.conv_cat", "decode_head.fpn_bottleneck"]
_SEGMENTATION = [
    ("fpn1.0.{s}", "fpn.fpn1.conv_transpose1.{s}", "fpn1.0.{s}"),
    ("fpn1.1.{s}", "fpn.fpn1.normalization.{s}", "fpn1.1.{s}"),
    ("fpn1.3.{s}", "fpn.fpn1.conv_transpose2.{s}", "fpn1.3.{s}"),
    ("fpn2.0.{s}", "fpn.fpn2.{s}", "fpn2.0.{s}"),
    ("decode_head.conv_seg.{s}", "decode_head.classifier.{s}", "decode_head.classifier.{s}"),
    ("auxiliary_head.conv_seg.{s}", "auxiliary_head.classifier.{s}", "auxiliary_head.classifier.{s}"),
]
for _official, _hugging in (("conv", "convolution"), ("bn", "normalization")):
    _SEGMENTATION += [
        (f"{p}.{_official}.{{s}}", f"{p}.{_hugging}.{{s}}", f"{p}.{_official}.{{s}}") for p in _CONVOLUTIONS
    ]
    _SEGMENTATION += [
        (
            f"decode_head.psp_modules.{{i}}.1.{_official}.{{s}}",
            f"decode_head.psp_modules.blocks.{{i}}.conv.{_hugging}.{{s}}",
            f"decode_head.psp_modules.{{i}}.1.{_official}.{{s}}",
        ),
        (
            f"decode_head.bottleneck.{_official}.{{s}}",
            f"decode_head.psp_bottleneck.{_hugging}.{{s}}",
            f"decode_head.bottleneck.{_official}.{{s}}",
        ),
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
            found = pattern.fullmatch(name)
            if found:
                return found.expand(replacement)
        return None


_ROWS = _BACKBONE + _SEGMENTATION
_MASKED_NORM = ("norm.{s}", "layernorm.{s}")  # of the masked image model: beside the backbone, not inside
_FROM_HUGGING_FACE = _Translation([(v, o) for o, *hf in _ROWS for v in hf] + [_MASKED_NORM[::-1]])
_KNOWN = _Translation([(o, o) for o, *_ in _ROWS] + [("blocks.{i}.attn.qkv.weight",) * 2])
# SETR-PUP has no counterpart in transformers.
_SETR = re.compile(r"(decode_head|auxiliary_head\.\d+)\.(norm\.\w+|up_convs\.\d+\.0\.(conv|bn)\.\w+|conv_seg\.\w+)")
_TO = {
    "transformers": _Translation([(o, v5) for o, v5, _ in _ROWS]),
    "transformers_v4": _Translation([(o, v4) for o, _, v4 in _ROWS]),
}
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
    strangers = []
    for given, name in zip(state, names, strict=True):
        official = _FROM_HUGGING_FACE(name) or _KNOWN(name) or (name if _SETR.fullmatch(name) else None)
        if official is None:
            strangers.append(given)
            continue
        if official in renamed:
            raise ValueError(f"{origin[official]!r} and {given!r} are both {official!r}: the names are of two kinds")
        renamed[official], origin[official] = state[given], given
    return _join_qkv(renamed), strangers


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
        found = re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])\.weight", name)
        if found is None:
            joined[name] = tensor
        elif f"{found[1]}qkv.weight" not in joined:
            parts = [state.get(f"{found[1]}{part}.weight") for part in "qkv"]
            if any(part is None or part.shape != tensor.shape for part in parts):
                raise ValueError(
                    f"the weights of q, k and v of {found[1].rstrip('.')!r} must be three of one shape, got "
                    + ", ".join("none" if part is None else str(tuple(part.shape)) for part in parts)
                )
            joined[f"{found[1]}qkv.weight"] = torch.cat([part for part in parts if part is not None])
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
    official, strangers = to_official(state)
    unknown = [name for name in strangers if not name.endswith("relative_position_index")]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} (of {len(unknown)}) is no parameter of a BEiT: leave it out before converting"
        )
    segmentor = any(name.startswith("decode_head.") for name in official)
    if to == "timm":
        return {name: t for name, t in official.items() if name != "mask_token" and not name.startswith("lm_head.")}
    if to == "official":
        if not segmentor:
            return official
        heads = ("decode_head.", "auxiliary_head.")
        return {name if name.startswith(heads) else f"backbone.{name}": t for name, t in official.items()}
    converted: dict[str, Tensor] = {}
    for name, tensor in official.items():
        if name.endswith("attn.qkv.weight"):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[_hugging_face(name.replace("qkv", part), to)] = rows.contiguous()
        else:
            converted[_hugging_face(name, to)] = tensor
    if "lm_head.weight" in official:
        converted = {
            name.removeprefix("beit.") if name.startswith("beit.layernorm.") else name: t
            for name, t in converted.items()
        }
    return converted


def _hugging_face(name: str, to: Naming) -> str:
    renamed = _TO[to](name)
    if renamed is None:
        raise ValueError(f"{name!r} has no counterpart in transformers")
    return renamed
