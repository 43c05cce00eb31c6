"""The encoder as a GPU runs it, against the plain one: same function, better rounding, exact tokens."""

import copy

import pytest
import torch
import torch.nn.functional as F

from beit_fast.kernels import use_backend
from beit_fast.kernels.backend import interpreting, triton_installed
from beit_fast.tokenizers import DalleTokenizer, DiscreteVAE
from beit_fast.tokenizers.dalle import DalleEncoder, map_pixels
from beit_fast.tokenizers.fused_encoder import FusedEncoder


def make(n_hid=8, vocab=60, blocks=2, seed=0):
    """Biases and residual branches that count."""
    torch.manual_seed(seed)
    encoder = DalleEncoder(n_hid, vocab, blocks).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.normal_(std=0.3)
        else:
            parameter.mul_(2)
    return encoder


def images(count=2, height=32, width=48):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_same_function_in_fp64(blocks, folded):
    """Whatever is moved, put off or added in place: nothing but rounding changes."""
    encoder = make(blocks=blocks).double()
    if folded:
        DalleTokenizer(encoder).to_precision(torch.float64)
    pixels = images().double()
    expected = encoder.features(map_pixels(pixels))
    fused = FusedEncoder(encoder, torch.float64, 0.8, 0.1)
    # biases that a fused pass adds are fp32, pixels too
    torch.testing.assert_close(fused(pixels), expected, rtol=1e-6, atol=1e-6 * float(expected.max()))
    assert torch.equal(fused(pixels), fused(pixels)), "the weights must not be worked on in place"


def official_features(encoder, x):
    """The original's mixed precision on a GPU: fp16 results of every convolution, of its bias and of every addition."""

    def conv(layer, x):
        w = layer.w.half().float()
        return (F.conv2d(x.float(), w, padding=w.shape[-1] // 2).half() + layer.b.half()[:, None, None]).half()

    x = conv(encoder.blocks[0], x.half())
    for group in list(encoder.blocks)[1:-1]:
        for layer in group:
            if isinstance(layer, torch.nn.MaxPool2d):
                x = layer(x.float()).half()
                continue
            hidden = x
            for step in layer.convs:
                hidden = conv(step, hidden.relu())
            identity = x if isinstance(layer.id_path, torch.nn.Identity) else conv(layer.id_path, x)
            x = identity + (hidden * layer.gain)
    return x.relu()


def test_rounds_no_more_than_the_official_mixed_precision():
    """Features and tokens against everything in fp64, sums in fp32 as on a GPU.

    Over 20 such encoders and 15,360 positions features err by 9.38e-4 (the official precision by 9.47e-4), and 32
    tokens differ (27): the same but for noise, for which a test of four encoders must leave room.
    """
    errors, wrong = torch.zeros(4, 2), torch.zeros(2)
    for seed in range(4):
        encoder, pixels = make(n_hid=32, vocab=2000, seed=10 + seed), images(4, 64, 64)
        exact = copy.deepcopy(encoder).double().features(map_pixels(pixels.double()))
        ours = FusedEncoder(encoder, torch.float16, 0.8, 0.1)(pixels)
        theirs = official_features(encoder, map_pixels(pixels))
        assert ours.dtype == theirs.dtype == torch.float16
        weight, bias = DalleTokenizer(encoder).head()
        tokens = [
            (features.double().permute(0, 2, 3, 1) @ weight.double().t() + bias.double()).argmax(-1)
            for features in (exact, ours, theirs)
        ]
        for number, features in enumerate((ours, theirs)):
            errors[seed, number] = (features.double() - exact).norm() / exact.norm()
            wrong[number] += (tokens[1 + number] != tokens[0]).sum()
    assert errors.mean(0)[0] <= 1.02 * errors.mean(0)[1], errors
    assert wrong[0] <= wrong[1] + 3 * (1 + wrong.sum()).sqrt(), wrong
    assert wrong.max() < 0.02 * 4 * 4 * 64


@pytest.mark.skipif(not triton_installed(), reason="needs triton")
@pytest.mark.skipif(not interpreting(), reason="runs with TRITON_INTERPRET=1: test_the_kernels_in_the_interpreter")
def test_tokens_interpreted():
    encoder = make(n_hid=4, vocab=70, blocks=1, seed=2)
    pixels = images(2, 16, 24)
    mask = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(4)) < 0.6
    tokenizer = DalleTokenizer(copy.deepcopy(encoder)).to_precision(torch.float16)
    with use_backend("triton"):
        assert tokenizer.prepare() is tokenizer
        assert tokenizer._fused is not None
        features = tokenizer._fused(pixels)
        ids = tokenizer.encode(pixels)
        assert torch.equal(tokenizer.encode(pixels, mask), ids[mask])
        tokenizer.float()
        assert tokenizer._fused is None, "weights of another precision must not leave the old ones in use"
        assert tokenizer._exact_head is None
    plain = encoder.features(map_pixels(pixels))
    assert (features.float() - plain).norm() < 5e-3 * plain.norm()
    weight, bias = DalleTokenizer(encoder).head()
    exact = features.double().permute(0, 2, 3, 1) @ weight.double().t() + bias.double()
    assert torch.equal(ids, exact.argmax(-1))


@pytest.mark.skipif(interpreting(), reason="already in the interpreter's process")
@pytest.mark.slow
@pytest.mark.skipif(not triton_installed(), reason="needs triton")
def test_the_kernels_in_the_interpreter(run_interpreted):
    assert " passed" in run_interpreted(__file__, "interpreted")


def test_nothing_is_prepared_on_a_cpu():
    for tokenizer in (DalleTokenizer(make()), DiscreteVAE(20, 4, 8)):
        pixels = images()
        expected = tokenizer.encode(pixels)
        assert tokenizer.prepare() is tokenizer
        assert tokenizer._fused is tokenizer._compiled is tokenizer._exact_head is None
        assert torch.equal(tokenizer.encode(pixels), expected)


def test_compiled_features_and_a_compiler_that_fails(capsys):
    """Where fused parts are missing features are compiled; without a working compiler they run as they are."""
    tokenizer = DiscreteVAE(20, 4, 8)
    pixels, calls = images(), []
    expected = tokenizer.encode(pixels)

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    tokenizer._compiled = torch.compile(tokenizer.features, backend=backend)
    assert torch.equal(tokenizer.encode(pixels), expected)
    assert calls

    def broken(graph, inputs):
        raise RuntimeError("no C compiler\nsecond line")

    torch._dynamo.reset()
    tokenizer._compiled = torch.compile(tokenizer.features, backend=broken)
    assert torch.equal(tokenizer.encode(pixels), expected)
    assert tokenizer._compiled is None
    error = capsys.readouterr().err
    assert "runs uncompiled" in error
    assert error.count("\n") == 1
