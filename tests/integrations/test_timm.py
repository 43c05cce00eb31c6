"""accelerate and restore on timm's BEiT: the same numbers, names and objects as before."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import beit_fast
from beit_fast import BeitConfig
from benchmarks.baselines.libraries import timm_beit
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()
timm = pytest.importorskip("timm")

SMALL = BeitConfig(width=48, depth=3, num_heads=3, patch_size=8, image_size=32)
ARCHITECTURES = {
    "plus": {"relative_position_bias": "per_block"},
    "shared": {"relative_position_bias": "shared"},
    "plain": {"relative_position_bias": "none", "use_abs_pos_emb": True, "layer_scale_init": None},
}


def make(architecture="plus", seed=0, **overrides):
    config = SMALL.for_classification(7, **ARCHITECTURES[architecture])
    torch.manual_seed(seed)
    model = timm_beit(config, **overrides)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3])


def step(model, x=X, seed=5):
    """Output, and every gradient by name, of one training step with its own random numbers."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    out = model(x)
    F.cross_entropy(out.flatten(0, -2)[: len(Y)].float(), Y).backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, tolerance=1e-5):
    assert (one[0] - other[0]).abs().max() < tolerance
    assert one[1].keys() == other[1].keys()
    for name, expected in other[1].items():
        assert (one[1][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-8, name


def is_faster(model):
    return any(type(module).__module__.startswith("beit_fast") for module in model.modules())


@pytest.mark.parametrize("pool", ["avg", "token", ""])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("training", [True, False])
def test_the_same_outputs_and_gradients(architecture, pool, training):
    model = make(architecture, global_pool=pool).train(training)
    expected = step(model)
    identities = {name: id(p) for name, p in model.named_parameters()}
    keys, text = list(model.state_dict()), repr(model)
    assert beit_fast.accelerate(model) is model
    assert is_faster(model)
    assert_same(step(model), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected[0], atol=1e-5, rtol=0)
    assert beit_fast.restore(beit_fast.accelerate(model)) is model
    assert not is_faster(model)
    again = step(model)
    assert torch.equal(again[0], expected[0])


def test_both_kinds_of_tables_at_once():
    model = make("shared", use_rel_pos_bias=True)
    expected = step(model)
    assert_same(step(beit_fast.accelerate(model)), expected)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beit_large_patch16_224"])
def test_full_width(name):
    model = timm.create_model(name, depth=1)
    x = torch.randn(4, 3, 224, 224)
    expected = step(model, x, seed=1)[0]
    torch.testing.assert_close(step(beit_fast.accelerate(model), x, seed=1)[0], expected, atol=1e-5, rtol=0)


def test_drop_path_draws_the_same_random_numbers():
    model = make(drop_path_rate=0.6).train()
    expected = step(model)
    assert not torch.equal(expected[0], step(model, seed=6)[0])
    assert_same(step(beit_fast.accelerate(model)), expected)


def test_an_optimizer_made_before_keeps_working():
    model, peer = make(), make()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, peer)]
    beit_fast.accelerate(model)
    for _ in range(3):
        for m, optimizer in zip((model, peer), optimizers, strict=True):
            step(m)
            optimizer.step()
    torch.testing.assert_close(model(X), peer(X), atol=1e-4, rtol=0)


def test_under_autocast():
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = step(model)
        found = step(beit_fast.accelerate(model))
    exact = step(beit_fast.restore(model))
    assert (found[0] - exact[0]).norm() <= 1.2 * (expected[0] - exact[0]).norm()
    for name, grad in exact[1].items():
        limit = 1.2 * (expected[1][name] - grad).norm() + 2e-3 * grad.norm()
        assert (found[1][name] - grad).norm() <= limit, name


def test_in_half_precision_throughout():
    model = make().bfloat16()
    x = X.bfloat16()
    with torch.no_grad():
        expected = model(x)
        found = beit_fast.accelerate(model)(x)
        exact = copy.deepcopy(beit_fast.restore(model)).float()(X)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() <= 1.2 * (expected - exact).norm()


