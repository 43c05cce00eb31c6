"""An autoencoder with a learnt codebook, and its exact rewriting as a `DiscreteVAE`.

Nearest-code quantisation (van den Oord et al., 2017, with the codebook updated by moving averages, appendix A.1) in a
narrow latent space. The code e nearest to z = P h + c maximises 2 e.z - |e|^2, which is linear in h: as weights of a
1x1 output convolution it makes the arg-max of a DiscreteVAE's logits the nearest code.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.kernels.linear_argmax import linear_argmax
from beit_fast.tokenizers.discrete_vae import DiscreteVAE

_NEVER = -1e4  # logit bias of vocabulary entries without a code: they never win


class VectorQuantizer(nn.Module):
    """A codebook of `live_codes` vectors; its whole state lies in buffers.

    `collect` gathers latents, `initialise` places the codes among them by k-means, `update` moves every code towards
    the latents it won, `reseed` puts codes that win nothing onto current latents.
    """

    def __init__(self, live_codes: int, dim: int, reservoir: int) -> None:
        super().__init__()
        if reservoir < 4 * live_codes:
            raise ValueError(f"init_latents must be at least 4 x live_codes = {4 * live_codes}, not {reservoir}")
        self.codes: Tensor
        self.counts: Tensor
        self.sums: Tensor
        self.idle_steps: Tensor
        self.latents: Tensor
        self.register_buffer("codes", torch.zeros(live_codes, dim))
        self.register_buffer("counts", torch.zeros(live_codes))
        self.register_buffer("sums", torch.zeros(live_codes, dim))
        self.register_buffer("idle_steps", torch.zeros(live_codes, dtype=torch.int64))
        self.register_buffer("latents", torch.zeros(reservoir, dim))

    def nearest(self, z: Tensor) -> Tensor:
        """z (P, d) -> int64 (P,)."""
        return linear_argmax(z, self.codes, -0.5 * self.codes.square().sum(1))

    def collect(self, z: Tensor) -> None:
        """Keep the newest latents (P, d)."""
        z = z[-len(self.latents) :]
        self.latents.copy_(torch.cat([self.latents[len(z) :], z]))

    def initialise(self, rounds: int) -> None:
        """k-means on the collected latents, from as many of them drawn without replacement."""
        order = torch.randperm(len(self.latents), device="cpu")[: len(self.codes)]
        self.codes.copy_(self.latents[order.to(self.codes.device)])
        for _ in range(rounds):
            counts, sums = self._statistics(self.latents, self.nearest(self.latents))
            won = counts > 0
            self.codes[won] = sums[won] / counts[won, None]
        _from_first_rank(self.codes)
        self.counts.fill_(1)
        self.sums.copy_(self.codes)
        self.idle_steps.zero_()

    def update(self, z: Tensor, ids: Tensor, decay: float) -> None:
        """Moving averages of what each code won; counts are smoothed so that a rare code is not divided by nothing."""
        counts, sums = self._statistics(z, ids)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        eps = 1e-5
        total = self.counts.sum()
        smooth = (self.counts + eps) * (total / (total + eps * len(self.counts)))
        self.codes.copy_(self.sums / smooth[:, None])
        self.idle_steps.add_(1).masked_fill_(counts > 0, 0)

    def reseed(self, z: Tensor, after_steps: int) -> None:
        """Put every code that has been idle for more than `after_steps` onto a current latent, at most half of them."""
        dead = (self.idle_steps > after_steps).nonzero().squeeze(1)[: len(z) // 2]
        if len(dead):
            chosen = z[torch.randperm(len(z), device="cpu")[: len(dead)].to(z.device)]
            self.codes[dead] = chosen
            self.counts[dead] = 1
            self.sums[dead] = chosen
            self.idle_steps[dead] = 0
        for buffer in (self.codes, self.counts, self.sums, self.idle_steps):
            _from_first_rank(buffer)

    def _statistics(self, z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.zeros_like(self.counts).index_add_(0, ids, torch.ones_like(z[:, 0]))
        return counts, torch.zeros_like(self.sums).index_add_(0, ids, z)


def _from_first_rank(buffer: Tensor) -> None:
    if dist.is_initialized():
        dist.broadcast(buffer, 0)


class QuantizedAutoencoder(nn.Module):
    """Trunk and decoder of a `DiscreteVAE` with a quantiser between them."""

    def __init__(
        self, hidden_dim: int, codebook_dim: int, live_codes: int, init_latents: int, channels: int = 3
    ) -> None:
        super().__init__()
        self.channels = channels
        layout = DiscreteVAE(1, codebook_dim, hidden_dim, channels=channels)
        self.trunk = layout.encoder[:-1]
        self.project = nn.Conv2d(hidden_dim, codebook_dim, 1)
        self.quantizer = VectorQuantizer(live_codes, codebook_dim, init_latents)
        self.decoder = layout.decoder
        self.hidden_dim, self.codebook_dim = hidden_dim, codebook_dim
        self.recent: list[tuple[Tensor, Tensor]] = []  # (latents, ids) of the micro-batches since the last step

    def forward(self, images: Tensor, quantize: bool) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) in [0, 1] -> reconstruction (B, C, H, W) around [-1, 1], commitment loss per image (B,).

        Without `quantize` it is a plain autoencoder and the commitment loss is 0. While training, latents and ids of
        the micro-batch are kept for `update_codes`.
        """
        z = self.project(self.trunk(images * 2 - 1)).float()  # (B, d, h, w)
        rows = z.detach().permute(0, 2, 3, 1).reshape(-1, self.codebook_dim)
        ids = rows.new_zeros(len(rows), dtype=torch.int64)
        commitment = z.new_zeros(len(z))
        if quantize:
            with torch.autocast(z.device.type, enabled=False):  # distances cancel: they need all their digits
                ids = self.quantizer.nearest(rows)
            codes = F.embedding(ids, self.quantizer.codes).view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
            commitment = (z - codes).square().mean((1, 2, 3))
            z = z + (codes - z).detach()  # straight through
        if self.training:
            self.recent.append((rows, ids))
        return self.decoder(z), commitment

    def take_recent(self) -> tuple[Tensor, Tensor]:
        """Latents (P, d) and ids (P,) of the step's micro-batches; forgets them."""
        rows, ids = (torch.cat(parts) for parts in zip(*self.recent, strict=True))
        self.recent.clear()
        return rows, ids

    @torch.no_grad()
    def to_discrete_vae(self, vocab_size: int) -> DiscreteVAE:
        """The same tokenizer as a DiscreteVAE of `vocab_size` entries; those beyond the codebook never win."""
        codes = self.quantizer.codes.double()
        live = len(codes)
        vae = DiscreteVAE(vocab_size, self.codebook_dim, self.hidden_dim, channels=self.channels).to(codes.device)
        vae.encoder[:-1].load_state_dict(self.trunk.state_dict())
        vae.decoder.load_state_dict(self.decoder.state_dict())
        weight, bias = vae.head()
        assert self.project.bias is not None
        weight.zero_()[:live] = (2 * codes @ self.project.weight[:, :, 0, 0].double()).float()
        bias.fill_(_NEVER)[:live] = (2 * codes @ self.project.bias.double() - codes.square().sum(1)).float()
        vae.codebook.weight.zero_()[:live] = codes.float()
        return vae.eval().requires_grad_(False)
