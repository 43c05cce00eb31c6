import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.tokenizers import DiscreteVAE
from beit_fast.tokenizers import base as tokenizer_base


def plain_res(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    hidden = F.relu(F.conv2d(x, state[f"{name}.net.0.weight"], state[f"{name}.net.0.bias"], padding=1))
    hidden = F.relu(F.conv2d(hidden, state[f"{name}.net.2.weight"], state[f"{name}.net.2.bias"], padding=1))
    return F.conv2d(hidden, state[f"{name}.net.4.weight"], state[f"{name}.net.4.bias"]) + x


def plain_logits(images: Tensor, state: dict[str, Tensor]) -> Tensor:
    x = images / 0.5 - 1
    for i in (0, 2, 4):
        x = F.relu(F.conv2d(x, state[f"encoder.{i}.0.weight"], state[f"encoder.{i}.0.bias"], stride=2, padding=1))
        x = plain_res(x, state, f"encoder.{i + 1}")
    return F.conv2d(x, state["encoder.6.weight"], state["encoder.6.bias"])


def plain_decode(ids: Tensor, state: dict[str, Tensor]) -> Tensor:
    x = state["codebook.weight"][ids].permute(0, 3, 1, 2)
    for i in (0, 2, 4):
        weight, bias = state[f"decoder.{i}.0.weight"], state[f"decoder.{i}.0.bias"]
        x = plain_res(F.relu(F.conv_transpose2d(x, weight, bias, stride=2, padding=1)), state, f"decoder.{i + 1}")
    x = F.conv2d(x, state["decoder.6.weight"], state["decoder.6.bias"])
    return ((x + 1) / 2).clamp(0, 1)


@pytest.fixture
def vae() -> DiscreteVAE:
    torch.manual_seed(1)
    model = DiscreteVAE(300, 6, 10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def test_official_size_and_keys() -> None:
    with torch.device("meta"):
        model = DiscreteVAE()
    assert sum(p.numel() for p in model.parameters()) == 20_081_411
    assert model.multiply_adds(112, 112) / 1e9 == pytest.approx(6.60, abs=0.005)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["codebook.weight"] == (8192, 512)
    assert shapes["encoder.6.weight"] == (8192, 256, 1, 1)
    assert shapes["decoder.0.0.weight"] == (512, 256, 4, 4)
    assert shapes["decoder.6.weight"] == (3, 256, 1, 1)
    expected = {"codebook.weight", "encoder.6.weight", "encoder.6.bias", "decoder.6.weight", "decoder.6.bias"}
    for half in ("encoder", "decoder"):
        for leaf in ("weight", "bias"):
            expected |= {f"{half}.{i}.0.{leaf}" for i in (0, 2, 4)}
            expected |= {f"{half}.{i}.net.{j}.{leaf}" for i in (1, 3, 5) for j in (0, 2, 4)}
    assert shapes.keys() == expected


def test_encode_and_decode_are_the_formulas(vae: DiscreteVAE) -> None:
    images = torch.rand(3, 3, 40, 24)
    state = vae.state_dict()
    ids = vae.encode(images)
    assert torch.equal(ids, plain_logits(images, state).argmax(1))
    torch.testing.assert_close(vae.logits(images), plain_logits(images, state), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(ids), plain_decode(ids, state), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True])
def test_mask_selects_positions_in_row_order(vae: DiscreteVAE, flat: bool) -> None:
    images = torch.rand(4, 3, 32, 48)
    mask = torch.rand(4, 4, 6) < 0.4
    ids = vae.encode(images)
    at_mask = vae.encode(images, mask.flatten(1) if flat else mask)
    assert at_mask.shape == (int(mask.sum()),)
    assert torch.equal(at_mask, ids[mask])
    assert torch.equal(vae.encode(images, masked_indices=mask.flatten().nonzero().squeeze(1)), at_mask)
    assert vae.encode(images, torch.zeros(4, 4, 6, dtype=torch.bool)).shape == (0,)


def test_chunking_changes_nothing(vae: DiscreteVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    images, mask = torch.rand(5, 3, 32, 32), torch.rand(5, 4, 4) < 0.5
    ids, at_mask = vae.encode(images), vae.encode(images, mask)
    monkeypatch.setitem(tokenizer_base._LOGIT_BYTES, "cpu", 7 * 300 * 4)  # 7 rows at a time
    monkeypatch.setitem(tokenizer_base._ACTIVATION_BYTES, "cpu", 1)  # one image at a time
    assert torch.equal(vae.encode(images), ids)
    assert torch.equal(vae.encode(images, mask), at_mask)


def test_encode_never_holds_all_logits() -> None:
    """The largest tensor that encode allocates: 32 x 196 positions x 8192 logits would be 206 MB."""
    model = DiscreteVAE(8192, 4, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model.encode(torch.rand(32, 3, 112, 112))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 32 << 20


@pytest.mark.parametrize(
    ("images", "mask", "message"),
    [
        (torch.zeros(1, 3, 30, 32), None, "multiples of 8"),
        (torch.zeros(3, 32, 32), None, "images"),
        (torch.zeros(1, 1, 32, 32), None, "images"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), None, "floating point"),
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 5, dtype=torch.bool), "mask"),
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 4), "mask must be bool"),
    ],
)
def test_bad_input_is_named(vae: DiscreteVAE, images: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae.encode(images, mask)


def test_bad_ids_are_named(vae: DiscreteVAE) -> None:
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 300\)"):
        vae.decode(torch.full((1, 2, 2), 300))
    with pytest.raises(ValueError, match="ids must be int64"):
        vae.decode(torch.zeros(2, 2, dtype=torch.int64))
