"""The tokenizers' fast path: gains folded into weights, half precision, and how many tokens that moves."""

import numpy as np
import pytest
import torch

from beit_fast.data import builtin
from beit_fast.tokenizers import DalleTokenizer
from beit_fast.tokenizers.agreement import precision_agreement
from beit_fast.tokenizers.dalle import DalleEncoder


@pytest.fixture(scope="module")
def pictures():
    """Four built-in images of 112 x 112: (4, 3, 112, 112) in [0, 1]."""
    images = np.stack([builtin.render(index, seed=11, size=112) for index in range(4)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_folded_gains(blocks, pictures):
    """1/16 and 1/64 are powers of two: not one bit differs; 1/144 is rounded once per weight."""
    torch.manual_seed(0)
    encoder = DalleEncoder(8, 60, blocks).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.normal_(std=0.2)
    images = pictures[:2, :, :32, :32].contiguous(memory_format=torch.channels_last)
    encoder.to(memory_format=torch.channels_last)
    expected = encoder.features(images)
    tokenizer = DalleTokenizer(encoder).to_precision(torch.float32)
    once = encoder.features(images)
    tokenizer.to_precision(torch.float32)
    assert torch.equal(encoder.features(images), once)
    tolerance = 0.0 if blocks < 3 else 1e-5
    torch.testing.assert_close(once, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_half_precision_keeps_its_gains():
    encoder = DalleEncoder(8, 60)
    weight = encoder.blocks.group_1.block_1.res_path.conv_4.w.detach().clone()
    DalleTokenizer(encoder).to_precision(torch.float16)
    assert torch.equal(encoder.blocks.group_1.block_1.res_path.conv_4.w, weight.half())


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.97), (torch.float16, 0.99)])
def test_agreement_with_fp32_on_built_in_images(dtype, least, pictures):
    share, count = precision_agreement("demo", dtype, pictures.split(4))
    assert count == 4 * 14 * 14
    assert share >= least, share
