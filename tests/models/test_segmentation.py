"""Segmentation models: names and counts of the official ones, formulas of the heads, weights of transformers."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

from beit_fast.models import (
    Beit,
    BeitConfig,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    CheckpointError,
    SegmentationConfig,
    convert_state_dict,
    load_checkpoint,
)
from beit_fast.models.checkpoints import load_state_dict
from beit_fast.models.heads import FCNHead, SetrUpHead, UPerHead
from beit_fast.models.segmentation import SegmentationLogits, default_taps, segmentation_config, segmentation_loss
from benchmarks.baselines.libraries import transformers_beit

PRETRAINING = BeitConfig.from_preset(
    "tiny", width=24, depth=6, num_heads=3, patch_size=4, image_size=32, vocab_size=40, layer_scale_init=0.5
)
CONFIG = segmentation_config(PRETRAINING, 5, auxiliary_channels=7)
SETR = segmentation_config(PRETRAINING, 5, head="setr_pup", channels=8)


def randomised(model, seed=0):
    """Weights, running statistics included, that leave no part without influence."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            if "running_var" in name:
                value.copy_(1 + 0.3 * noise.abs())
            elif name.endswith("weight") and value.ndim == 1:
                value.copy_(1 + 0.2 * noise)
            elif value.ndim > 1:
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            else:
                value.copy_(0.2 * noise)
    return model


