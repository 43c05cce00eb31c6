"""The paper's tokenizer objective: DALL-E's discrete VAE (Ramesh et al., 2021, appendix A.2; BEiT, section 2.1).

Tokens are relaxed by Gumbel-softmax, forwards and backwards; the decoder gives a logit-Laplace density of the pixels,
mapped into (0.1, 0.9); KL(q || uniform) is weighted by beta. The loss of an image is divided by its number of values,
so that per position of 8 x 8 x 3 values the KL counts beta / 192. Temperature and beta follow half a cosine.
"""

import math

import torch
from torch import Tensor, nn

from beit_fast.tokenizers import DalleTokenizer, Tokenizer
from beit_fast.tokenizers.dalle import DalleDecoder, DalleEncoder, map_pixels, unmap_pixels
from beit_fast.train.task import StepOutput
from beit_fast.train.tasks.tokenizer import (
    TokenizerBatch,
    TrainTokenizer,
    TrainTokenizerConfig,
    error_metrics,
    error_sums,
)

_VALUES_PER_TOKEN = 3 * 8 * 8


def logit_laplace(pixels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log of 1 / (2 b x (1 - x)) exp(-|logit x - mean| / b), elementwise; x in (0, 1), b = exp(log_scale)."""
    distance = (torch.logit(pixels) - mean).abs()
    return math.log(2) + log_scale + torch.log(pixels * (1 - pixels)) + distance * torch.exp(-log_scale)


def half_cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1, and `end` from there on."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


class RelaxedVAE(nn.Module):
    """DALL-E's encoder and decoder with relaxed tokens between them."""

    def __init__(self, hidden_dim: int, vocab_size: int, n_init: int, blocks: int) -> None:
        super().__init__()
        self.encoder = DalleEncoder(hidden_dim, vocab_size, blocks)
        self.decoder = DalleDecoder(n_init, hidden_dim, vocab_size, blocks)

    def forward(self, images: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W) in [0, 1] -> negative log-likelihood per value (B,), KL(q || uniform) per position in
        nats (B,), and the reconstruction (B, 3, H, W) in [0, 1]. Draws its noise from torch's default generator.
        """
        pixels = map_pixels(images)
        log_q = self.encoder(pixels).float().log_softmax(1)  # (B, V, h, w)
        kl = (log_q.exp() * (log_q + math.log(log_q.shape[1]))).sum(1).mean((1, 2))
        # the exponential, unlike -log(-log(u)), never gives an infinite noise
        noise = -torch.empty_like(log_q).exponential_().clamp_min(1e-30).log()
        soft = ((log_q + noise) / temperature).softmax(1)
        mean, log_scale = self.decoder(soft).float().chunk(2, dim=1)
        nll = logit_laplace(pixels.float(), mean, log_scale).mean((1, 2, 3))
        return nll, kl, unmap_pixels(torch.sigmoid(mean))


class TrainRelaxedVAE(TrainTokenizer):
    """Trains a `RelaxedVAE`; leaves `encoder.safetensors` and `decoder.safetensors`, which load as DALL-E's do."""

    def make_model(self) -> nn.Module:
        own = self.config
        return RelaxedVAE(own.hidden_dim, own.vocab_size, own.dvae.n_init, own.dvae.blocks)

    def tokenizer_of(self, model: nn.Module, step: int) -> Tokenizer | None:
        assert isinstance(model, RelaxedVAE)
        return DalleTokenizer(model.encoder, model.decoder).eval()

    def parts_of(self, tokenizer: Tokenizer) -> dict[str, nn.Module]:
        assert isinstance(tokenizer, DalleTokenizer)
        assert tokenizer.encoder is not None
        assert tokenizer.decoder is not None
        return {"encoder": tokenizer.encoder, "decoder": tokenizer.decoder}

    def schedule(self, step: int) -> tuple[float, float]:
        """Temperature and beta of a step, counted from 0."""
        own, progress = self.config.dvae, step / self.total_steps
        temperature = half_cosine(*own.temperature, progress / own.temperature_share)
        return temperature, half_cosine(0.0, own.kl_weight, progress / own.kl_share)

    def loss(self, model: nn.Module, batch: TokenizerBatch, num_targets: Tensor) -> StepOutput:
        temperature, beta = self.schedule(batch.step)
        nll, kl, reconstruction = model(batch.images, temperature)
        loss = (nll + beta / _VALUES_PER_TOKEN * kl).sum() / num_targets
        count, device = len(batch), batch.images.device
        sums = {
            "kl": kl.detach().sum(),
            "nll": nll.detach().sum(),
            "temperature": torch.tensor(temperature * count, device=device),
            "beta": torch.tensor(beta * count, device=device),
        }
        return StepOutput(loss, error_sums(reconstruction.detach() - batch.images) | sums)

    def after_step(self, model: nn.Module, step: int) -> None:
        """There is no codebook to update."""

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        images = sums["images"]
        return error_metrics(sums) | {
            "nll_per_value": sums["nll"] / images,
            "kl_nats_per_token": sums["kl"] / images,
            "temperature": sums["temperature"] / images,
            "kl_weight": sums["beta"] / images,
        }


def tokenizer_task(config: TrainTokenizerConfig) -> TrainTokenizer:
    """The task of the configuration's objective."""
    return TrainRelaxedVAE(config) if config.objective == "dvae" else TrainTokenizer(config)