def test_copies_and_pickles():
    model = beit_fast.accelerate(make("shared"))
    expected = model(X)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert is_faster(twin)
        torch.testing.assert_close(twin(X), expected)
        beit_fast.restore(twin)
        assert not is_faster(twin)
    assert is_faster(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_without_graph_breaks(architecture):
    model = make(architecture, depth=2)
    expected = step(model)
    compiled = torch.compile(beit_fast.accelerate(model), backend="aot_eager", fullgraph=True)
    assert_same(step(compiled), (expected[0], {f"_orig_mod.{n}": g for n, g in expected[1].items()}))


def test_gradient_checkpointing():
    model = make("shared", drop_path_rate=0.3).train()
    expected = step(model)
    model.set_grad_checkpointing()
    assert_same(step(beit_fast.accelerate(model)), expected)


def test_distributed_data_parallel():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = make("shared")
        expected = step(model)
        parallel = nn.parallel.DistributedDataParallel(beit_fast.accelerate(model))
        found = step(parallel)
        assert_same((found[0], {name.removeprefix("module."): g for name, g in found[1].items()}), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """DistributedDataParallel on two processes: the gradients of the plain model on the whole batch."""
    torch.multiprocessing.start_processes(train_in_two, (tmp_path / "store", tmp_path), nprocs=2, start_method="spawn")
    model = make("shared").train()
    expected = step(model)[1]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name


def train_in_two(rank, store, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    model = beit_fast.accelerate(make("shared").train())
    parallel = nn.parallel.DistributedDataParallel(model)
    F.cross_entropy(parallel(X[2 * rank : 2 * rank + 2]), Y[2 * rank : 2 * rank + 2]).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_features():
    model = timm_beit(SMALL.for_classification(7))
    expected = model.forward_intermediates(X, intermediates_only=True)
    found = beit_fast.accelerate(model).forward_intermediates(X, intermediates_only=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_model_within_another():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = make(), nn.Linear(7, 2)

        def forward(self, x):
            return self.head(self.backbone(x))

    wrapper = Wrapper()
    expected = wrapper(X)
    torch.testing.assert_close(beit_fast.accelerate(wrapper)(X), expected, atol=1e-5, rtol=0)
    assert is_faster(wrapper)


def test_blocks_with_something_in_them_run_their_own_forward():
    """Attention maps by hooks, active dropout and replaced layers keep working."""
    model = beit_fast.accelerate(make(proj_drop_rate=0.5))
    peer = make(proj_drop_rate=0.5)
    assert_same(step(model.train()), step(peer.train()))
    assert_same(step(model.eval()), step(peer.eval()))
    seen = []
    handle = model.blocks[1].attn.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert_same(step(model), step(peer))
    assert seen == [(4, 17, 48)]
    handle.remove()

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for m in (model, peer):
        for block in m.blocks:
            block.attn.proj.__class__ = Scaled
            block.mlp.fc1.__class__ = Scaled
    assert_same(step(model), step(peer))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"swiglu_mlp": True}, "SwiGLU"),
        ({"scale_mlp": True}, "its MLP has a norm"),
        ({"norm_layer": nn.RMSNorm}, "not LayerNorms"),
    ],
)
def test_what_is_not_supported_is_named_and_left_alone(options, problem):
    model = make(**options)
    with pytest.raises(ValueError, match=rf"block 'blocks\.0' is not supported: .*{problem}"):
        beit_fast.accelerate(model)
    assert not is_faster(model)


def test_other_models_are_refused():
    with pytest.raises(
        ValueError, match=r"nothing to accelerate in Linear; supported are timm's Beit and transformers'"
    ):
        beit_fast.accelerate(nn.Linear(1, 1))
    own = beit_fast.create_model("beit_tiny_patch16_224", depth=1)
    assert beit_fast.accelerate(own) is own
    assert beit_fast.restore(own) is own


def test_registered_names():
    from beit_fast.integrations import timm_beit as integration

    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("beit_fast_tiny_patch16_224")
    names = integration.register()
    assert "beit_fast_base_patch16_224" in names
    assert "beit_fastv2_large_patch16_224" in names
    model = timm.create_model("beit_fast_tiny_patch16_224", num_classes=3, drop_path_rate=0.1, depth=2)
    assert isinstance(model, beit_fast.Beit)
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 3)
    tagged = timm.create_model("beit_fast_base_patch16_224.in22k_ft_in22k", embed_dim=48, num_heads=3, depth=1)
    assert tagged.num_classes == 21841
    features = timm.create_model("beit_fast_tiny_patch16_224", features_only=True, out_indices=(0, 1), depth=2)
    assert features.feature_info.channels() == [192, 192]