def images(batch=2, side=32, seed=1):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "pixels", "count"), [("base", 640, 163_407_980), ("large", 640, 441_271_084), ("base", 512, 163_080_812)]
)
def test_parameters_are_as_many_as_released(size, pixels, count):
    with torch.device("meta"):
        config = segmentation_config(BeitConfig.from_preset(size, image_size=pixels), 150)
        model = BeitForSemanticSegmentation(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_default_taps_are_the_official_ones():
    assert default_taps(12) == (3, 5, 7, 11)
    assert default_taps(24) == (7, 11, 15, 23)
    assert default_taps(4) == (1, 1, 2, 3)
    assert default_taps(1) == (0, 0, 0, 0)


def norm_keys(prefix, width):
    shapes = {f"{prefix}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
    return {**shapes, f"{prefix}.num_batches_tracked": ()}


def module_keys(prefix, out, inside, kernel):
    return {f"{prefix}.conv.weight": (out, inside, kernel, kernel), **norm_keys(f"{prefix}.bn", out)}


def test_names_and_shapes_are_mmsegmentations():
    """Written from the naming of the released files, for a model of width 24 with heads of 24 and 7."""
    d, h, a, classes = 24, 24, 7, 5
    expected = {
        "backbone.fpn1.0.weight": (d, d, 2, 2), "backbone.fpn1.0.bias": (d,), **norm_keys("backbone.fpn1.1", d),
        "backbone.fpn1.3.weight": (d, d, 2, 2), "backbone.fpn1.3.bias": (d,),
        "backbone.fpn2.0.weight": (d, d, 2, 2), "backbone.fpn2.0.bias": (d,),
        **module_keys("decode_head.bottleneck", h, 5 * d, 3), **module_keys("decode_head.fpn_bottleneck", h, 4 * h, 3),
        "decode_head.conv_seg.weight": (classes, h, 1, 1), "decode_head.conv_seg.bias": (classes,),
        **module_keys("auxiliary_head.convs.0", a, d, 3),
        "auxiliary_head.conv_seg.weight": (classes, a, 1, 1), "auxiliary_head.conv_seg.bias": (classes,),
    }  # fmt: skip
    for number in range(4):
        expected |= module_keys(f"decode_head.psp_modules.{number}.1", h, d, 1)
    for number in range(3):
        expected |= module_keys(f"decode_head.lateral_convs.{number}", h, d, 1)
        expected |= module_keys(f"decode_head.fpn_convs.{number}", h, h, 3)
    found = {name: tuple(value.shape) for name, value in BeitForSemanticSegmentation(CONFIG).state_dict().items()}
    backbone = Beit(dataclasses.replace(CONFIG.backbone, global_pool="", use_fc_norm=True)).state_dict()
    expected |= {f"backbone.{name}": tuple(v.shape) for name, v in backbone.items() if not name.startswith("fc_norm")}
    assert found == expected


def test_names_of_setr_are_mmsegmentations():
    found = {name: tuple(value.shape) for name, value in BeitForSemanticSegmentation(SETR).state_dict().items()}
    expected = {}
    for head, count in (("decode_head", 4), *((f"auxiliary_head.{number}", 2) for number in range(3))):
        expected |= {f"{head}.norm.weight": (24,), f"{head}.norm.bias": (24,)}
        expected |= {f"{head}.conv_seg.weight": (5, 8, 1, 1), f"{head}.conv_seg.bias": (5,)}
        for number in range(count):
            expected |= module_keys(f"{head}.up_convs.{number}.0", 8, 8 if number else 24, 3)
    assert {name: shape for name, shape in found.items() if not name.startswith("backbone.")} == expected
    assert not any("fpn" in name for name in found)


# The formulas once more, from torch's elementary operations, in float64.


def bilinear_matrix(source, target):
    """(target, source): linear interpolation between pixel centres, clamped at the border."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for row in range(target):
        place = min(max((row + 0.5) * source / target - 0.5, 0.0), source - 1.0)
        low = min(int(place), source - 1)
        high = min(low + 1, source - 1)
        matrix[row, low] += 1 - (place - low)
        matrix[row, high] += place - low
    return matrix


def bilinear(x, size):
    rows, columns = bilinear_matrix(x.shape[-2], size[0]), bilinear_matrix(x.shape[-1], size[1])
    return torch.einsum("hy,bcyx,wx->bchw", rows, x, columns)


def convolution(x, weight):
    """ "Same" convolution as a sum of shifted matrix products."""
    reach = weight.shape[-1] // 2
    padded = F.pad(x, (reach,) * 4)
    h, w = x.shape[-2:]
    return sum(
        torch.einsum("oc,bchw->bohw", weight[:, :, i, j], padded[:, :, i : i + h, j : j + w])
        for i in range(weight.shape[-2])
        for j in range(weight.shape[-1])
    )


def normalised(x, p, name, training):
    if training:
        mean = x.mean((0, 2, 3))
        var = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
    else:
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    x = (x - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None]
    return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def unit(x, p, name, training):
    return torch.clamp_min(normalised(convolution(x, p[f"{name}.conv.weight"]), p, f"{name}.bn", training), 0)


def averaged(x, scale):
    """Adaptive average pooling: cell i covers floor(i n / s) to ceil((i + 1) n / s)."""
    n, m = x.shape[-2:]
    cells = [
        [
            x[:, :, i * n // scale : -(-(i + 1) * n // scale), j * m // scale : -(-(j + 1) * m // scale)].mean((2, 3))
            for j in range(scale)
        ]
        for i in range(scale)
    ]
    return torch.stack([torch.stack(row, -1) for row in cells], -2)


def classified(x, p):
    weight, bias = p["conv_seg.weight"][:, :, 0, 0], p["conv_seg.bias"]
    return torch.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None]


def upernet(maps, p, training):
    pooled = [
        bilinear(unit(averaged(maps[3], scale), p, f"psp_modules.{k}.1", training), maps[3].shape[-2:])
        for k, scale in enumerate((1, 2, 3, 6))
    ]
    top = unit(torch.cat([maps[3], *pooled], 1), p, "bottleneck", training)
    two = unit(maps[2], p, "lateral_convs.2", training) + bilinear(top, maps[2].shape[-2:])
    one = unit(maps[1], p, "lateral_convs.1", training) + bilinear(two, maps[1].shape[-2:])
    zero = unit(maps[0], p, "lateral_convs.0", training) + bilinear(one, maps[0].shape[-2:])
    levels = [unit(level, p, f"fpn_convs.{k}", training) for k, level in enumerate((zero, one, two))]
    joined = torch.cat([bilinear(level, zero.shape[-2:]) for level in (*levels, top)], 1)
    return classified(unit(joined, p, "fpn_bottleneck", training), p)


def fcn(x, p, training):
    return classified(unit(x, p, "convs.0", training), p)


def setr(x, p, training, count, scale):
    mean = x.mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(((x - mean) ** 2).mean(1, keepdim=True) + 1e-6)
    x = x * p["norm.weight"][:, None, None] + p["norm.bias"][:, None, None]
    for number in range(count):
        x = unit(x, p, f"up_convs.{number}.0", training)
        x = bilinear(x, (x.shape[-2] * scale, x.shape[-1] * scale))
    return classified(x, p)


HEADS = {
    "upernet": (
        lambda: UPerHead(6, 5, 3, 0.0, (1, 2, 3, 6)), upernet, [(2, 6, side, side + 4) for side in (28, 14, 7, 6)],
    ),
    "fcn": (lambda: FCNHead(6, 5, 3, 0.0), fcn, (2, 6, 7, 9)),
    "setr": (lambda: SetrUpHead(6, 5, 3, 0.0, 4, 2), lambda x, p, t: setr(x, p, t, 4, 2), (2, 6, 3, 4)),
    "setr auxiliary": (lambda: SetrUpHead(6, 5, 3, 0.0, 2, 4), lambda x, p, t: setr(x, p, t, 2, 4), (2, 6, 3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_their_formulas(name, training):
    """Outputs, and gradients of every parameter and input."""
    make, formula, shapes = HEADS[name]
    head = randomised(make().double()).train(training)
    generator = torch.Generator().manual_seed(3)

    def features(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    given = [features(shape) for shape in shapes] if isinstance(shapes, list) else features(shapes)
    leaves = given if isinstance(given, list) else [given]
    values = {key: value.detach().clone() for key, value in head.state_dict().items()}
    parameters = {key: values[key].requires_grad_() for key, _ in head.named_parameters()}
    expected = formula(given, values | parameters, training)
    found = head(given)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), [*leaves, *parameters.values()])
    got = torch.autograd.grad((found * weights).sum(), [*leaves, *head.parameters()])
    for place, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8, msg=lambda text, p=place: f"{p}: {text}")


def test_the_pyramid_reads_the_official_blocks():
    model = randomised(BeitForSemanticSegmentation(CONFIG)).eval()
    beit = Beit(dataclasses.replace(CONFIG.backbone, num_classes=0)).eval()
    load_state_dict(beit, model.state_dict())
    x = images()
    one, two, three, last = beit.forward_intermediates(x, [1, 2, 3, 5], intermediates_only=True)
    maps = model.backbone(x)
    p = {name: value.double() for name, value in model.backbone.state_dict().items() if name.startswith("fpn")}

    def doubled(features, name):
        """A transposed convolution of stride 2: each place becomes 2 x 2."""
        b, _, h, w = features.shape
        blown = torch.einsum("bchw,coij->bohiwj", features, p[f"{name}.weight"]).reshape(b, -1, 2 * h, 2 * w)
        return blown + p[f"{name}.bias"][:, None, None]

    middle = normalised(doubled(one.double(), "fpn1.0"), p, "fpn1.1", training=False)
    middle = 0.5 * middle * (1 + torch.erf(middle / 2**0.5))
    expected = [doubled(middle, "fpn1.3"), doubled(two.double(), "fpn2.0"), three, F.max_pool2d(last, 2)]
    assert [tuple(features.shape[-2:]) for features in maps] == [(32, 32), (16, 16), (8, 8), (4, 4)]
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-4)


def official_taps(config, auxiliary_channels):
    """transformers' model, which reads hidden state `out_index - 1`, on the blocks that the official code reads."""
    peer = transformers_beit(
        dataclasses.replace(config.backbone, num_classes=config.num_classes), "BeitForSemanticSegmentation",
        out_indices=[1, 2, 3, 4], auxiliary_channels=auxiliary_channels, attn_implementation="eager",
    )  # fmt: skip
    peer.config._out_indices = [tap + 2 for tap in config.blocks]
    return peer


def test_transformers_weights_give_transformers_outputs():
    peer = randomised(official_taps(CONFIG, 7))
    ours = BeitForSemanticSegmentation(dataclasses.replace(CONFIG, dropout=0.0))
    report = load_state_dict(ours, peer.state_dict())
    assert not report.missing
    x = images()
    with torch.no_grad():
        expected = peer.eval()(x)
        found = ours.eval()(x)
    torch.testing.assert_close(found.main, expected.logits, rtol=1e-4, atol=1e-4)
    assert found.auxiliary == ()
    assert ours.predict(x).shape == (2, 5, 32, 32)
    labels = torch.randint(0, 5, (2, 32, 32), generator=torch.Generator().manual_seed(5))
    labels[:, :5] = 255
    theirs = peer.train()(x, labels=labels).loss
    theirs.backward()
    logits = ours.train()(x)
    assert len(logits.auxiliary) == 1
    counted = int((labels != 255).sum())
    loss = segmentation_loss(logits, labels, 255, 0.4) / counted
    loss.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-5)
    wanted = convert_state_dict({n: p.grad for n, p in peer.named_parameters() if p.grad is not None}, to="official")
    got = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


def test_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    main, auxiliary = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 3, (2, 8, 8), generator=generator)
    labels[0, :3] = -1
    total = 0.0
    for scores, weight in ((main, 1.0), (auxiliary, 0.4)):
        shares = torch.log(torch.softmax(bilinear(scores, (8, 8)), 1))
        for b, y, x in (labels >= 0).nonzero().tolist():
            total -= weight * float(shares[b, labels[b, y, x], y, x])
    found = segmentation_loss(SegmentationLogits(main, (auxiliary,)), labels, -1, 0.4)
    assert float(found) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("config", [CONFIG, SETR], ids=["upernet", "setr"])
