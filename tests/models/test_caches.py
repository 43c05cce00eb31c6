"""No cache of the process keeps the mode of its first caller: what inference makes, training can use."""

import functools
import gc
import subprocess
import sys

import pytest
import torch

import beit_fast
from beit_fast import BeitConfig, BeitForMaskedImageModeling

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, "img_size": 64}
KINDS = {
    "plus": {},
    "shared": {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
    "plain": {"use_rel_pos_bias": False, "use_abs_pos_emb": True, "init_values": 0.0},
}
# (kind, image size): each met by no other test of this process, so that inference is the first to ask the caches
MET_FIRST_IN_INFERENCE = [
    ("plus", (64, 64)), ("plus", (208, 208)), ("plus", (304, 304)), ("plus", (112, 272)), ("plus", (32, 32)),
    ("shared", (176, 80)), ("shared", (336, 272)), ("plain", (240, 48)),
]  # fmt: skip


def make(kind="plus", **options):
    return beit_fast.create_model("beit_base_patch16_224", **SMALL, **KINDS[kind], **options)


@pytest.mark.parametrize(("kind", "size"), MET_FIRST_IN_INFERENCE)
def test_training_after_inference_mode(kind, size):
    x = torch.randn(1, 3, *size)
    forget_everything()
    with torch.inference_mode():
        make(kind, drop_path_rate=0.5).train()(x)
    make(kind, drop_path_rate=0.5).train()(x).sum().backward()  # of another model of the process


@pytest.mark.parametrize("size", [(64, 64), (272, 288), (96, 48)])
def test_pretraining_after_inference_mode(size):
    config = BeitConfig(width=48, depth=2, num_heads=3, image_size=64, vocab_size=20, drop_path_rate=0.3)
    model = BeitForMaskedImageModeling(config).train()
    x, patches = torch.randn(2, 3, *size), size[0] * size[1] // 256
    mask = torch.arange(2 * patches).view(2, patches) % 3 == 0
    tokens = torch.zeros(2, patches, dtype=torch.int64)
    forget_everything()
    with torch.inference_mode():
        model(x, mask, tokens)
    model(x, mask, tokens).loss.backward()


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_accelerated_models_train_after_inference_mode(library):
    from benchmarks.baselines.libraries import timm_beit, transformers_beit
    from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

    make_torchvision_importable()
    pytest.importorskip(library)
    config = BeitConfig(width=48, depth=2, num_heads=3, image_size=64).for_classification(5)
    for side in (64, 288):
        config = BeitConfig(width=48, depth=2, num_heads=3, image_size=side).for_classification(5)
        model = timm_beit(config) if library == "timm" else transformers_beit(config, "BeitForImageClassification")
        beit_fast.accelerate(model)
        x = torch.randn(1, 3, side, side)
        forget_everything()
        with torch.inference_mode():
            model.eval()(x)
        output = model.train()(x)
        getattr(output, "logits", output).sum().backward()


def caches():
    """Every `functools.lru_cache` of an imported module of the library, and every dictionary on module level."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "beit_fast" and module is not None:
            for attribute, value in vars(module).items():
                if isinstance(value, (functools._lru_cache_wrapper, dict)) and not attribute.startswith("__"):
                    yield f"{name}.{attribute}", value


def forget_everything():
    for _, cache in caches():
        if not isinstance(cache, dict):
            cache.cache_clear()


def tensors_within(value, depth=6):
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, (type, str, bytes, int, float, torch.nn.Module)):
        for inner in gc.get_referents(value):
            if not callable(inner) or isinstance(inner, torch.Tensor):
                yield from tensors_within(inner, depth - 1)


def test_no_cached_tensor_is_of_inference_mode_or_records_gradients():
    """Walks all caches after everything that fills them has run under inference mode, and at last as it is traced."""
    forget_everything()
    with torch.inference_mode():
        for kind, size in MET_FIRST_IN_INFERENCE:
            make(kind).eval()(torch.randn(1, 3, *size))
            make(kind).eval().attention_probabilities(torch.randn(1, 3, *size))
    filled = {name: list(tensors_within(cache)) for name, cache in caches()}
    filled = {name: tensors for name, tensors in filled.items() if tensors}
    assert {name.rpartition(".")[2] for name in filled} >= {"_pair_index", "_strip_index", "_on_device"}
    for name, tensors in filled.items():
        for tensor in tensors:
            assert type(tensor) is torch.Tensor, name
            assert not tensor.is_inference(), name
            assert not tensor.requires_grad, name
            assert not tensor.is_meta, name


FIRST_CALLERS = (
    "torch.device('meta')", "torch.no_grad()", "FakeTensorMode(allow_non_fake_inputs=True)", "torch.autocast('cpu')"
)  # fmt: skip
FIRST_CALLER = """
import os, torch, torch._dynamo, beit_fast
from torch._subclasses import FakeTensorMode

options = dict(embed_dim=48, depth=2, num_heads=3, num_classes=5, img_size=64, drop_path_rate=0.3)
sizes, keys = ((64, 64), (96, 48), (288, 288)), torch.arange(1)

def make():
    return beit_fast.create_model("beit_base_patch16_224", **options).train()

def call_twice(mode):
    model = make()
    with eval(mode):
        other = model if "Fake" in mode else make()  # torch initialises no weights in that mode
        for size in sizes:
            other(torch.randn(1, 3, *size))
    found = [model(torch.ones(1, 3, *size), keys) for size in sizes]
    with beit_fast.use_backend("reference"):
        for one, size in zip(found, sizes):
            torch.testing.assert_close(one, model(torch.ones(1, 3, *size), keys))
    sum(one.sum() for one in found).backward()

for mode in MODES:  # each in a process of its own, whose caches are empty
    if os.fork() == 0:
        call_twice(mode)
        print("well:", mode, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, mode
"""


def test_the_first_caller_may_be_in_any_mode():
    """The second caller gets the numbers of a fresh process."""
    code = FIRST_CALLER.replace("MODES", repr(FIRST_CALLERS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"well: {mode}" for mode in FIRST_CALLERS]
