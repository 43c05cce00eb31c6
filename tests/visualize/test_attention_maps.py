"""Attention maps against transformers' eager attention, against the fused kernel, and their masks and pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling, convert_state_dict
from beit_fast.visualize.attention_maps import (
    AttentionMaps,
    attention_maps,
    attention_sheet,
    save_attention,
    top_mass,
)
from beit_fast.visualize.pictures import heat
from benchmarks.baselines.libraries import transformers_beit
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()
SMALL = {"width": 48, "depth": 3, "num_heads": 3, "patch_size": 8, "image_size": 32, "vocab_size": 60}
ARCHITECTURES = {
    "plus": {"relative_position_bias": "per_block", "layer_scale_init": 0.5},
    "shared": {"relative_position_bias": "shared", "layer_scale_init": 0.5},
    "plain": {"relative_position_bias": "none", "use_abs_pos_emb": True, "layer_scale_init": None},
}


def make(kind):
    """Weights that leave nothing without influence on the attention."""
    torch.manual_seed(0)
    model = Beit(BeitConfig(**SMALL, num_classes=5, **ARCHITECTURES[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if parameter.dim() == 1 or "table" in name else 0.15)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_they_equal_the_reference_implementation(kind):
    pytest.importorskip("transformers")
    model = make(kind)
    peer = transformers_beit(model.config, "BeitForImageClassification", attn_implementation="eager").eval()
    peer.load_state_dict(convert_state_dict(model.state_dict(), to="transformers"), strict=False)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = peer(images, output_attentions=True).attentions
    assert len(expected) == 3
    assert expected[0].std() > 0.01  # not the uniform rows of a fresh model
    for block in range(3):
        found = model.attention_probabilities(images, block)
        assert (found - expected[block]).abs().max() < 1e-5
        row = attention_maps(model, images[1], (2, 1), block)
        assert (row.maps.flatten(1) - expected[block][1, :, 1 + 2 * 4 + 1, 1:]).abs().max() < 1e-5
    assert torch.equal(model.attention_probabilities(images), model.attention_probabilities(images, 2))


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_they_are_those_of_the_fused_kernel_at_any_size(kind, size):
    """Probabilities times values must give what the block's own attention gives."""
    model, images = make(kind), torch.randn(2, 3, *size)
    with torch.no_grad():
        bias_of = model._attention_biases(images)
        layer = model.blocks[1]
        _, normed = model._run_blocks(model._embed(images), bias_of, None, model.layers()[:1], layer.norm1)
        v = F.linear(normed, layer.attn.qkv.weight, layer.attn.qkv_bias()).chunk(3, -1)[2].unflatten(-1, (3, 16))
        mixed = torch.einsum("bhqn,bnhk->bqhk", model.attention_probabilities(images, 1), v).flatten(2)
        torch.testing.assert_close(mixed, layer.attn.attend(normed, bias_of(1)), atol=1e-5, rtol=1e-5)


def test_one_query_is_a_row_of_all():
    model, images = make("plus"), torch.randn(1, 3, 48, 40)
    whole = model.attention_probabilities(images)
    assert whole.shape == (1, 3, 31, 31)
    torch.testing.assert_close(whole.sum(-1), torch.ones(1, 3, 31))
    some = model.attention_probabilities(images, -1, torch.tensor([7, 0]))
    torch.testing.assert_close(some, whole[:, :, [7, 0]], rtol=1e-5, atol=1e-7)
    found = attention_maps(model, images[0], (3, 2))
    torch.testing.assert_close(found.maps.flatten(1), whole[0, :, 1 + 3 * 5 + 2, 1:], rtol=1e-5, atol=1e-7)


def test_a_model_in_pre_training_has_them_too():
    model = BeitForMaskedImageModeling(BeitConfig(**SMALL))
    assert attention_maps(model, torch.randn(3, 32, 32)).query == (2, 2)


