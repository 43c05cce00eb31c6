"""The small discrete VAE that BEiT's authors call the customised tokenizer; the demo tokenizer has the same layout.

State-dict keys are those of their `pytorch_model.bin`: `codebook.weight`, `encoder.{0,2,4}.0.*`,
`encoder.{1,3,5}.net.{0,2,4}.*`, `encoder.6.*`, and the mirror of them under `decoder`.
"""

from typing import Self

import torch
from torch import Tensor, nn

from beit_fast.tokenizers.base import Tokenizer

__all__ = ["DiscreteVAE"]


class _ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        wide = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        relu = nn.ReLU(inplace=True)
        self.net = nn.Sequential(wide[0], relu, wide[1], relu, nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).add_(x)


class DiscreteVAE(Tokenizer):
    """Strided convolutions and residual blocks; the last convolution gives logits over the vocabulary.

    The default sizes are the official file's: 20,081,411 parameters. Pixels enter as (x - 0.5) / 0.5.

    Args:
        num_tokens: vocabulary V.
        codebook_dim: width of the code vectors.
        hidden_dim: width of the convolutions.
        num_layers: each halves the resolution: stride 2 ** num_layers.
        channels: of the images.
    """

    def __init__(
        self, num_tokens: int = 8192, codebook_dim: int = 512, hidden_dim: int = 256, num_layers: int = 3,
        channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vocab_size, self.stride, self.width, self.channels = num_tokens, 2**num_layers, hidden_dim, channels
        self.codebook = nn.Embedding(num_tokens, codebook_dim)
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for layer in range(num_layers):
            down = nn.Conv2d(hidden_dim if layer else channels, hidden_dim, 4, stride=2, padding=1)
            up = nn.ConvTranspose2d(hidden_dim if layer else codebook_dim, hidden_dim, 4, stride=2, padding=1)
            encoder += [nn.Sequential(down, nn.ReLU(inplace=True)), _ResBlock(hidden_dim)]
            decoder += [nn.Sequential(up, nn.ReLU(inplace=True)), _ResBlock(hidden_dim)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(hidden_dim, num_tokens, 1))
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(hidden_dim, channels, 1))

    def to_precision(self, dtype: torch.dtype) -> Self:
        """Run every convolution but the encoder's output in `dtype`, channels last."""
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.encoder[:-1].to(dtype)
        self.decoder.to(dtype)
        return self

    def _dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def features(self, images: Tensor) -> Tensor:
        # 2x - 1 is (x - 0.5) / 0.5 to the bit, in one pass less
        x = images.contiguous(memory_format=torch.channels_last).mul(2).sub_(1)
        return self.encoder[:-1](x.to(self._dtype()))

    def head(self) -> tuple[Tensor, Tensor]:
        conv = self.encoder[-1]
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        return conv.weight[:, :, 0, 0], conv.bias

    def logits(self, images: Tensor) -> Tensor:
        """Give logits (B, V, h, w) of images (B, 3, H, W) in [0, 1], with gradient: for training with a relaxation."""
        return self.encoder[-1](self.features(images))

    def reconstruct(self, embeddings: Tensor) -> Tensor:
        """Give pixels, unclamped, with gradient, of code vectors (B, codebook_dim, h, w), hard or mixed."""
        return self.decoder(embeddings.to(self._dtype())).float() * 0.5 + 0.5

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Give images (B, 3, H, W) in [0, 1] for ids int64 (B, h, w)."""
        self._check_ids(ids)
        return self.reconstruct(self.codebook(ids).permute(0, 3, 1, 2)).clamp(0, 1)
