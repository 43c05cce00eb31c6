"""Architecture, names, counts and initialisation against the published model."""

import math

import pytest
import torch
from torch import nn

from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling, create_model, list_models
from beit_fast.nn import drop_path_scales


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tiny(**overrides) -> BeitConfig:
    return BeitConfig(width=32, depth=3, num_heads=2, patch_size=8, image_size=32, vocab_size=64, **overrides)


@pytest.mark.parametrize(
    ("size", "preset", "parameters"),
    [
        ("base", "plus", 91_965_776),
        ("base", "plain", 92_089_856),
        ("large", "plus", 311_534_016),
        ("large", "plain", 311_674_880),
    ],
)
def test_pretraining_parameter_counts(size, preset, parameters):
    with torch.device("meta"):
        assert count(BeitForMaskedImageModeling(BeitConfig.from_preset(size, preset))) == parameters


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("beit_base_patch16_224", 1000, 86_530_984),
        ("beit_base_patch16_384", 1000, 86_744_104),
        ("beit_large_patch16_224", 1000, 304_430_568),
        ("beit_large_patch16_384", 1000, 304_998_888),
        ("beit_large_patch16_512", 1000, 305_674_728),
        ("beit_base_patch16_224", 21_841, 102_557_713),
        ("beit_base_patch16_224", 100, 85_838_884),
    ],
)
def test_classifier_parameter_counts(name, classes, parameters):
    assert name in list_models()
    with torch.device("meta"):
        assert count(create_model(name, num_classes=classes)) == parameters


def test_state_dict_names_of_pretraining():
    with torch.device("meta"):
        state = BeitForMaskedImageModeling(BeitConfig.from_preset("base", "plus")).state_dict()
    block = ["gamma_1", "gamma_2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias"]
    block += ["attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"]
    block += ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    expected = {f"blocks.{i}.{name}" for i in range(12) for name in block}
    expected |= {"cls_token", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight"}
    expected |= {"norm.bias", "lm_head.weight", "lm_head.bias", "rel_pos_bias.relative_position_bias_table"}
    assert set(state) == expected
    assert state["rel_pos_bias.relative_position_bias_table"].shape == (732, 12)
    assert state["blocks.3.attn.qkv.weight"].shape == (2304, 768)
    assert state["patch_embed.proj.weight"].shape == (768, 3, 16, 16)
    assert state["lm_head.weight"].shape == (8192, 768)


def test_state_dict_names_of_the_other_stages():
    with torch.device("meta"):
        plain = BeitForMaskedImageModeling(BeitConfig.from_preset("base", "plain")).state_dict()
        classifier = create_model("beit_base_patch16_224").state_dict()
    assert plain["pos_embed"].shape == (1, 197, 768)
    assert not [name for name in plain if "gamma" in name or "relative" in name]
    assert len(plain) == 165
    assert classifier["blocks.0.attn.relative_position_bias_table"].shape == (732, 12)
    assert {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} <= set(classifier)
    assert not [name for name in classifier if name.startswith(("norm.", "lm_head", "mask_token", "rel_pos_bias"))]


def test_pretraining_initialisation():
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(BeitConfig.from_preset("tiny", "plus", width=384, num_heads=6))
    truncated = 0.02 * 0.53956  # standard deviation of a normal cut off at one sigma
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(truncated, rel=0.01)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(truncated, rel=0.01)
    for index in (1, 12):
        expected = truncated / math.sqrt(2 * index)
        block = model.blocks[index - 1]
        assert block.attn.proj.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert model.lm_head.weight.abs().max().item() <= 0.02
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "table" in name:
            assert not parameter.any(), name
    assert torch.equal(model.blocks[0].gamma_1, torch.full((384,), 0.1))


def test_fine_tuning_initialisation():
    torch.manual_seed(0)
    model = create_model("beit_tiny_patch16_224")
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert not model.head.bias.any()


def test_large_starts_layer_scale_at_1e_5():
    assert BeitConfig.from_preset("large").layer_scale_init == 1e-5
    assert BeitConfig.from_preset("large", "plain").layer_scale_init is None


@pytest.mark.parametrize(
    "overrides",
    [{"image_size": 30}, {"width": 30}, {"depth": 0}, {"patch_size": -8}, {"vocab_size": 0}],
)
def test_impossible_configurations_are_named(overrides):
    values = {"width": 32, "depth": 3, "num_heads": 4, "patch_size": 8, "image_size": 32, **overrides}
    with pytest.raises(ValueError, match=next(iter(overrides))):
        BeitConfig(**values)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="beit_base_patch16_224"):
        create_model("beit_huge_patch14_224")
    with pytest.raises(ValueError, match="tiny, small, base, large"):
        BeitConfig.from_preset("giant")


def test_other_input_sizes_at_run_time():
    torch.manual_seed(0)
    for overrides in ({}, {"use_abs_pos_emb": True, "relative_position_bias": "none"}):
        model = Beit(tiny(**overrides).for_classification(5)).eval()
        assert model(torch.randn(2, 3, 48, 24)).shape == (2, 5)
    with pytest.raises(ValueError, match="multiples of the patch size 8"):
        model(torch.randn(1, 3, 33, 32))


@pytest.mark.parametrize("pool", ["avg", "token", ""])
def test_pooling(pool):
    model = Beit(tiny().for_classification(5, global_pool=pool)).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == ((2, 17, 5) if pool == "" else (2, 5))


def test_checkpointed_blocks_give_the_same_gradients():
    torch.manual_seed(0)
    model = Beit(tiny(drop_path_rate=0.3).for_classification(5))
    images, keys = torch.randn(4, 3, 32, 32), torch.arange(4)
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(images, sample_keys=keys).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_drop_path_depends_on_the_sample_alone():
    rates = torch.linspace(0, 0.4, 6)
    keys = torch.randint(-(2**62), 2**62, (4096,), generator=torch.Generator().manual_seed(0))
    factors = drop_path_scales(rates, keys, 4096)
    assert torch.equal(factors[:, :, 7:9], drop_path_scales(rates, keys[7:9], 2))
    kept = (factors > 0).double()
    assert torch.equal(factors[0], torch.ones(2, 4096))
    torch.testing.assert_close(kept.mean((1, 2)), 1 - rates.double(), atol=0.015, rtol=0)
    torch.testing.assert_close(factors.double().mean((1, 2)), torch.ones(6, dtype=torch.float64), atol=0.03, rtol=0)
    flat = kept[1:].reshape(10, -1)
    correlation = torch.corrcoef(flat) - torch.eye(10, dtype=torch.float64)
    assert correlation.abs().max() < 0.07  # 4.5 standard errors of independent draws


def test_drop_path_keys_make_training_independent_of_the_batch():
    torch.manual_seed(0)
    model = Beit(tiny(drop_path_rate=0.5).for_classification(5)).train()
    images, keys = torch.randn(6, 3, 32, 32), torch.arange(6) * 977
    whole = model(images, sample_keys=keys)
    parts = torch.cat([model(images[i : i + 2], sample_keys=keys[i : i + 2]) for i in (0, 2, 4)])
    torch.testing.assert_close(whole, parts)
    assert not torch.allclose(whole, model.eval()(images))
