"""Tokenizers on a GPU, against the same on the CPU."""

import pytest
import torch

from beit_fast.tokenizers import DalleTokenizer, load_tokenizer
from beit_fast.tokenizers.dalle import DalleDecoder, DalleEncoder
from beit_fast.train.tasks.tokenizer import held_out_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_demo_gives_the_same_tokens() -> None:
    images = held_out_images(16, 112)
    mask = torch.rand(16, 14, 14) < 0.4
    tokenizer = load_tokenizer("demo", device="cuda")
    on_cpu = load_tokenizer("demo").encode(images)
    ids = tokenizer.encode(images.cuda())
    assert (ids.cpu() == on_cpu).float().mean() > 0.98  # cuDNN may use TF32: near ties fall the other way
    assert (tokenizer.encode(images.cuda(), mask) == ids[mask.cuda()]).float().mean() > 0.98
    assert tokenizer.decode(ids).shape == images.shape


def test_dalle_in_half_precision_agrees_with_single() -> None:
    torch.manual_seed(0)
    encoder, decoder = DalleEncoder(), DalleDecoder()
    images = held_out_images(4, 112)
    expected = DalleTokenizer(encoder, decoder).encode(images)
    tokenizer = DalleTokenizer(encoder, decoder).to_precision(torch.float16).cuda()
    ids = tokenizer.encode(images.cuda())
    assert (ids.cpu() == expected).float().mean() > 0.99
    assert tokenizer.decode(ids).isfinite().all()