def test_wrong_places_are_named():
    model, image = make("plain"), torch.randn(3, 32, 32)
    with pytest.raises(ValueError, match="outside the grid of 4 x 4"):
        attention_maps(model, image, (4, 0))
    with pytest.raises(ValueError, match="block 3 does not exist"):
        attention_maps(model, image, block=3)
    with pytest.raises(ValueError, match="queries must lie in"):
        model.attention_probabilities(image[None], 0, torch.tensor([17]))
    with pytest.raises(ValueError, match="mass must be"):
        attention_maps(model, image, mass=0.0)


def test_masks_hold_the_largest_patches_of_the_mass():
    """As the official script keeps them: everything above the point where the smallest make up 40 %."""
    torch.manual_seed(0)
    values = torch.rand(5, 40) ** 4
    kept = top_mass(values, 0.6)
    for row, mask in zip(values, kept, strict=True):
        ascending, order = row.sort()
        expected = torch.zeros(40, dtype=torch.bool)
        expected[order] = ascending.div(ascending.sum()).cumsum(0) > 1 - 0.6
        assert torch.equal(mask, expected)
    assert top_mass(values, 1.0).sum() == (values > 0).sum()


def test_pictures(tmp_path):
    model = make("plus")
    image = torch.rand(3, 48, 40)
    found = attention_maps(model, image * 2 - 1, (1, 3))
    sheet = np.asarray(attention_sheet(image, found))
    assert sheet.std() > 20
    paths = save_attention(tmp_path, image, found)
    assert [path.name for path in paths[:4]] == ["img.png", "select.png", "attn-head0.png", "mask_th0.6_head0.png"]
    assert len(paths) == 2 + 2 * 3
    saved = {path.name: np.asarray(Image.open(path)).astype(int) for path in paths}
    assert {pixels.shape for pixels in saved.values()} == {(48, 40, 3)}
    changed = np.abs(saved["img.png"] - saved["select.png"]).sum(2) > 0
    assert changed[8:16, 24:32].mean() > 0.95
    assert not changed[:8].any()
    brightest = saved["attn-head0.png"].sum(2)
    row, column = divmod(int(found.maps[0].argmax()), 5)
    assert brightest[row * 8, column * 8] == brightest.max()
    inside = found.masks[1].repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
    assert (saved["mask_th0.6_head1.png"][inside] == saved["img.png"][inside]).all()


def test_colours_cover_the_range_of_a_head_without_its_outlier(tmp_path):
    """One patch that takes most of the attention must not hide how the others differ."""
    maps = torch.linspace(0.001, 0.002, 64).view(1, 8, 8).clone()
    maps[0, 2, 5] = 0.9
    attention = AttentionMaps(maps, torch.ones(1, 8, 8, dtype=torch.bool), (0, 0))
    save_attention(tmp_path, torch.rand(3, 64, 64), attention)
    drawn = np.asarray(Image.open(tmp_path / "attn-head0.png")).astype(int)[::8, ::8].reshape(64, 3)
    scale = (255 * heat(torch.linspace(0, 1, 256)[None], 1)[:, 0].T).round().int().numpy()
    positions = np.array([np.abs(scale - colour).sum(1).argmin() for colour in drawn])
    others = np.delete(positions, 2 * 8 + 5)
    assert positions[2 * 8 + 5] == 255
    assert (np.diff(others) >= 0).all()
    assert others[0] == 0
    assert others[-1] > 220


def test_sheets_are_transparent_where_they_are_empty():
    """So that they suit a page in light and in dark; the words can be read on both."""
    model, image = make("plain"), torch.rand(3, 32, 32)
    sheet = np.asarray(attention_sheet(image, attention_maps(model, image * 2 - 1)))
    assert sheet.shape[2] == 4
    clear = sheet[..., 3] == 0
    assert clear[:, :6].all()
    assert 0.05 < clear.mean() < 0.5
    words = sheet[:34][sheet[:34, :, 3] == 255][:, :3]
    for page in ((255, 255, 255), (0x1F, 0x20, 0x23)):
        light, dark = sorted((luminance(page), luminance(words.mean(0))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 3  # WCAG's contrast of large text and graphics


def luminance(colour):
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.asarray(colour) / 255]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
