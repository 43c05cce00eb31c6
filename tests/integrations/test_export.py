"""Exported folders open in timm and transformers with the same outputs, and come back as the same architecture."""

from dataclasses import asdict, replace

import pytest
import torch

import beit_fast
from beit_fast.integrations.export import export
from beit_fast.models import Beit, BeitConfig
from benchmarks.baselines.libraries import make_torchvision_importable

SMALL = BeitConfig(
    image_size=32, patch_size=8, width=32, depth=2, num_heads=2, num_classes=3, relative_position_bias="per_block"
)
PLAIN = {"relative_position_bias": "none", "use_abs_pos_emb": True, "layer_scale_init": None}
RATES = {"drop_rate": 0.1, "pos_drop_rate": 0.2, "attn_drop_rate": 0.3, "proj_drop_rate": 0.2, "drop_path_rate": 0.4}
NOT_IN_TIMM = {"vocab_size", "mim_target", "init_std", "head_init_scale", "layer_norm_eps"}
NOT_IN_TRANSFORMERS = {"mim_target", "init_std", "head_init_scale", "use_fc_norm"}


@pytest.fixture(autouse=True)
def peers():
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    make_torchvision_importable()


def model_of(**overrides):
    model = Beit(replace(SMALL, **overrides)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def compare(model, target, folder, lost):
    config = model.config
    x = torch.randn(2, config.in_chans, *config.image_hw, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = export(model, target, folder, x, {})
        expected, found = ours(x), theirs(x)
        assert float(expected.std()) > 1e-3
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        again = Beit.from_pretrained(folder)
        torch.testing.assert_close(again(x), model(x), atol=0, rtol=0)
    before, after = asdict(config), asdict(again.config)
    if config.relative_position_bias == "shared":  # a classifier is opened with a table for each block
        before["relative_position_bias"] = "per_block"
    before["use_fc_norm"], after["use_fc_norm"] = config.norm_after_pooling, again.config.norm_after_pooling
    assert {name: after[name] for name in after if after[name] != before[name] and name not in lost} == {}


@pytest.mark.parametrize(
    "overrides",
    [
        {}, PLAIN, RATES, {"relative_position_bias": "shared"}, {"qkv_bias": False}, {"use_fc_norm": False},
        {"global_pool": "token"}, {"global_pool": "token", "use_fc_norm": True}, {"global_pool": "avg", "in_chans": 4},
        {"image_size": (32, 48)}, {"mlp_ratio": 2.5},
    ],
    ids=str,
)  # fmt: skip
def test_timm(overrides, tmp_path):
    compare(model_of(**overrides), "timm", tmp_path / "out", NOT_IN_TIMM)


@pytest.mark.parametrize(
    "overrides",
    [
        {}, PLAIN, {**RATES, "drop_rate": 0.0}, {"relative_position_bias": "shared"}, {"global_pool": "token"},
        {"in_chans": 4}, {"image_size": (32, 48)}, {"mlp_ratio": 2.5}, {"layer_norm_eps": 1e-5},
    ],
    ids=str,
)  # fmt: skip
def test_transformers(overrides, tmp_path):
    compare(model_of(**overrides), "transformers", tmp_path / "out", NOT_IN_TRANSFORMERS)


@pytest.mark.parametrize(
    "overrides",
    [{"qkv_bias": False}, {"global_pool": "", "use_fc_norm": False}, {"use_fc_norm": False}, {"drop_rate": 0.1}],
    ids=str,
)
def test_what_transformers_cannot_describe_is_refused_by_name(overrides, tmp_path):
    name, value = next(iter(overrides.items()))
    with pytest.raises(ValueError, match=f"transformers' BEiT has no {name}={value!r}: --to timm"):
        export(model_of(**overrides), "transformers", tmp_path / "out", torch.zeros(2, 3, 32, 32), {})


def test_create_model_takes_its_architecture_from_a_folder(tmp_path):
    """Of a run, of this library, of timm: without a name, and in timm's ways of naming a folder."""
    model = model_of(global_pool="token", drop_path_rate=0.1)
    model.save_pretrained(tmp_path / "run" / "model")
    export(model, "timm", tmp_path / "timm", torch.zeros(2, 3, 32, 32), {})
    for source in (tmp_path / "run", tmp_path / "run" / "model", tmp_path / "timm"):
        for found in (
            beit_fast.create_model(pretrained=source),
            beit_fast.create_model(f"local-dir:{source}", pretrained=True),
        ):
            assert (found.config.width, found.num_classes, found.config.global_pool) == (32, 3, "token")
            assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.state_dict().items())
    other = beit_fast.create_model(pretrained=tmp_path / "run", num_classes=5, img_size=48, drop_path_rate=0.3)
    assert other(torch.zeros(1, 3, 48, 48)).shape == (1, 5)
    assert other.config.drop_path_rate == 0.3
    empty = beit_fast.create_model(f"local-dir:{tmp_path / 'run'}")
    assert not torch.equal(empty.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_what_says_nothing_of_its_architecture_is_named(tmp_path):
    torch.save(model_of().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"has no config.json, so its architecture is unknown; give the name"):
        beit_fast.create_model(pretrained=tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="it does not exist"):
        beit_fast.create_model(pretrained=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="create_model needs a name"):
        beit_fast.create_model()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="this run has not finished"):
        beit_fast.create_model(pretrained=tmp_path / "run")
