"""What users of timm do with a BEiT works with ours: tracers, the meta device, hooks on attention, timm's arguments."""

import io
import sys

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import beit_fast
from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling
from beit_fast.nn import drop_path_scales
from benchmarks.baselines.libraries import timm_beit
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()
timm = pytest.importorskip("timm")

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, "img_size": 64}
KINDS = {
    "plus": {},
    "shared": {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
    "plain": {"use_rel_pos_bias": False, "use_abs_pos_emb": True, "init_values": 0.0},
}
SIZES = [(64, 64), (96, 96), (64, 96), (48, 80)]


def noisy(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def make(kind="plus", **options):
    return noisy(beit_fast.create_model("beit_base_patch16_224", **SMALL, **KINDS[kind], **options)).eval()


def pair(**options):
    """Our model and timm's of the same arguments and weights."""
    ours = make(**options)
    peer = timm.create_model("beit_base_patch16_224", **SMALL, **options).eval()
    peer.load_state_dict(ours.state_dict())
    return ours, peer


def images(*size, batch=2):
    return torch.randn(batch, 3, *(size or (64, 64)), generator=torch.Generator().manual_seed(1))


def assert_equal_outputs(one, other, **tolerance):
    torch.testing.assert_close(one, other, **{"atol": 1e-5, "rtol": 1e-5} | tolerance)


# Tracers


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and says so
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_jit_trace(kind, size, grad):
    """Checked by torch's own second trace, run on other images, and without this library's ops in it."""
    model = make(kind)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, images(*size))
        other = torch.randn(2, 3, *size)
        assert_equal_outputs(traced(other), model(other))
    assert "beit_fast::" not in str(traced.inlined_graph)
    saved = io.BytesIO()
    torch.jit.save(traced, saved)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace_of_accelerated_models(grad):
    model = beit_fast.accelerate(noisy(timm_beit(BeitConfig(width=48, depth=2, num_heads=3).for_classification(5))))
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model.eval(), images(224, 224))
        assert_equal_outputs(traced(images(224, 224) + 1), model(images(224, 224) + 1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_make_fx_with_gradients(kind, training):
    model = make(kind).train(training)
    x = images(64, 96).requires_grad_()

    def gradient(x):
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    assert_equal_outputs(make_fx(model)(x)(x), model(x))
    assert_equal_outputs(make_fx(gradient)(x)(x), gradient(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fx_symbolic_trace(kind, training):
    model = make(kind, drop_path_rate=0.4).train(training)
    graph = torch.fx.symbolic_trace(model)
    for size in ((64, 64), (48, 80)):  # the graph is that of every size
        results = []
        for m in (graph, model):
            torch.manual_seed(0)
            results.append(m(images(*size)))
        assert_equal_outputs(*results)
    assert sum(node.name.startswith("softmax") for node in graph.graph.nodes) == 2
    assert {"blocks.0.attn.proj", "blocks.1.mlp.fc2"} <= {node.target for node in graph.graph.nodes}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_legacy_onnx_with_gradients_on(kind, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make(kind)
    torch.onnx.export(model, (images(),), tmp_path / "m.onnx", dynamo=False, input_names=["x"], opset_version=18)
    (found,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": images().numpy()})
    assert_equal_outputs(torch.from_numpy(found), model(images()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap", [nn.Sequential, nn.Identity, lambda model: nn.ModuleDict({"m": model}), torch.fx.symbolic_trace]
)
def test_scripting_is_refused_in_one_line(wrap):
    model = make() if wrap is nn.Identity else wrap(make())
    with pytest.raises(TypeError, match=r"^BEiT cannot be scripted .*use torch\.export or torch\.jit\.trace$"):
        torch.jit.script(model)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_predict_tokens_exports_with_any_mask(strict):
    class Predict(nn.Module):
        def __init__(self):
            super().__init__()
            config = BeitConfig(width=48, depth=2, num_heads=3, patch_size=16, image_size=64, vocab_size=20)
            self.model = noisy(BeitForMaskedImageModeling(config)).eval()

        def forward(self, images, mask):
            return self.model.predict_tokens(images, mask)

    batch, model = torch.export.Dim("batch"), Predict()
    masks = [torch.rand(n, 16, generator=torch.Generator().manual_seed(n)) < share for n, share in ((2, 0.4), (3, 0.9))]
    with torch.no_grad():
        program = torch.export.export(
            model, (images(), masks[0]), dynamic_shapes={"images": {0: batch}, "mask": {0: batch}}, strict=strict
        )
        assert not [node for node in program.graph.nodes if "beit_fast" in str(node.target)]
        for mask in masks:
            x = images(batch=len(mask))
            assert_equal_outputs(program.module()(x, mask), model(x, mask))


# Devices


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_meta_device(kind, size):
    model = make(kind, drop_path_rate=0.2, device="meta")
    for training in (False, True):
        assert model.train(training)(images(*size).to("meta")).shape == (2, 5)
    assert model.to("meta")(images(*size).to("meta")).is_meta


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_weights_loaded_after_to_empty(rate, assign):
    """Everything that is no parameter is as it was: what drop path drops above all."""
    source = make(drop_path_rate=rate)
    model = beit_fast.create_model("beit_base_patch16_224", **SMALL, drop_path_rate=rate, device="meta")
    if not assign:
        junk = [torch.full((64, 64), torch.nan) for _ in range(32)]  # freed, so that empty memory is of this kind
        del junk
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    keys = torch.arange(2)
    for m in (model, source):
        m.train()
    assert_equal_outputs(model(images(), keys), source(images(), keys))
    expected = drop_path_scales(torch.linspace(0, rate, 2), keys, 2)
    assert torch.equal(model.drop_path(2, keys, torch.device("cpu")), expected)


# Attention maps


@pytest.mark.parametrize("kind", KINDS)
def test_attention_extract_by_hooks(kind):
    from timm.utils.attention_extract import AttentionExtract

    model = make(kind)
    before = model(images())
    maps = AttentionExtract(model, method="hook")(images())
    assert list(maps) == ["blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop"]
    for block, found in enumerate(maps.values()):
        assert_equal_outputs(found, model.attention_probabilities(images(), block), atol=1e-6)
    assert_equal_outputs(model(images()), before)


def test_hooks_on_the_projection_dropout_see_the_attentions_output():
    ours, peer = pair()
    seen = []
    for model in (ours, peer):
        model.blocks[1].attn.proj_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model(images())
    assert_equal_outputs(*seen)


# timm's arguments


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_bias": False},
        {"norm_layer": nn.RMSNorm},
        {"norm_layer": lambda width, **kwargs: nn.LayerNorm(width, eps=1e-3, **kwargs)},
        {"norm_layer": lambda width, **kwargs: nn.LayerNorm(width, bias=False, **kwargs)},
        {"norm_layer": lambda width, **kwargs: nn.LayerNorm(width, elementwise_affine=False, **kwargs)},
        {"qkv_bias": False, "norm_layer": nn.RMSNorm, "global_pool": "token"},
        {"feature_cls": "getter", "features_only": True},
    ],
)
def test_arguments_that_change_the_architecture(options):
    if "features_only" in options:
        found, expected = (
            library.create_model("beit_base_patch16_224", **SMALL, **options, out_indices=(0, 1)).eval()
            for library in (beit_fast, timm)
        )
        expected.load_state_dict(found.state_dict())
    else:
        found, expected = pair(**options)
    for training in (False, True):
        one, other = (m.train(training)(images()) for m in (found, expected))
        assert_equal_outputs(one, other, atol=2e-5)
    gradients = []
    for m in (found, expected):
        m.zero_grad(set_to_none=True)
        out = m(images())
        sum(t.square().mean() for t in (out if isinstance(out, list) else [out])).backward()
        gradients.append({name: p.grad for name, p in m.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize(
    ("options", "error"), [({"not_an_argument": 1}, TypeError), ({"global_pool": "max"}, AssertionError)]
)
def test_wrong_arguments_raise_what_timm_raises(options, error):
    for library in (timm, beit_fast):
        with pytest.raises(error):
            library.create_model("beit_base_patch16_224", **SMALL, **options)
    with pytest.raises(ValueError, match="is unknown"):
        beit_fast.create_model("beit_base_patch16_224", **SMALL, **options)


def test_a_new_head_is_in_the_mode_of_its_model():
    for model in pair():
        model.reset_classifier(7)
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("size", [64, 96, (64, 96)])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_filter_fn_fits_weights_to_another_size(kind, size):
    """As timm's loaders call it: `checkpoint_filter_fn` of the module in which the model's class is."""
    source = make(kind)
    target = beit_fast.create_model("beit_base_patch16_224", **SMALL | {"img_size": size}, **KINDS[kind]).eval()
    target.load_state_dict(sys.modules[type(target).__module__].checkpoint_filter_fn(source.state_dict(), target))
    source.set_input_size(size)
    assert_equal_outputs(target(images(64, 96)), source(images(64, 96)))


@pytest.mark.parametrize("name", ["pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_rate"])
def test_rates_of_dropout(name):
    """Off in evaluation; in training the mean of many passes is near the result without, as it is in timm's model."""
    ours, peer = pair(**{name: 0.3})
    assert_equal_outputs(ours(images()), peer(images()))
    dropped = []
    for model in (ours, peer):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = torch.stack([model.train()(images()) for _ in range(200)])
        assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
        dropped.append((outputs.mean(0), outputs.std(0)))
    (mean, std), (peer_mean, peer_std) = dropped
    assert ((mean - peer_mean).abs() < 6 * peer_std / 200**0.5 + 1e-4).all()
    assert ((std / peer_std).log().abs() < 0.5).all()


def test_dropout_is_the_same_again_where_blocks_are_checkpointed():
    model = make(attn_drop_rate=0.3, proj_drop_rate=0.2).train()

    def gradients():
        torch.manual_seed(3)
        return torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))

    expected = gradients()
    model.set_grad_checkpointing()
    for one, other in zip(gradients(), expected, strict=True):
        assert_equal_outputs(one, other)


def test_norms_that_config_json_cannot_describe_are_not_saved_silently(tmp_path):
    with pytest.raises(ValueError, match="cannot describe a model with its own norm_layer"):
        make(norm_layer=nn.RMSNorm).save_pretrained(tmp_path)
    model = make(norm_layer=lambda width: nn.LayerNorm(width, eps=1e-3), qkv_bias=False)
    model.save_pretrained(tmp_path)
    assert_equal_outputs(Beit.from_pretrained(tmp_path)(images()), model(images()))


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"pretrained": True}, {"filter": "beit_*"}, {"filter": "beitv2*"}, {"filter": "*_384", "pretrained": True},
        {"filter": ["beit_base*", "*512*"]}, {"filter": "*in22k_ft_in22k", "pretrained": True},
        {"filter": "beit*", "exclude_filters": "*large*"}, {"filter": "beit_giant*"},
    ],
)  # fmt: skip
def test_list_models_filters_as_timm_does(arguments):
    ours = [name for name in beit_fast.list_models(**arguments) if "tiny" not in name and "small" not in name]
    assert sorted(ours) == sorted(timm.list_models(**{"filter": "beit*"} | arguments, module="beit"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32, torch.bool])
def test_masks_of_integers(dtype):
    config = BeitConfig(width=48, depth=2, num_heads=3, patch_size=16, image_size=64, vocab_size=20)
    model = noisy(BeitForMaskedImageModeling(config)).eval()
    mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    tokens = torch.randint(0, 20, (int(mask.sum()),), generator=torch.Generator().manual_seed(1))
    expected = model(images(), mask, tokens)
    found = model(images(), mask.to(dtype), tokens)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(model.predict_tokens(images(), mask.to(dtype)), model.predict_tokens(images(), mask))
