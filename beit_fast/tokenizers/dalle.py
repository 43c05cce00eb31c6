"""The discrete VAE of DALL-E (Ramesh et al., 2021, appendix A.2), BEiT's tokenizer: 8192 visual tokens of 8 x 8 pixels.

Parameter names are those of OpenAI's released files (`blocks.*.w`, `blocks.*.b`), so their tensors load unchanged.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.tokenizers.base import Tokenizer, TokenizerError

__all__ = ["DalleDecoder", "DalleEncoder", "DalleTokenizer", "map_pixels", "unmap_pixels"]

_EPS = 0.1  # keeps pixels away from 0 and 1, where the logit-Laplace density has its poles
_GROUPS = 4


def map_pixels(images: Tensor) -> Tensor:
    """[0, 1] -> [0.1, 0.9]."""
    return (1 - 2 * _EPS) * images + _EPS


def unmap_pixels(images: Tensor) -> Tensor:
    """[0.1, 0.9] -> [0, 1], clamped."""
    return ((images - _EPS) / (1 - 2 * _EPS)).clamp(0, 1)


class Conv2d(nn.Module):
    """A stride-1 "same" convolution whose parameters are called w and b; they give the precision it runs in."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel).normal_(std=(n_in * kernel**2) ** -0.5))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.to(self.w.dtype), self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """id(x) + gain * res(x): four convolutions, each after a ReLU; the identity path sees the raw input."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        hidden = n_out // 4
        self.gain = gain
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        sizes = (n_in, hidden, hidden, hidden, n_out)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels, start=1):
            layers[f"relu_{i}"] = nn.ReLU(inplace=i > 1)  # the first reads what the identity path reads too
            layers[f"conv_{i}"] = Conv2d(sizes[i - 1], sizes[i], kernel)
        self.res_path = nn.Sequential(layers)

    @property
    def convs(self) -> list[Conv2d]:
        """The four convolutions of the residual path."""
        return [layer for layer in self.res_path if isinstance(layer, Conv2d)]

    @torch.no_grad()
    def fold_gain(self) -> None:
        """Multiply the last convolution by the gain, which then is 1; a second call does nothing."""
        self.convs[-1].w.mul_(self.gain)
        self.convs[-1].b.mul_(self.gain)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.gain == 1.0:
            return self.res_path(x).add_(self.id_path(x))
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.gain)


def _network(
    n_in: int, widths: list[int], n_out: int, blocks: int, kernels: tuple[int, int, int, int], between: nn.Module
) -> nn.Sequential:
    """A convolution to widths[0] channels, groups of residual blocks with `between` in between, a 1x1 convolution."""
    gain = 1 / (_GROUPS * blocks) ** 2
    encoder = isinstance(between, nn.MaxPool2d)
    layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(n_in, widths[0], 7 if encoder else 1))
    for g in range(1, _GROUPS + 1):
        group: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(1, blocks + 1):
            group[f"block_{i}"] = Block(widths[g - 1] if i == 1 else widths[g], widths[g], kernels, gain)
        if g < _GROUPS:
            group["pool" if encoder else "upsample"] = between
        layers[f"group_{g}"] = nn.Sequential(group)
    layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(widths[-1], n_out, 1)))
    return nn.Sequential(layers)


class DalleEncoder(nn.Module):
    """Mapped pixels (B, 3, H, W) -> logits (B, V, H/8, W/8). 53,786,240 parameters at the released size."""

    def __init__(self, n_hid: int = 256, vocab_size: int = 8192, blocks: int = 2) -> None:
        super().__init__()
        self.width = n_hid
        widths = [n_hid, n_hid, 2 * n_hid, 4 * n_hid, 8 * n_hid]
        self.blocks = _network(3, widths, vocab_size, blocks, (3, 3, 3, 1), nn.MaxPool2d(2))

    def features(self, x: Tensor) -> Tensor:
        """(B, 8 n_hid, H/8, W/8): everything but the output convolution."""
        return F.relu(self.blocks[:-1](x), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class DalleDecoder(nn.Module):
    """One-hot or soft tokens (B, V, h, w) -> (B, 6, 8h, 8w): mean and log-scale of a logit-Laplace density per channel.

    43,829,766 parameters at the released size.
    """

    def __init__(self, n_init: int = 128, n_hid: int = 256, vocab_size: int = 8192, blocks: int = 2) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        widths = [n_init, 8 * n_hid, 4 * n_hid, 2 * n_hid, n_hid]
        self.blocks = _network(vocab_size, widths, 6, blocks, (1, 3, 3, 3), nn.Upsample(scale_factor=2, mode="nearest"))

    def forward_ids(self, ids: Tensor) -> Tensor:
        """Decode hard tokens (B, h, w): the first convolution of a one-hot is a row look-up."""
        conv = self.blocks.get_submodule("input")
        assert isinstance(conv, Conv2d)
        x = F.embedding(ids, conv.w[:, :, 0, 0].t()) + conv.b
        return self.blocks[1:](x.permute(0, 3, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class DalleTokenizer(Tokenizer):
    """Encoder and, where its file is there, decoder of DALL-E's dVAE.

    As in the original, on a GPU all convolutions but the output one run in fp16 (`dtype` changes that).
    """

    stride = 8

    def __init__(self, encoder: DalleEncoder | None, decoder: DalleDecoder | None = None) -> None:
        super().__init__()
        if encoder is None and decoder is None:
            raise ValueError("encoder or decoder must be given")
        self.encoder, self.decoder = encoder, decoder
        if encoder is not None:
            self.vocab_size, self.width = self.head()[0].shape[0], encoder.width
        elif decoder is not None:
            self.vocab_size, self.width = decoder.vocab_size, 0

    def to_precision(self, dtype: torch.dtype) -> "DalleTokenizer":
        """Run every convolution but the encoder's output (and the decoder's input) in `dtype`; channels last.

        The blocks' gains go into their last convolutions: 1/64 at the released depth, a power of two, which rounds
        nothing. Not for float16, whose smallest weights would lose bits.
        """
        if dtype != torch.float16:
            for block in self.modules():
                if isinstance(block, Block):
                    block.fold_gain()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fp32 = ("encoder.blocks.output.conv", "decoder.blocks.input")
        for name, module in self.named_modules():
            if isinstance(module, Conv2d):
                module.to(torch.float32 if name in fp32 else dtype)
        return self

    def features(self, images: Tensor) -> Tensor:
        return self._encoder().features(map_pixels(images).contiguous(memory_format=torch.channels_last))

    def head(self) -> tuple[Tensor, Tensor]:
        conv = self._encoder().blocks.get_submodule("output.conv")
        assert isinstance(conv, Conv2d)
        return conv.w[:, :, 0, 0], conv.b

    def _encoder(self) -> DalleEncoder:
        if self.encoder is None:
            raise TokenizerError("this DALL-E tokenizer has no encoder: put encoder.pkl beside decoder.pkl")
        return self.encoder

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Decode ids int64 (B, h, w) to images float32 (B, 3, 8h, 8w) in [0, 1], the mode of the predicted density."""
        if self.decoder is None:
            raise TokenizerError(
                "this DALL-E tokenizer has no decoder: put decoder.pkl beside encoder.pkl, "
                'or load_tokenizer("dalle", decoder=True)'
            )
        self._check_ids(ids)
        return unmap_pixels(torch.sigmoid(self.decoder.forward_ids(ids)[:, :3].float()))
