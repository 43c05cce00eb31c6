"""A model as files of another library: timm, transformers, ONNX or torch.export, each opened again to compare."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling, convert_state_dict
from beit_fast.models.hub import write_weights
from beit_fast.models.mim import pretrained_backbone, without_extra_head

Target = Literal["timm", "transformers", "onnx", "safetensors", "torch-export"]
_RATES = ("drop_rate", "pos_drop_rate", "attn_drop_rate", "proj_drop_rate", "drop_path_rate")
Function = Callable[[Tensor], Tensor]


def timm_config(config: BeitConfig, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a folder that timm opens by "local-dir:FOLDER".

    Args:
        config: of a classifier, or of a backbone (`num_classes` 0).
        preprocessing: `mean`, `std` and `crop_share` of its images, as far as they are known.
    """
    own, shared = (config.relative_position_bias == kind for kind in ("per_block", "shared"))
    return {
        "architecture": "beit_base_patch16_224",
        "num_classes": config.num_classes,
        "num_features": config.width,
        "global_pool": config.global_pool,
        "model_args": {
            "img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.in_chans,
            "embed_dim": config.width, "depth": config.depth, "num_heads": config.num_heads,
            "mlp_ratio": config.mlp_ratio, "init_values": config.layer_scale_init,
            "use_abs_pos_emb": config.use_abs_pos_emb, "use_rel_pos_bias": own, "use_shared_rel_pos_bias": shared,
            "use_fc_norm": config.norm_after_pooling, "global_pool": config.global_pool, "qkv_bias": config.qkv_bias,
            **{name: rate for name in _RATES if (rate := getattr(config, name))},
        },
        "pretrained_cfg": {
            "num_classes": config.num_classes, "input_size": (config.in_chans, *config.image_hw),
            "interpolation": "bicubic", "crop_pct": preprocessing.get("crop_share") or 1.0,
            "mean": preprocessing.get("mean") or (0.5,) * 3, "std": preprocessing.get("std") or (0.5,) * 3,
            "first_conv": "patch_embed.proj", "classifier": "head",
            **({"label_names": list(preprocessing["classes"])} if preprocessing.get("classes") else {}),
        },
    }  # fmt: skip


def transformers_config(config: BeitConfig, classes: tuple[str, ...], pretraining: bool) -> dict[str, Any]:
    """Arguments of `transformers.BeitConfig` for this architecture."""
    own, shared = (config.relative_position_bias == kind for kind in ("per_block", "shared"))
    wrong = {
        "qkv_bias": config.qkv_bias is not True,
        "global_pool": config.global_pool == "" and not pretraining,
        "use_fc_norm": config.norm_after_pooling != (config.global_pool == "avg"),
        "drop_rate": bool(config.drop_rate),
        "pos_drop_rate": config.pos_drop_rate != config.proj_drop_rate,
    }
    if names := [name for name, differs in wrong.items() if differs]:
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in names)
        raise ValueError(f"transformers' BEiT has no {values}: --to timm, onnx, torch-export or safetensors")
    labels = dict(enumerate(classes))
    return {
        "image_size": config.image_size, "patch_size": config.patch_size, "num_channels": config.in_chans,
        "use_mean_pooling": config.global_pool == "avg", "hidden_size": config.width,
        "num_hidden_layers": config.depth, "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.width * config.mlp_ratio), "layer_norm_eps": config.layer_norm_eps,
        "layer_scale_init_value": config.layer_scale_init or 0.0, "use_mask_token": pretraining,
        "use_absolute_position_embeddings": config.use_abs_pos_emb, "use_relative_position_bias": own,
        "use_shared_relative_position_bias": shared, "drop_path_rate": config.drop_path_rate,
        "vocab_size": config.vocab_size, "hidden_dropout_prob": config.proj_drop_rate,
        "attention_probs_dropout_prob": config.attn_drop_rate,
        **({"id2label": labels, "label2id": {name: number for number, name in labels.items()}} if labels else {}),
    }  # fmt: skip


