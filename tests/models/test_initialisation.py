"""Initial weights against SciPy's distributions (Kolmogorov-Smirnov), tensor by tensor."""

import math

import pytest
import torch
from scipy.stats import kstest, truncnorm, uniform
from torch import nn

from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling
from beit_fast.models.initialisation import init_head

WIDTH, PATCH = 64, 8


def config(**options):
    return BeitConfig(width=WIDTH, depth=3, num_heads=2, patch_size=PATCH, image_size=32, vocab_size=300, **options)


def truncated_normal(std, bound):
    return truncnorm(-bound / std, bound / std, scale=std)


def deep(name):
    """What the output matrices of block l are divided by, l from 1 on (paper, section 2.5)."""
    is_output = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
    return math.sqrt(2 * (int(name.split(".")[1]) + 1)) if is_output else 1.0


def check(parameters, drawn):
    """Every tensor that `drawn` names follows its distribution; norms are 1, the others are 0."""
    for name, tensor in parameters:
        distribution = drawn(name)
        values = tensor.detach().double() * deep(name)
        if distribution is not None:
            assert kstest(values.flatten().numpy(), distribution.cdf).pvalue > 1e-5, name
            low, high = distribution.support()
            assert low - 1e-6 <= values.min() < values.max() <= high + 1e-6, name
        else:
            expected = 0.3 if "gamma" in name else float("norm" in name and name.endswith("weight"))
            assert torch.equal(tensor, torch.full_like(tensor, expected)), name


@pytest.mark.parametrize("std", [0.02, 0.7])
def test_pretraining_draws_within_one_standard_deviation(std):
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(config(init_std=std, layer_scale_init=0.3, use_abs_pos_emb=True))

    def drawn(name):
        is_drawn = name.endswith(("_token", "pos_embed")) or ("norm" not in name and name.endswith("weight"))
        return truncated_normal(std, std) if is_drawn else None

    check(model.named_parameters(), drawn)


@pytest.mark.parametrize("std", [0.02, 1.5])
def test_fine_tuning_draws_within_two(std):
    """The patch projection stays as torch makes it; tables of biases, norms and scales stay where they are."""
    torch.manual_seed(1)
    model = Beit(config(init_std=std, layer_scale_init=0.3, use_abs_pos_emb=True).for_classification(0))
    fan_in = 3 * PATCH**2

    def drawn(name):
        if name.startswith("patch_embed"):
            return uniform(-1 / math.sqrt(fan_in), 2 / math.sqrt(fan_in))
        is_drawn = name.endswith(("_token", "pos_embed")) or ("norm" not in name and name.endswith("weight"))
        return truncated_normal(std, 2.0) if is_drawn else None

    check(model.named_parameters(), drawn)


def test_the_extra_head_goes_on_counting_its_blocks():
    """BEiT v2: torch's own matrices, the outputs divided as those of the blocks after the early ones."""
    torch.manual_seed(2)
    model = BeitForMaskedImageModeling(config(head_layers=2, early_layers=1))
    for number, block in zip((2, 3), model.extra_layers(), strict=True):
        for matrix in (block.attn.proj.weight, block.mlp.fc2.weight):
            bound = 1 / math.sqrt(matrix.shape[1])
            values = matrix.detach().double().flatten() * math.sqrt(2 * number)
            assert kstest(values.numpy(), uniform(-bound, 2 * bound).cdf).pvalue > 1e-5


def test_a_classifier_is_scaled_down():
    torch.manual_seed(3)
    head = nn.Linear(WIDTH, 200)
    init_head(head, std=1.5, scale=0.001)
    values = head.weight.detach().double().flatten() / 0.001
    assert kstest(values.numpy(), truncated_normal(1.5, 2.0).cdf).pvalue > 1e-5
    assert not head.bias.any()
