import math

import pytest
import torch
from scipy.cluster.vq import kmeans2

from beit_fast.tokenizers import Tokenizer
from beit_fast.tokenizers.vector_quantizer import QuantizedAutoencoder, VectorQuantizer
from beit_fast.train.tasks.tokenizer import reconstruction_metrics


def test_nearest_is_the_smallest_distance() -> None:
    quantizer = VectorQuantizer(50, 5, 200)
    quantizer.codes.normal_()
    z = torch.randn(300, 5)
    assert torch.equal(quantizer.nearest(z), torch.cdist(z.double(), quantizer.codes.double()).argmin(1))


def test_start_is_kmeans() -> None:
    torch.manual_seed(0)
    latents = torch.randn(400, 3) + 4 * torch.randint(0, 3, (400, 1))
    once, rounds = VectorQuantizer(12, 3, 400), VectorQuantizer(12, 3, 400)
    for quantizer, n in ((once, 0), (rounds, 4)):
        for part in torch.cat([torch.randn(77, 3), latents]).split(90):
            quantizer.collect(part)
        assert torch.equal(quantizer.latents, latents), "the newest latents are kept"
        torch.manual_seed(1)
        quantizer.initialise(n)
    assert torch.isin(once.codes, latents).all()
    expected, _ = kmeans2(latents.double().numpy(), once.codes.double().numpy(), iter=4, minit="matrix")
    torch.testing.assert_close(rounds.codes.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_update_is_the_moving_average() -> None:
    quantizer = VectorQuantizer(4, 2, 16)
    quantizer.latents.normal_()
    quantizer.initialise(0)
    counts, sums = torch.ones(4, dtype=torch.float64), quantizer.codes.double().clone()
    for _ in range(5):
        z = torch.randn(30, 2)
        ids = quantizer.nearest(z)
        quantizer.update(z, ids, 0.8)
        for k in range(4):
            won = z[ids == k].double()
            counts[k] = 0.8 * counts[k] + 0.2 * len(won)
            sums[k] = 0.8 * sums[k] + 0.2 * won.sum(0)
    torch.testing.assert_close(quantizer.codes.double(), sums / counts[:, None], rtol=1e-4, atol=1e-4)


def test_idle_codes_are_reseeded() -> None:
    quantizer = VectorQuantizer(4, 2, 16)
    quantizer.codes.copy_(torch.tensor([[0.0, 0], [100, 100], [200, 200], [300, 300]]))
    quantizer.counts.fill_(1)
    quantizer.sums.copy_(quantizer.codes)
    z = torch.randn(20, 2)
    for _ in range(3):
        quantizer.update(z, quantizer.nearest(z), 0.9)
        quantizer.reseed(z, 3)
    assert (quantizer.nearest(z) == 0).all()
    assert quantizer.idle_steps.tolist() == [0, 3, 3, 3]
    quantizer.update(z, quantizer.nearest(z), 0.9)
    quantizer.reseed(z, 3)
    assert all((z == code).all(1).any() for code in quantizer.codes[1:])
    assert quantizer.idle_steps.tolist() == [0, 0, 0, 0]


def test_too_few_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="init_latents"):
        VectorQuantizer(10, 2, 39)


def test_gradient_passes_straight_through() -> None:
    torch.manual_seed(0)
    model = QuantizedAutoencoder(8, 4, 16, 64)
    model.quantizer.codes.normal_(std=0.3)
    images = torch.rand(2, 3, 16, 16)
    reconstruction, commitment = model(images, True)
    assert reconstruction.shape == images.shape
    assert commitment.shape == (2,)
    (reconstruction.square().mean() + commitment.mean()).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    latents, ids = model.take_recent()
    assert latents.shape == (8, 4)
    assert torch.equal(ids, model.quantizer.nearest(latents))
    assert model.recent == []


def test_export_is_exact() -> None:
    """The exported DiscreteVAE takes the nearest code, and reconstructs what the autoencoder does."""
    torch.manual_seed(0)
    model = QuantizedAutoencoder(8, 4, 40, 160).eval()
    images = torch.rand(6, 3, 32, 32)
    with torch.no_grad():
        z = model.project(model.trunk(images * 2 - 1))
        flat = z.permute(0, 2, 3, 1).reshape(-1, 4)
        model.quantizer.codes.copy_(flat[torch.randperm(len(flat))[:40]])  # as spread as latents are
        reconstruction, _ = model(images, True)
    vae = model.to_discrete_vae(100)
    ids = vae.encode(images)
    expected = torch.cdist(flat.double(), model.quantizer.codes.double()).argmin(1).view_as(ids)
    assert torch.equal(ids, expected)
    assert ids.max() < 40
    torch.testing.assert_close(vae.decode(ids), ((reconstruction + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_measure() -> None:
    class Four(Tokenizer):
        vocab_size = 9

        def encode(self, images: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return torch.tensor([[[0, 0], [3, 3]], [[5, 5], [8, 8]]])

        def decode(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.full((2, 3, 16, 16), 0.5)

    images = torch.full((2, 3, 16, 16), 0.4)
    tokenizer = Four()
    tokenizer.weight = torch.nn.Parameter(torch.zeros(1))
    result = reconstruction_metrics(tokenizer, images)
    assert result["mae"] == pytest.approx(0.1)
    assert result["psnr_db"] == pytest.approx(20)
    assert math.isclose(result["perplexity"], 4, rel_tol=1e-9)
    assert result["used_codes"] == 4
