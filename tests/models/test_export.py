"""Compiling without graph breaks; exporting into files that run where this library is not."""

import subprocess
import sys

import pytest
import torch

import beit_fast
from beit_fast.models import Beit, BeitConfig, BeitFeatures, BeitForMaskedImageModeling

SMALL = BeitConfig(width=48, depth=2, num_heads=3, patch_size=8, image_size=32, vocab_size=20)
KINDS = {
    "plus": {},
    "shared": {"relative_position_bias": "shared"},
    "plain": {"relative_position_bias": "none", "use_abs_pos_emb": True, "layer_scale_init": None},
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def noisy(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def classifier(kind="plus", **overrides):
    return noisy(Beit(SMALL.for_classification(5, **{**KINDS[kind], **overrides}))).eval()


def images(batch, side=32):
    height, width = side if isinstance(side, tuple) else (side, side)
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("kind", ["plus", slow("shared"), slow("plain")])
def test_compiles_as_one_graph(kind):
    model = classifier(kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images(2)
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    pairs = zip(gradients(model, found.sum()), gradients(model, expected.sum()), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


SIDES = [(32, 32), (48, 48), (32, 48), (40, 24), (24, 40), (64, 32), (16, 56), (72, 64), (48, 16), (80, 24), (56, 88)]


# aot_eager also traces every operator's decomposition with symbolic sizes, which takes 4 to 13 s: once by default
ANY_SIZE = [("plus", None, "aot_eager"), ("shared", None, "eager")]
ANY_SIZE_SLOW = [(kind, dynamic, "aot_eager") for kind in KINDS for dynamic in (None, True)][1:]


@pytest.mark.parametrize(("kind", "dynamic", "backend"), [*ANY_SIZE, *(slow(*case) for case in ANY_SIZE_SLOW)])
def test_compiles_as_one_graph_at_any_image_size(kind, dynamic, backend):
    """More sizes than torch.compile would make graphs of: one graph serves them all, square or not."""
    torch._dynamo.reset()
    model = classifier(kind, depth=1)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for side in SIDES:
            torch.testing.assert_close(compiled(images(2, side)), model(images(2, side)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("side", [(32, 48), slow((40, 24)), slow((56, 64))])
def test_gradients_of_a_graph_of_another_image_size(side):
    torch._dynamo.reset()
    model = classifier(depth=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, expected = compiled(images(2, side)), model(images(2, side))
    for one, other in zip(gradients(model, found.sum()), gradients(model, expected.sum()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("accelerated", ["timm", slow("transformers")])
def test_accelerated_models_compile_at_images_that_are_not_square(accelerated):
    from benchmarks.baselines.libraries import timm_beit, transformers_beit

    torch._dynamo.reset()
    for side in ((32, 48), (48, 24), (64, 32)):
        config = BeitConfig(width=48, depth=1, num_heads=3, patch_size=8, image_size=side).for_classification(5)
        model = timm_beit(config) if accelerated == "timm" else transformers_beit(config, "BeitForImageClassification")
        beit_fast.accelerate(noisy(model).eval())
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            found, expected = (getattr(m(images(2, side)), "logits", m(images(2, side))) for m in (compiled, model))
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_pretraining_compiles_as_one_graph():
    model = noisy(BeitForMaskedImageModeling(SMALL)).train()
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    rows = mask.flatten().nonzero().squeeze(1)
    tokens = torch.randint(0, 20, (len(rows),))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(images(2), mask, tokens, masked_indices=rows).loss
    expected = model(images(2), mask, tokens).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    for one, other in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


RUN_ALONE = """
import sys
sys.modules["beit_fast"] = None  # neither installed nor imported, as far as this process can tell
import torch
program, given, expected = sys.argv[1:]
model, x, y = torch.export.load(program).module(), torch.load(given), torch.load(expected)
found = model(x)
found, y = (found, y) if isinstance(found, (list, tuple)) else ([found], [y])
print(max((a - b).abs().max().item() for a, b in zip(found, y, strict=True)))
"""


def run_alone(program, x, y, folder):
    """The largest difference between y and what the saved program makes of x in a process without this library."""
    torch.export.save(program, folder / "model.pt2")
    torch.save(x, folder / "x.pt")
    torch.save(y, folder / "y.pt")
    command = [sys.executable, "-c", RUN_ALONE, *(str(folder / name) for name in ("model.pt2", "x.pt", "y.pt"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def exported(model, side=32, strict=False):
    return torch.export.export(
        model, (images(2, side),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict
    )


def test_an_exported_program_runs_without_this_library(tmp_path):
    model = classifier()
    with torch.no_grad():
        program = exported(model)
        assert run_alone(program, images(5), model(images(5)), tmp_path) < 1e-5


@pytest.mark.parametrize(
    ("kind", "side", "strict"),
    [
        ("plus", 32, False),
        ("shared", 48, False),
        ("plus", (48, 24), False),
        slow("plain", 48, False),
        slow("plus", 48, True),
        slow("plus", (24, 56), True),
        slow("shared", (56, 32), True),
        slow("plain", 32, True),
    ],
)
def test_exports_with_any_batch_and_no_op_of_ours(kind, side, strict):
    model = classifier(kind)
    with torch.no_grad():
        program = exported(model, side, strict)
        assert not [node for node in program.graph.nodes if "beit_fast" in str(node.target)]
        for batch in (1, 3):
            torch.testing.assert_close(
                program.module()(images(batch, side)), model(images(batch, side)), atol=1e-5, rtol=0
            )


def test_features_export():
    model = BeitFeatures(classifier(), (0, 1))
    with torch.no_grad():
        program = exported(model)
        torch.testing.assert_close(list(program.module()(images(3))), model(images(3)), atol=1e-5, rtol=0)


def test_exporting_leaves_no_fake_matrix_behind():
    """Positions of a size that is met for the first time during an export."""
    model = classifier()
    with torch.no_grad():
        exported(model, 88)
        assert torch.isfinite(model(images(1, 88))).all()


def test_accelerated_models_export():
    from benchmarks.baselines.libraries import timm_beit, transformers_beit

    config = SMALL.for_classification(5)
    with torch.no_grad():
        for model in (timm_beit(config), transformers_beit(config, "BeitForImageClassification")):
            beit_fast.accelerate(noisy(model).eval())
            program = exported(model)
            assert not [node for node in program.graph.nodes if "beit_fast" in str(node.target)]
            found, expected = (m(images(3)) for m in (program.module(), model))
            torch.testing.assert_close(*(getattr(o, "logits", o) for o in (found, expected)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["plus", slow("plain")])
@pytest.mark.filterwarnings("ignore")  # those of torch.onnx and onnxscript about each other
def test_onnx(kind, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = classifier(kind)
    path = tmp_path / "model.onnx"
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (images(2),), dynamo=True, dynamic_shapes=shapes, verbose=False).save(path)
        session = onnxruntime.InferenceSession(path)
        (given,) = session.get_inputs()
        assert {node.domain for node in _nodes(path)} <= {"", "ai.onnx"}
        for batch in (1, 2, 5):
            (found,) = session.run(None, {given.name: images(batch).numpy()})
            torch.testing.assert_close(torch.from_numpy(found), model(images(batch)), atol=1e-5, rtol=0)


def _nodes(path):
    import onnx

    return onnx.load(path).graph.node
