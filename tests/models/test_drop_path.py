"""Which residual branches are dropped, in plain integers; and where the rates are kept."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from beit_fast import use_backend
from beit_fast.models import Beit, BeitConfig
from beit_fast.nn.block import Block
from beit_fast.nn.drop_path import DropPathRates, drop_path_scales, kept_samples

MASK = 2**64 - 1


def splitmix64(value):
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_the_factors_of_every_branch_by_hand():
    """Branch b of the network, counted from 1, drops where the top 24 bits of the mixed key reach the rate's rest."""
    rates, keys = [0.0, 0.25, 0.5, 0.875], [0, 1, -1, 2**62, -(2**63), *range(-40, 40)]
    found = drop_path_scales(torch.tensor(rates), torch.tensor(keys), len(keys))
    assert (found.shape, found.dtype) == ((4, 2, len(keys)), torch.float32)
    for block, rate in enumerate(rates):
        for branch in range(2):
            for place, key in enumerate(keys):
                number = 2 * block + branch + 1
                uniform = (splitmix64((key + number * 0x9E3779B97F4A7C15) & MASK) >> 40) / 2**24
                expected = 1 / (1 - rate) if uniform < 1 - rate else 0.0
                assert found[block, branch, place] == np.float32(expected)


def test_a_number_that_equals_the_share_to_keep_is_dropped():
    """One in 16 million: its key by the steps of the hash backwards."""
    value = 1 << 63
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        value ^= (value >> shift) ^ (value >> 2 * shift)
        value = value * pow(factor, -1, 2**64) & MASK
    assert splitmix64(value) >> 40 == 2**23
    keys = [(value - number * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63 for number in (1, 2)]
    found = drop_path_scales(torch.tensor([0.5]), torch.tensor(keys), 2)
    assert (found[0, 0, 0], found[0, 1, 1]) == (0, 0)
    assert drop_path_scales(torch.tensor([0.499]), torch.tensor(keys), 2)[0, 0, 0] > 0


def test_without_keys_torch_draws():
    torch.manual_seed(0)
    found = drop_path_scales(torch.tensor([0.0, 0.5, 0.75]), None, 4000)
    torch.manual_seed(0)
    uniform = torch.rand(3, 2, 4000)
    keep = torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)
    assert torch.equal(found, torch.where(uniform < keep, 1 / keep, 0.0))
    assert found.mean((1, 2)).tolist() == pytest.approx([1, 1, 1], abs=0.06)


def test_the_rates_rise_from_block_to_block_and_follow_the_device():
    rates = DropPathRates(0.3, 4)
    assert rates.rates.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert (str(rates), DropPathRates(0.0, 2).rates.tolist()) == ("DropPathRates(rate=0.3)", [0.0, 0.0])
    assert DropPathRates(0.3, 4, 2, 1).rates.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.1, 0.2])
    assert DropPathRates(0.3, 4, 2).rates[4:].tolist() == pytest.approx([0.0, 0.1])
    assert DropPathRates(0.3, 4, 3, 3).rates[4:].tolist() == pytest.approx([0.18, 0.24, 0.3])  # of a ramp of six
    keys = torch.arange(5)
    expected = drop_path_scales(torch.linspace(0.0, 0.3, 4), keys, 5)
    assert torch.equal(rates(5, keys, torch.device("cpu")), expected)
    with torch.inference_mode():
        elsewhere = rates(5, keys.to("meta"), torch.device("meta"))
    assert (elsewhere.device.type, elsewhere.shape) == ("meta", (4, 2, 5))
    assert not rates.rates.is_inference()
    assert torch.equal(rates(5, keys, torch.device("cpu")), expected)
    kept = rates.rates
    rates(5, keys, torch.device("cpu"))
    assert rates.rates is kept


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_leaves_nothing_is_named(rate):
    with pytest.raises(ValueError, match=rf"drop_path_rate must be in \[0, 1\), got {rate}"):
        DropPathRates(rate, 2)


@pytest.mark.parametrize("preset", ["plus", "plain"])
@pytest.mark.parametrize("batch", [1, 6])
def test_left_out_samples_change_no_result(preset, batch):
    """Beside the plain formulas, which compute every branch of every sample, in fp64."""
    torch.manual_seed(0)
    config = BeitConfig.from_preset(
        "tiny", preset, image_size=32, patch_size=8, width=96, depth=3, num_heads=3, drop_path_rate=0.6
    )
    model = Beit(config.for_classification(5)).double().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images, keys = torch.randn(batch, 3, 32, 32, dtype=torch.float64), torch.arange(batch) + 11
    factors = model.drop_path(batch, keys, images.device)
    assert 0 < (factors == 0).sum() < factors.numel()
    results = []
    for backend in ("auto", "reference"):
        model.zero_grad()
        with use_backend(backend):
            logits = model(images, sample_keys=keys)
            logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_when_samples_are_left_out():
    """On a CPU, outside of traces and of the plain formulas, where there are any, and from 2^17 multiply-adds on."""
    factors, whole, small = torch.tensor([2.0, 0.0, 2.0]), torch.randn(3, 8, 128), torch.randn(3, 7, 128)
    assert kept_samples(factors, whole).tolist() == [0, 2]
    assert kept_samples(factors, torch.randn(3, 128, 8)) is None
    assert kept_samples(factors, small) is None
    assert kept_samples(torch.ones(3), whole) is None
    with use_backend("reference"):
        assert kept_samples(factors, whole) is None
    with FakeTensorMode() as mode:
        assert kept_samples(mode.from_tensor(factors), mode.from_tensor(whole)) is None


def test_a_left_out_sample_costs_no_products():
    block, x = Block(96, 3, 4.0, 1e-6, 0.1, None), torch.randn(4, 37, 96)

    def products(*factors):
        with FlopCounterMode(display=False) as counter:
            block(x, None, torch.tensor(factors))[0].sum().backward()
        return counter.get_total_flops()

    whole = products([2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0])
    sums = products([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0])  # of the residual path, over the rows of all
    assert sums < whole / 1000
    assert products([0.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 0.0]) == sums + (whole - sums) * 3 // 4