def test_a_crop_without_labels_has_loss_zero_and_gradient_zero(config):
    model = BeitForSemanticSegmentation(config).train()
    loss = segmentation_loss(model(images()), torch.full((2, 32, 32), -1), -1, 0.4) / (2 * 32 * 32)
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name


def test_setr_reads_four_taps():
    model = randomised(BeitForSemanticSegmentation(SETR)).train()
    logits = model(images())
    assert len(logits.auxiliary) == 3
    assert {tuple(scores.shape) for scores in (logits.main, *logits.auxiliary)} == {(2, 5, 128, 128)}
    maps = model.backbone(images())
    assert {tuple(features.shape) for features in maps} == {(2, 24, 8, 8)}
    model.eval()
    assert torch.equal(model(images()).main, model.decode_head(model.backbone(images())[3]))


def test_checkpointing_of_activations_changes_nothing():
    found = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = randomised(BeitForSemanticSegmentation(dataclasses.replace(CONFIG, dropout=0.0)))
        model.set_grad_checkpointing(enable)
        loss = model(images()).main.square().sum()
        found.append(torch.autograd.grad(loss, model.backbone.blocks[0].mlp.fc1.weight)[0])
    torch.testing.assert_close(found[0], found[1])


def test_pretrained_weights_start_a_segmentor():
    """The shared table goes to every block, at another size; the heads stay as they are."""
    source = randomised(BeitForMaskedImageModeling(PRETRAINING))
    larger = segmentation_config(dataclasses.replace(PRETRAINING, image_size=48), 5)
    model = BeitForSemanticSegmentation(larger)
    before = model.decode_head.conv_seg.weight.clone()
    report = load_state_dict(model, source.state_dict())
    assert len(report.expanded) == 6
    assert torch.equal(model.backbone.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
    assert torch.equal(model.decode_head.conv_seg.weight, before)
    heads = [name for name in report.missing if name.startswith(("fpn", "decode_head", "auxiliary_head"))]
    assert heads == report.missing
    assert {"lm_head.weight", "mask_token", "norm.weight"} <= set(report.ignored)


@pytest.mark.parametrize("config", [CONFIG, SETR], ids=["upernet", "setr"])
def test_files_of_mmsegmentation_load(config, tmp_path):
    source = randomised(BeitForSemanticSegmentation(config))
    state = source.state_dict()
    state["backbone.blocks.0.attn.relative_position_index"] = torch.zeros(65, 65, dtype=torch.int64)
    if config is CONFIG:
        state["backbone.fpn1.1.num_batches_tracked"] += 7
    torch.save({"meta": {"CLASSES": ("a", "b")}, "state_dict": state, "optimizer": {}}, tmp_path / "released.pth")
    model = BeitForSemanticSegmentation(config)
    report = load_checkpoint(model, tmp_path / "released.pth", verbose=False)
    assert not report.missing
    assert list(report.ignored.values()) == ["computed from the image size"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    fewer = BeitForSemanticSegmentation(dataclasses.replace(config, num_classes=3))
    report = load_checkpoint(fewer, tmp_path / "released.pth", verbose=False)
    assert {name.rsplit(".", 2)[-2] for name in report.missing} == {"conv_seg"}
    assert convert_state_dict(state, to="official").keys() == source.state_dict().keys()


def test_a_folder_keeps_the_model(tmp_path):
    for number, config in enumerate((CONFIG, SETR)):
        source = randomised(BeitForSemanticSegmentation(config)).eval()
        source.save_pretrained(tmp_path / str(number))
        found = BeitForSemanticSegmentation.from_pretrained(tmp_path / str(number))
        assert found.config == config
        assert torch.equal(found.predict(images()), source.predict(images()))
    Beit(dataclasses.replace(CONFIG.backbone, num_classes=3)).save_pretrained(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match="describes no segmentation model"):
        BeitForSemanticSegmentation.from_pretrained(tmp_path / "classifier")
    described = (tmp_path / "0/config.json").read_text()
    for text in ("[" * 100_000, re.sub(r'"patch_size": \d+', '"patch_size": 0', described)):
        (tmp_path / "1/config.json").write_text(text)
        with pytest.raises(CheckpointError, match="describes no segmentation model"):
            BeitForSemanticSegmentation.from_pretrained(tmp_path / "1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"taps": (0, 1, 2, 4)}, "the last tap must be the last block, 5, got 4"),
        ({"taps": (3, 1, 2, 5)}, "ascending order"),
        ({"head": "fcn"}, "head 'fcn' is unknown"),
        ({"num_classes": 0}, "num_classes must be positive"),
        ({"channels": 0}, "channels must be positive"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_what_cannot_be_built_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        SegmentationConfig(**({"backbone": CONFIG.backbone} | values))
    with pytest.raises(ValueError, match="for_classification"):
        SegmentationConfig(PRETRAINING)
