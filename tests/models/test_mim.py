"""The masked image modelling loss against a plain formulation of the whole model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling, convert_state_dict, load_checkpoint
from beit_fast.models.mim import without_extra_head
from beit_fast.nn import drop_path_scales


def plain_loss(model, images, mask, tokens, keys=None):
    """The model again, in ordinary torch and float64, over all tokens of all blocks; with an extra head both losses."""
    w = {name: p.double() for name, p in model.named_parameters()}
    config = model.config
    D, H = config.width, config.num_heads
    x = F.conv2d(images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=config.patch_size)
    h, width = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    m = mask.flatten(1).double().unsqueeze(-1)
    x = x * (1 - m) + w["mask_token"] * m
    x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x), 1)
    if "pos_embed" in w:
        x = x + w["pos_embed"]
    B, N, _ = x.shape

    def block_bias(table):
        bias = torch.zeros(H, N, N, dtype=torch.float64)
        for i in range(N):
            for j in range(N):
                if i and j:
                    (ri, ci), (rj, cj) = divmod(i - 1, width), divmod(j - 1, width)
                    row = (ri - rj + h - 1) * (2 * width - 1) + ci - cj + width - 1
                else:
                    row = len(table) - (1 if i == j == 0 else 3 if i == 0 else 2)
                bias[:, i, j] = table[row]
        return bias

    bias = torch.zeros(H, N, N, dtype=torch.float64)
    if model.rel_pos_bias is not None:
        bias = block_bias(w["rel_pos_bias.relative_position_bias_table"])
    factors = torch.ones(config.depth + config.head_layers, 2, B, dtype=torch.float64)
    if keys is not None:
        factors = drop_path_scales(model.drop_path.rates, keys, B).double()
    early = None
    stack = [f"blocks.{i}." for i in range(config.depth)] + [f"cls_pt_layers.{i}." for i in range(config.head_layers)]
    ends = []
    for i, prefix in enumerate(stack):
        if i == config.depth:
            ends.append(x)
            x = torch.cat((x[:, :1], early[:, 1:]), 1)
        p = {name.removeprefix(prefix): v for name, v in w.items() if name.startswith(prefix)}
        bias = block_bias(p["attn.relative_position_bias_table"]) if "attn.relative_position_bias_table" in p else bias
        y = F.layer_norm(x, (D,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        qkv_bias = torch.cat((p["attn.q_bias"], torch.zeros(D, dtype=torch.float64), p["attn.v_bias"]))
        q, k, v = F.linear(y, p["attn.qkv.weight"], qkv_bias).reshape(B, N, 3, H, D // H).permute(2, 0, 3, 1, 4)
        attention = ((q * (D // H) ** -0.5) @ k.transpose(-2, -1) + bias).softmax(-1)
        y = F.linear((attention @ v).transpose(1, 2).reshape(B, N, D), p["attn.proj.weight"], p["attn.proj.bias"])
        x = x + factors[i, 0].view(-1, 1, 1) * p.get("gamma_1", torch.ones(D)) * y
        y = F.layer_norm(x, (D,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
        y = F.linear(y, p["mlp.fc2.weight"], p["mlp.fc2.bias"])
        x = x + factors[i, 1].view(-1, 1, 1) * p.get("gamma_2", torch.ones(D)) * y
        early = x if i + 1 == config.early_layers else early
    labels = tokens.flatten(1)[mask.flatten(1)]
    results = []
    for end in (*ends, x):
        x = F.layer_norm(end, (D,), w["norm.weight"], w["norm.bias"], 1e-6)[:, 1:]
        logits = F.linear(x[mask.flatten(1)], w["lm_head.weight"], w["lm_head.bias"])
        results += [F.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()]
    return tuple(results)


def make(preset, depth=3, **overrides):
    torch.manual_seed(0)
    config = BeitConfig.from_preset(
        "tiny", preset, width=32, depth=depth, num_heads=2, patch_size=8, image_size=(32, 40), vocab_size=50,
        init_std=0.2, **overrides,
    )  # fmt: skip
    model = BeitForMaskedImageModeling(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "table" in name:
                parameter.normal_(std=0.3)
    images = torch.randn(3, 3, 32, 40)
    mask = torch.rand(3, 4, 5) < 0.4
    tokens = torch.randint(0, 50, (3, 4, 5))
    return model, images, mask, tokens


@pytest.mark.parametrize(("preset", "depth"), [("plain", 3), ("plus", 3), ("plus", 1)])
def test_loss_and_every_gradient_equal_the_plain_model(preset, depth):
    model, images, mask, tokens = make(preset, depth, drop_path_rate=0.4)
    keys = torch.tensor([5, 17, 99])
    model.train()
    output = model(images, mask, tokens, sample_keys=keys)
    loss, correct = plain_loss(model, images, mask, tokens, keys)
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=1e-6)
    assert output.num_correct == correct
    assert output.num_masked == mask.sum()
    assert output.accuracy.item() == pytest.approx(correct.item() / mask.sum().item())
    ours = torch.autograd.grad(output.loss, list(model.parameters()))
    theirs = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm() + 1e-8, name


@pytest.mark.parametrize(("tables", "early", "extra"), [("shared", 2, 2), ("per_block", 1, 2), ("none", 1, 1)])
def test_the_extra_head_equals_the_plain_model(tables, early, extra):
    """BEiT v2: both losses, their sum's every gradient, drop path of the extra blocks included."""
    model, images, mask, tokens = make(
        "plain" if tables == "none" else "plus", 3, drop_path_rate=0.4, head_layers=extra, early_layers=early,
        relative_position_bias=tables,
    )  # fmt: skip
    keys = torch.tensor([5, 17, 99])
    expected = torch.linspace(0, 0.4, max(3, early + extra))[early : early + extra]
    assert torch.equal(model.drop_path.rates, torch.cat((torch.linspace(0, 0.4, 3), expected)))
    output = model.train()(images, mask, tokens, sample_keys=keys)
    loss, correct, extra_loss, extra_correct = plain_loss(model, images, mask, tokens, keys)
    torch.testing.assert_close(output.loss.double(), loss + extra_loss, rtol=1e-6, atol=1e-6)
    assert (output.num_correct, output.extra_num_correct) == (correct, extra_correct)
    ours = torch.autograd.grad(output.loss, list(model.parameters()))
    theirs = torch.autograd.grad(loss + extra_loss, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-8, name
    assert all(layer.attn.relative_position_bias_table is None for layer in model.extra_layers()) == (
        tables != "per_block"
    )

    alone = model.eval()(images, mask, tokens)
    torch.testing.assert_close(alone.loss.double(), plain_loss(model, images, mask, tokens)[0], rtol=1e-6, atol=1e-6)
    assert alone.extra_num_correct is None
    model.blocks[-1].attn.proj = type("Linear", (torch.nn.Linear,), {})(32, 32)  # replaced parts: nothing is fused
    model.cls_pt_layers[-1].mlp.fc1 = type("Linear", (torch.nn.Linear,), {})(32, 128)
    both = model.train()(images, mask, tokens, sample_keys=keys).loss
    plain = plain_loss(model, images, mask, tokens, keys)
    torch.testing.assert_close(both.double(), plain[0] + plain[2], rtol=1e-5, atol=1e-6)


def test_the_extra_head_starts_as_in_the_official_code():
    """Its matrices are torch's own, those of layer early + i + 1 rescaled; everything else is as without it."""
    torch.manual_seed(0)
    config = BeitConfig.from_preset("tiny", depth=4, vocab_size=64, head_layers=3, early_layers=2)
    model = BeitForMaskedImageModeling(config)
    with torch.no_grad():
        for index, block in enumerate(model.cls_pt_layers):
            divisor = (2 * (2 + index + 1)) ** 0.5
            for layer, by in (
                (block.attn.qkv, 1),
                (block.attn.proj, divisor),
                (block.mlp.fc1, 1),
                (block.mlp.fc2, divisor),
            ):
                bound = layer.in_features**-0.5
                assert float(layer.weight.abs().max()) * by == pytest.approx(bound, rel=0.01)
                assert float(layer.weight.std()) * by == pytest.approx(bound / 3**0.5, rel=0.02)
    torch.manual_seed(0)
    v1 = BeitForMaskedImageModeling(replace(config, head_layers=0))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in v1.state_dict().items())
    assert {name for name in state if name not in v1.state_dict()} == {
        f"cls_pt_layers.{i}.{name.removeprefix('blocks.0.')}"
        for i in range(3) for name in state if name.startswith("blocks.0.")
    }  # fmt: skip