def export(
    model: nn.Module, target: Target, folder: Path, images: Tensor, preprocessing: Mapping[str, Any]
) -> tuple[Function, Function]:
    """Write `model` into `folder` as `target` and open what was written.

    Args:
        model: a `Beit`, a `BeitForMaskedImageModeling` or a segmentation model, in evaluation mode on the CPU.
        images: (B, C, S, S), B at least 2, normalised; what is traced.
        preprocessing: `mean`, `std`, `crop_share` and `classes`, as far as they are known.

    Returns:
        Two functions of images, of which the first is ours and the second what was opened; their results are to be
        compared: logits, the last hidden state of a backbone, or the logits of all tokens in pre-training.

    Raises:
        ValueError: the target library has no such model; ModuleNotFoundError: it is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, BeitForMaskedImageModeling) and target not in ("safetensors", "transformers"):
        model = pretrained_backbone(model)
    elif isinstance(model, BeitForMaskedImageModeling) and model.config.head_layers:
        print(f"the {model.config.head_layers} extra blocks of the head that only pre-training has are left out")
        model = without_extra_head(model)
    ours = _Traced(model)
    if target == "safetensors":
        return ours, _safetensors(model, folder, preprocessing)
    if target == "timm":
        return ours, _timm(model, folder, preprocessing)
    if target == "transformers":
        return ours, _transformers(model, folder, preprocessing)
    if target == "onnx":
        return ours, _onnx(ours, folder / "model.onnx", images)
    program = torch.export.export(ours, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "model.pt2")
    return ours, torch.export.load(folder / "model.pt2").module()


class _Traced(nn.Module):
    """A model whose `forward` gives the one tensor that is compared."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return _output(self.model, images)


def _output(model: nn.Module, images: Tensor) -> Tensor:
    """What is compared: logits of a classifier (B, C), of pixels (B, C, S, S) or tokens (B, N, V); or (B, N, D)."""
    if isinstance(model, BeitForMaskedImageModeling):
        mask = torch.zeros(images.shape[0], model.config.num_patches, dtype=torch.bool)
        return model.predict_tokens(images, mask, predict_all=True).unflatten(0, (images.shape[0], -1))
    if isinstance(model, Beit):
        return model(images) if model.num_classes else model.forward_features(images)
    logits: Tensor = model.predict(images)  # type: ignore[operator]
    return logits


def _safetensors(model: nn.Module, folder: Path, preprocessing: Mapping[str, Any]) -> Function:
    model.save_pretrained(folder)  # type: ignore[operator]
    if preprocessing:
        (folder / "preprocessing.json").write_text(json.dumps(preprocessing, indent=1) + "\n")
    return _Traced(type(model).from_pretrained(folder))  # type: ignore[attr-defined]


def _timm(model: nn.Module, folder: Path, preprocessing: Mapping[str, Any]) -> Function:
    if not isinstance(model, Beit):
        raise ValueError("timm has no segmentation models: --to onnx, torch-export or safetensors")
    import timm

    state = {name: tensor.contiguous() for name, tensor in convert_state_dict(model.state_dict(), to="timm").items()}
    write_weights(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(timm_config(model.config, preprocessing), indent=2) + "\n")
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    function: Function = opened if model.num_classes else opened.forward_features
    return function


def _transformers(model: nn.Module, folder: Path, preprocessing: Mapping[str, Any]) -> Function:
    if not isinstance(model, (Beit, BeitForMaskedImageModeling)):
        raise ValueError(
            "transformers' segmentation model reads other blocks than the official one: --to onnx, torch-export or "
            "safetensors"
        )
    pretraining = isinstance(model, BeitForMaskedImageModeling)
    if not pretraining and not model.num_classes:
        raise ValueError("--to transformers needs a classifier or a pre-training run; this is a backbone: --to timm")
    import transformers

    kind: Any = transformers.BeitForMaskedImageModeling if pretraining else transformers.BeitForImageClassification
    classes = () if pretraining else tuple(preprocessing.get("classes") or map(str, range(model.config.num_classes)))
    theirs = kind(transformers.BeitConfig(**transformers_config(model.config, classes, pretraining)))
    theirs.load_state_dict(convert_state_dict(model.state_dict(), to="transformers"))
    theirs.save_pretrained(folder)
    (folder / "model.safetensors").chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))  # not its owner's alone
    side = model.config.image_hw[0]
    share = preprocessing.get("crop_share") or 1.0
    processor = {
        "image_processor_type": "BeitImageProcessor", "do_resize": True, "size": {"shortest_edge": round(side / share)},
        "do_center_crop": True, "crop_size": {"height": side, "width": side}, "resample": 3, "do_rescale": True,
        "do_normalize": True, "image_mean": preprocessing.get("mean") or [0.5] * 3,
        "image_std": preprocessing.get("std") or [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    opened = kind.from_pretrained(folder).eval()
    return lambda images: opened(images).logits


def _onnx(model: nn.Module, path: Path, images: Tensor) -> Function:
    import onnxruntime

    program = torch.onnx.export(
        model, (images,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    assert program is not None
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path))
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
