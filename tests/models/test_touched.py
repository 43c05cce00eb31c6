"""Hooks, replaced layers and transforms: what was put onto or into a model is heeded, as it is by timm's models."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from beit_fast import kernels
from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling
from benchmarks.baselines.libraries import timm_beit
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()
pytest.importorskip("timm")

SMALL = BeitConfig(width=48, depth=3, num_heads=3, patch_size=8, image_size=32, vocab_size=20)
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MASK = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.4
TOKENS = torch.randint(0, 20, (int(MASK.sum()),), generator=torch.Generator().manual_seed(3))


def noisy(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def pair(pool="avg"):
    """Our model and timm's with the same weights."""
    config = SMALL.for_classification(5, global_pool=pool)
    ours, peer = noisy(Beit(config)), timm_beit(config)
    peer.load_state_dict(ours.state_dict())
    return ours, peer


def step(model):
    model.zero_grad(set_to_none=True)
    out = model(X)
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(one, other):
    torch.testing.assert_close(one[0], other[0], atol=2e-5, rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        assert (one[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


WATCHED = ["patch_embed", "patch_embed.proj", "norm", "fc_norm", "head_drop", "head"]
WATCHED += [f"blocks.1{part}" for part in ("", ".norm1", ".attn", ".attn.proj", ".norm2", ".mlp", ".mlp.fc1")]
WATCHED += ["blocks.0", "blocks.0.norm1", "blocks.2", "blocks.2.mlp.fc2"]


@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("name", WATCHED)
def test_hooks_see_what_they_see_in_timm(name, pool):
    models = pair(pool)
    steps, seen, gradients = [], [], []
    for model in models:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        module.register_full_backward_hook(lambda module, inputs, outputs: gradients.append(outputs[0]))
        steps.append(step(model))
    (ours_in, ours_out), (peer_in, peer_out) = seen
    torch.testing.assert_close(ours_in, peer_in, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours_out, peer_out, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    assert_same_step(*steps)


def test_hooks_that_change_something_change_the_result():
    ours, peer = pair()
    before = step(ours)[0]
    for model in (ours, peer):
        model.blocks[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5, *inputs[1:]))
        model.blocks[2].attn.proj.register_forward_hook(lambda module, inputs, output: output + 1)
    assert_same_step(step(ours), step(peer))
    assert not torch.allclose(step(ours)[0], before, atol=1e-3)


class LowRank(nn.Module):
    """An adapter around a linear layer that shows its `weight`, as PEFT's do."""

    def __init__(self, base):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features, generator=generator) * 0.2)
        self.up = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) * 0.2)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("place", ["attn.proj", "mlp.fc1", "mlp.fc2"])
def test_adapters_are_not_passed_over(place):
    ours, peer = pair()
    before = step(ours)[0]
    parent, _, child = place.rpartition(".")
    for model in (ours, peer):
        for block in model.blocks:
            setattr(block.get_submodule(parent), child, LowRank(block.get_submodule(place)))
    assert_same_step(step(ours), step(peer))
    assert not torch.allclose(step(ours)[0], before, atol=1e-3)


def test_an_adapter_of_qkv_adds_to_the_biases():
    """timm reads the weight of this layer without calling it, and would pass over the adapter."""
    ours, peer = pair()
    for block, other in zip(ours.blocks, peer.blocks, strict=True):
        block.attn.qkv = LowRank(block.attn.qkv)
        with torch.no_grad():
            other.attn.qkv.weight += block.attn.qkv.up @ block.attn.qkv.down
    torch.testing.assert_close(ours(X), peer(X), atol=2e-5, rtol=1e-5)


def test_parametrised_and_pruned_layers():
    models = pair()
    for model in models:
        torch.nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.fc1)
        prune.l1_unstructured(model.blocks[0].attn.proj, "weight", amount=0.5)
    assert_same_step(*(step(model) for model in models))


@pytest.mark.filterwarnings("ignore")  # of torch about the successor of this quantisation
def test_quantised_layers():
    """Of the MLPs: of the packed qkv timm reads the weight, which a quantised layer does not have."""
    names = {f"blocks.{i}.mlp.{layer}" for i in range(3) for layer in ("fc1", "fc2")}
    ours, peer = (torch.ao.quantization.quantize_dynamic(model.eval(), names) for model in pair())
    assert ours.blocks[0].mlp.fc1.weight().dtype == torch.qint8
    torch.testing.assert_close(ours(X), peer(X), atol=1e-4, rtol=0)
    torch.ao.quantization.quantize_dynamic(ours, {nn.Linear}, inplace=True)
    assert ours.blocks[0].attn.qkv.weight().dtype == torch.qint8
    assert torch.isfinite(ours(X)).all()


def test_a_replaced_norm_is_used():
    class Shifted(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 0.3

    models = pair("token")
    for model in models:
        for module in (model.norm, model.blocks[0].norm2, model.blocks[1].norm1):
            module.__class__ = type(module) if type(module) is Shifted else Shifted
    assert_same_step(*(step(model) for model in models))


def test_touched_blocks_with_drop_path_and_checkpointing():
    config = SMALL.for_classification(5, drop_path_rate=0.5)
    model = noisy(Beit(config)).train()
    keys = torch.arange(2)

    def gradients():
        model.zero_grad(set_to_none=True)
        model(X, sample_keys=keys).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        for one, other in zip(gradients(), expected, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()
    assert len(seen) == 3 + 6  # computed twice where checkpointed


@pytest.mark.parametrize("name", ["blocks.0", "blocks.2", "blocks.2.attn", "blocks.1.mlp", "norm", "lm_head"])
def test_masked_image_modelling_heeds_them_too(name):
    model = noisy(BeitForMaskedImageModeling(SMALL))
    seen = []

    def gradients(m):
        return torch.autograd.grad(m(X, MASK, TOKENS).loss, list(m.parameters()))

    expected = gradients(model)
    watched = copy.deepcopy(model)
    watched.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    for one, other in zip(gradients(watched), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert seen == [{"norm": (len(TOKENS), 48), "lm_head": (len(TOKENS), 20)}.get(name, (2, 17, 48))]


def test_function_transforms():
    """Gradients of every single sample, as differential privacy and influence functions take them."""
    model = pair()[0].eval()
    weights = dict(model.named_parameters())

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, X)
    for index in range(len(X)):
        expected = torch.autograd.grad(model(X[index : index + 1]).square().sum(), list(weights.values()))
        for name, gradient in zip(weights, expected, strict=True):
            assert (found[name][index] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_second_derivatives_need_the_plain_formulas():
    ours, peer = pair()

    def penalty(model):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), model.blocks[0].attn.qkv.weight)[0]

    with pytest.raises(RuntimeError, match=r"no second derivatives .*use_backend\('reference'\)"):
        penalty(ours)
    with kernels.use_backend("reference"):
        found = penalty(ours)
    expected = penalty(peer)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