def test_parameters_of_the_base_model():
    """By hand, from the published layout: 14 blocks with LayerScale, one table."""
    with torch.device("meta"):
        model = BeitForMaskedImageModeling(BeitConfig.from_preset("base", head_layers=2, early_layers=9))
    block = 4 * 768 + 3 * 768 * 768 + 2 * 768 + 768 * 768 + 768 + 8 * 768 * 768 + 3072 + 768 + 2 * 768
    rest = 768 * 768 + 768 + 768 + 768 + (27 * 27 + 3) * 12 + 2 * 768 + 768 * 8192 + 8192
    assert sum(p.numel() for p in model.parameters()) == 14 * block + rest == 106_143_056


def test_weights_of_both_heads_load_and_only_the_backbone_goes_on(tmp_path):
    model, images, mask, tokens = make("plus", 3, head_layers=2, early_layers=1)
    torch.save({"model": model.state_dict()}, tmp_path / "beitv2_pt.pth")
    torch.manual_seed(1)
    again = BeitForMaskedImageModeling(model.config)
    report = load_checkpoint(again, tmp_path / "beitv2_pt.pth", verbose=False)
    assert (report.missing, report.ignored) == ([], {})
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in again.state_dict().items())
    model.save_pretrained(tmp_path / "model")
    opened = BeitForMaskedImageModeling.from_pretrained(tmp_path / "model").train()
    assert torch.equal(opened(images, mask, tokens).loss, model.train()(images, mask, tokens).loss)

    classifier = Beit.from_pretrained(tmp_path / "model", num_classes=3)
    assert classifier.config.head_layers == 0
    report = load_checkpoint(Beit(model.config.for_classification(3)), tmp_path / "beitv2_pt.pth", verbose=False)
    dropped = {name for name in model.state_dict() if name.startswith("cls_pt_layers.")}
    assert dropped < set(report.ignored)
    assert "ignored (extra head of pre-training): cls_pt_layers.0.gamma_1" in str(report)
    v1 = without_extra_head(model)
    assert v1.config.head_layers == 0
    assert torch.equal(v1(images, mask, tokens).loss, model.eval()(images, mask, tokens).loss)
    names = convert_state_dict(model.state_dict(), to="timm")
    assert not [name for name in names if name.startswith(("cls_pt_layers", "lm_head", "mask_token"))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_layers": 2}, "early_layers must lie between 1 and 2"),
        ({"head_layers": 1, "early_layers": 3}, "early_layers must lie between 1 and 2"),
        ({"head_layers": 1, "early_layers": 1, "mim_target": "pixels"}, "head_layers needs mim_target visual_tokens"),
    ],
)
def test_an_extra_head_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BeitConfig(depth=3, **changes)


