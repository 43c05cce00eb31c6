"""DALL-E's discrete VAE as BEiT's tokenizer: 8192 visual tokens of 8 x 8 pixels."""

from typing import Self

import torch
from torch import Tensor

from beit_fast.tokenizers.base import Tokenizer, TokenizerError
from beit_fast.tokenizers.dalle_networks import (
    EPS,
    Block,
    Conv2d,
    DalleDecoder,
    DalleEncoder,
    map_pixels,
    unmap_pixels,
)
from beit_fast.tokenizers.fused_encoder import FusedEncoder

__all__ = ["DalleDecoder", "DalleEncoder", "DalleTokenizer", "map_pixels", "unmap_pixels"]


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

    def to_precision(self, dtype: torch.dtype) -> Self:
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

    def prepare(self) -> Self:
        if self.encoder is None:
            return self
        super().prepare()
        if self._exact_head is not None:
            self._fused = FusedEncoder(self.encoder, self._dtype(), 1 - 2 * EPS, EPS)
        return self

    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

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
