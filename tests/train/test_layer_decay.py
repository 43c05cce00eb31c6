"""Layer-wise learning-rate decay against the official scales and group count."""

import pytest
import torch
from torch import nn

from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling
from beit_fast.train.optim import decay_groups, layer_of


def tiny(size="base", preset="plus", **values):
    """The depth of the named size, with narrow layers."""
    config = BeitConfig.from_preset(size, preset, image_size=32, width=16, num_heads=2, **values)
    return Beit(config.for_classification(5))


@pytest.mark.parametrize("preset", ["plus", "plain"])
def test_base_has_the_official_28_groups(preset):
    model = tiny(preset=preset)
    groups = decay_groups(model, 0.05, 0.65, depth=12)
    assert len(groups) == 28
    scales = {}
    for group in groups:
        for name in group["names"]:
            scales[name] = group["lr_scale"]
    assert scales["cls_token"] == scales["patch_embed.proj.bias"] == pytest.approx(0.003697, abs=5e-7)
    assert scales["blocks.0.attn.qkv.weight"] == pytest.approx(0.005688, abs=5e-7)
    assert scales["blocks.11.mlp.fc2.bias"] == pytest.approx(0.65)
    assert scales["head.weight"] == scales["head.bias"] == scales["fc_norm.weight"] == 1.0
    assert scales.keys() == dict(model.named_parameters()).keys()
    for group in groups:
        assert {scales[name] for name in group["names"]} == {group["lr_scale"]}
        for name, parameter in zip(group["names"], group["params"], strict=True):
            exempt = parameter.ndim == 1 or name.endswith(".bias") or name in ("pos_embed", "cls_token")
            assert group["weight_decay"] == (0.0 if exempt else 0.05), name
    if preset == "plus":
        assert scales["blocks.3.attn.relative_position_bias_table"] == pytest.approx(0.65**9)


def test_large_has_52_groups():
    assert len(decay_groups(tiny("large"), 0.05, 0.75, depth=24)) == 52


def test_a_shared_table_and_the_mask_token_stand_where_the_official_code_has_them():
    model = BeitForMaskedImageModeling(BeitConfig.from_preset("base", image_size=32, width=16, num_heads=2))
    groups = {n: g for g in decay_groups(model, 0.05, 0.5, depth=12) for n in g["names"]}
    assert groups["mask_token"]["lr_scale"] == 0.5**13
    assert groups["mask_token"]["weight_decay"] == 0.05
    assert groups["rel_pos_bias.relative_position_bias_table"]["lr_scale"] == 1.0


def test_a_backbone_inside_a_larger_model_keeps_its_layers():
    class Segmentor(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = tiny()
            self.blocks = nn.ModuleList([nn.Linear(2, 2)])  # a head that happens to use the same word

    groups = {n: g for g in decay_groups(Segmentor(), 0.05, 0.5, 12, "backbone.") for n in g["names"]}
    assert groups["backbone.cls_token"]["lr_scale"] == 0.5**13
    assert groups["backbone.cls_token"]["weight_decay"] == 0.0
    assert groups["blocks.0.weight"]["lr_scale"] == 1.0


def test_frozen_parameters_are_left_out_and_no_decay_is_one_scale():
    model = tiny()
    model.patch_embed.requires_grad_(False)
    groups = decay_groups(model, 0.0, 1.0, depth=12)
    assert {g["lr_scale"] for g in groups} == {1.0}
    names = {n for n, _ in model.named_parameters() if not n.startswith("patch_embed")}
    assert {n for g in groups for n in g["names"]} == names


@pytest.mark.parametrize("decay", [0.0, 1.2])
def test_a_bad_decay_is_named(decay):
    with pytest.raises(ValueError, match="--layer-decay"):
        decay_groups(tiny(), 0.05, decay, depth=12)


def test_layers_of_names():
    assert [layer_of(n, 12) for n in ("pos_embed", "blocks.10.norm1.bias", "norm.bias", "blocks_extra.1.x")] == [
        0,
        11,
        13,
        13,
    ]


def test_the_rates_reach_the_optimizer():
    from beit_fast.train.config import OptimConfig
    from beit_fast.train.optim import build_optimizer, set_learning_rate

    optimizer = build_optimizer(decay_groups(tiny(), 0.05, 0.65, 12), OptimConfig())
    set_learning_rate(optimizer, 4e-3)
    rates = sorted({round(group["lr"] / 4e-3, 9) for group in optimizer.param_groups})
    assert rates == sorted(round(0.65**k, 9) for k in range(14))
    assert isinstance(optimizer, torch.optim.AdamW)
