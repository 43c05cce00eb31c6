"""The same weights in this library, timm and transformers give the same outputs and gradients (fp32 on CPU)."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling, convert_state_dict
from benchmarks.baselines.libraries import timm_beit, transformers_beit
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()
pytest.importorskip("timm")
pytest.importorskip("transformers")

SMALL = BeitConfig(width=48, depth=3, num_heads=3, patch_size=8, image_size=32, vocab_size=60, num_classes=7)


def with_random_weights(model: nn.Module) -> nn.Module:
    """Weights that leave no part of the model without influence on its output, tables and gammas included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif "gamma" in name:
                parameter.copy_(0.5 + 0.1 * noise)
            elif "table" in name:
                parameter.copy_(0.3 * noise)
            elif parameter.dim() > 1 and "token" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise)
    return model


def images_for(config: BeitConfig, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, config.in_chans, *config.image_hw, generator=torch.Generator().manual_seed(1))


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def family(name: str) -> str:
    """The name of a parameter without the number of its block."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


class Tolerance(NamedTuple):
    rtol: float
    """Of outputs, relative to theirs."""
    atol: float
    """Of outputs, absolute, in addition."""
    gradients: float
    """Of gradients, relative to the norm of theirs."""
    over_blocks: bool
    """Whether that is the norm of a parameter in all blocks together."""


FP32 = Tolerance(0.0, 1e-5, 1e-5, False)
# 24 blocks of 1024 columns round more: logits of BEiT-L come out 1.001e-5 apart, and the gradient of a single block may
# be so much smaller than what it is a sum of that rounding alone, here or there, comes to more. That nothing but
# rounding differs is what fp64 then shows, of every number by itself.
FP32_FULL_SIZE = Tolerance(1e-5, 1e-5, 1e-5, True)
FP64 = Tolerance(0.0, 1e-11, 1e-11, False)


def assert_same_gradients(ours, theirs, tolerance=FP32) -> None:
    assert set(ours) == set(theirs)
    kinds: dict[str, list[str]] = {}
    for name in theirs:
        kinds.setdefault(family(name) if tolerance.over_blocks else name, []).append(name)
    for kind, names in kinds.items():
        difference = sum((ours[n] - theirs[n]).double().square().sum() for n in names) ** 0.5
        norm = sum(theirs[n].double().square().sum() for n in names) ** 0.5
        assert difference <= tolerance.gradients * (norm + 1e-3), f"{kind}: {difference / norm}"


def assert_same_outputs(ours, theirs, tolerance=FP32) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance.rtol, atol=tolerance.atol)


def at_each_precision(compare, ours, peer, x, at_full_size) -> None:
    compare(ours, peer, x, FP32_FULL_SIZE if at_full_size else FP32)
    if getattr(peer, "config", None) is None or peer.config._attn_implementation != "eager":
        # transformers' eager attention takes its softmax in fp32 whatever its inputs are
        compare(ours.double(), peer.double(), x.double(), FP64)


def check_timm(config: BeitConfig, batch: int = 2, at_full_size: bool = False) -> None:
    ours = with_random_weights(Beit(config))
    peer = timm_beit(config)
    peer.load_state_dict(convert_state_dict(ours.state_dict(), to="timm"))
    at_each_precision(compare_timm, ours, peer, images_for(config, batch), at_full_size)


def compare_timm(ours, peer, x, tolerance) -> None:
    a, b = ours(x), peer(x)
    assert_same_outputs(a, b, tolerance)
    probe = (torch.randn(b.shape, generator=torch.Generator().manual_seed(2)) / b.numel() ** 0.5).to(x)
    with torch.no_grad():
        features, pooled = ours.forward_features(x), peer.forward_features(x)
        assert_same_outputs(features, pooled, tolerance)
        assert_same_outputs(ours.forward_head(features, True), peer.forward_head(pooled, True), tolerance)
    found = gradients((a * probe).sum(), ours)
    assert_same_gradients(found, gradients((b * probe).sum(), peer), tolerance)


POOLINGS = [("avg", None), ("token", None), ("", None), ("avg", False), ("token", True)]


@pytest.mark.parametrize(("pool", "fc_norm"), POOLINGS)
@pytest.mark.parametrize(
    "architecture",
    [
        {"relative_position_bias": "per_block"},
        {"relative_position_bias": "shared"},
        {"relative_position_bias": "none", "use_abs_pos_emb": True, "layer_scale_init": None},
    ],
    ids=["plus", "shared", "plain"],
)
def test_timm_classifier(architecture, pool, fc_norm):
    config = SMALL.for_classification(7, **{**architecture, "global_pool": pool, "use_fc_norm": fc_norm})
    check_timm(config)


def test_timm_classifier_of_non_square_images():
    check_timm(SMALL.for_classification(7, image_size=(24, 40)))


def test_timm_classifier_at_full_width():
    check_timm(BeitConfig.from_preset("base", depth=2).for_classification(1000), batch=1)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("pool", ["avg", "token", ""])
@pytest.mark.parametrize("side", [224, 384])
@pytest.mark.parametrize("size", ["base", "large"])
def test_timm_classifier_at_full_size(size, side, pool):
    config = BeitConfig.from_preset(size, image_size=side).for_classification(1000, global_pool=pool)
    check_timm(config, batch=1, at_full_size=True)


def renamed(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return convert_state_dict(grads, to="transformers")


def check_transformers_classifier(config: BeitConfig, attention: str, batch: int = 2) -> None:
    ours = with_random_weights(Beit(config))
    peer = transformers_beit(config, "BeitForImageClassification", attn_implementation=attention)
    peer.load_state_dict(convert_state_dict(ours.state_dict(), to="transformers"))
    at_each_precision(compare_transformers_classifiers, ours, peer, images_for(config, batch), at_full_size=False)


def compare_transformers_classifiers(ours, peer, x, tolerance) -> None:
    a, b = ours(x), peer(x).logits
    assert_same_outputs(a, b, tolerance)
    labels = torch.arange(len(x))
    ours_grad = gradients(F.cross_entropy(a, labels), ours)
    assert_same_gradients(renamed(ours_grad), gradients(F.cross_entropy(b, labels), peer), tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("tables", ["per_block", "shared"])
def test_transformers_classifier(tables, pool, attention):
    config = SMALL.for_classification(7, relative_position_bias=tables, global_pool=pool)
    check_transformers_classifier(config, attention)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", [224, 384])
def test_transformers_classifier_at_full_size(side, attention):
    config = BeitConfig.from_preset("base", image_size=side).for_classification(1000)
    check_transformers_classifier(config, attention, batch=1)


def check_masked_image_modeling(config: BeitConfig, attention: str, batch: int = 2, at_full_size: bool = False) -> None:
    ours = with_random_weights(BeitForMaskedImageModeling(config))
    peer = transformers_beit(config, "BeitForMaskedImageModeling", attn_implementation=attention)
    peer.load_state_dict(convert_state_dict(ours.state_dict(), to="transformers"))
    at_each_precision(compare_masked_image_modeling, ours, peer, images_for(config, batch), at_full_size)


def compare_masked_image_modeling(ours, peer, x, tolerance) -> None:
    config, generator = ours.config, torch.Generator().manual_seed(3)
    mask = torch.rand(len(x), config.num_patches, generator=generator) < 0.4
    tokens = torch.randint(0, config.vocab_size, (int(mask.sum()),), generator=generator)
    a = ours(x, mask, tokens)
    b = peer(x, bool_masked_pos=mask, labels=tokens)
    assert (a.loss - b.loss).abs() < tolerance.atol
    assert_same_outputs(ours.predict_tokens(x, mask), b.logits[mask], tolerance)
    assert a.num_correct == (b.logits[mask].argmax(1) == tokens).sum()
    assert_same_gradients(renamed(gradients(a.loss, ours)), gradients(b.loss, peer), tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", ["plain", "plus"])
def test_masked_image_modeling(preset, attention):
    config = BeitConfig.from_preset(
        "tiny", preset, width=48, depth=3, num_heads=3, patch_size=8, image_size=32, vocab_size=60
    )
    check_masked_image_modeling(config, attention)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("preset", ["plain", "plus"])
@pytest.mark.parametrize("size", ["base", "large"])
def test_masked_image_modeling_at_full_size(size, preset):
    check_masked_image_modeling(BeitConfig.from_preset(size, preset), "sdpa", batch=1, at_full_size=True)