def test_tokens_of_all_patches_or_of_masked_ones_alone():
    model, images, mask, tokens = make("plus")
    losses = [
        model(images, mask, tokens).loss,
        model(images, mask.flatten(1), tokens.flatten(1)).loss,
        model(images, mask, tokens[mask]).loss,
        model(images, mask, tokens, masked_indices=mask.flatten().nonzero().squeeze(1)).loss,
    ]
    for loss in losses[1:]:
        assert torch.equal(loss, losses[0])


def test_global_count_makes_gradients_independent_of_the_split():
    model, images, mask, tokens = make("plus")
    whole = torch.autograd.grad(model(images, mask, tokens).loss, list(model.parameters()))
    total = mask.sum()
    parts = [
        torch.autograd.grad(
            model(images[i : i + 1], mask[i : i + 1], tokens[i : i + 1], num_targets=total).loss,
            list(model.parameters()),
        )
        for i in range(3)
    ]
    for one, three in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(one, sum(three), rtol=1e-4, atol=1e-6)


def test_an_empty_mask_is_an_error_not_a_nan():
    model, images, mask, tokens = make("plus")
    with pytest.raises(ValueError, match="hides no patch"):
        model(images, torch.zeros_like(mask), tokens)


def test_misfitting_inputs_are_named():
    model, images, mask, tokens = make("plus")
    with pytest.raises(ValueError, match="mask must be bool"):
        model(images, mask[:, :3], tokens)
    with pytest.raises(ValueError, match="mask must be bool"):
        model(images, mask.float(), tokens)
    with pytest.raises(ValueError, match="visual_tokens has 3 entries"):
        model(images, mask, tokens[:, 0, 0])


def test_predicted_tokens_are_those_of_the_loss():
    model, images, mask, tokens = make("plus")
    logits = model.predict_tokens(images, mask)
    torch.testing.assert_close(F.cross_entropy(logits, tokens[mask]), model(images, mask, tokens).loss)


def test_the_loss_everywhere_is_that_of_all_patches():
    model, images, mask, tokens = make("plus")
    logits = model.predict_tokens(images, mask, predict_all=True)
    assert logits.shape == (mask.numel(), 50)
    torch.testing.assert_close(logits[mask.flatten()], model.predict_tokens(images, mask))
    found = model(images, mask, tokens, predict_all=True)
    torch.testing.assert_close(F.cross_entropy(logits, tokens.flatten()), found.loss)
    assert (found.num_masked, int(found.num_correct)) == (
        mask.numel(),
        int((logits.argmax(1) == tokens.flatten()).sum()),
    )
    nothing = torch.zeros_like(mask)
    clean = model(images, nothing, tokens, predict_all=True)
    assert clean.loss != found.loss
    torch.testing.assert_close(model(images, nothing, tokens, num_targets=torch.tensor(2.0), predict_all=True).loss,
                               clean.loss * mask.numel() / 2)  # fmt: skip


def test_pixels_are_those_of_the_hidden_patches():
    model, images, mask, _ = make("plain", mim_target="pixels")
    predicted = model.predict_tokens(images, mask)
    assert predicted.shape == (int(mask.sum()), 3 * 8 * 8)
    errors = [
        (row.view(3, 8, 8) - images[b, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]).square().mean()
        for row, (b, i, j) in zip(predicted, mask.nonzero().tolist(), strict=True)
    ]
    found = model(images, mask)
    torch.testing.assert_close(torch.stack(errors).mean(), found.loss)
    torch.testing.assert_close(model(images, mask, num_targets=torch.tensor(3.0)).loss, torch.stack(errors).sum() / 3)
    assert torch.isnan(found.accuracy)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_visual_tokens_may_be_left_out_for_pixels_only():
    model, images, mask, _ = make("plus")
    with pytest.raises(ValueError, match="visual_tokens are missing"):
        model(images, mask)
