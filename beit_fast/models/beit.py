"""The BEiT backbone and its classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit_fast import kernels
from beit_fast.kernels import Bias
from beit_fast.nn import Block, DropPathRates, PatchEmbed, RelativePositionBias

from .configs import BeitConfig
from .resize import resize_position_embedding, resize_relative_position_bias_table


class BeitTrunk(nn.Module):
    """What every BEiT model shares: patches to tokens, the blocks, and the names of their parameters.

    Parameter names are those of the official code (and of timm), so a state dict moves between them unchanged.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches + 1, width)) if config.use_abs_pos_emb else None
        shared = config.relative_position_bias == "shared"
        self.rel_pos_bias = RelativePositionBias(config.grid, config.num_heads) if shared else None
        self.drop_path = DropPathRates(config.drop_path_rate, config.depth)
        own_window = config.grid if config.relative_position_bias == "per_block" else None
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.num_heads,
                config.mlp_ratio,
                config.layer_norm_eps,
                config.layer_scale_init,
                own_window,
            )
            for _ in range(config.depth)
        )
        self.grad_checkpointing = False

    def layers(self) -> Iterator[Block]:
        """The blocks from first to last."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs and compute the rest again in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of matrices and higher tensors that the official optimizer exempts from weight decay."""
        return {"pos_embed", "cls_token"}

    def _embed(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, C, S, S) -> (B, N, D) in the parameters' dtype, masked patches replaced, CLS in front."""
        grid = (images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size)
        tokens = self.patch_embed(images).to(self.cls_token.dtype)
        if mask is not None and mask_token is not None:
            tokens = torch.where(mask.unsqueeze(-1), mask_token, tokens)
        x = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        if self.pos_embed is not None:
            x = x + resize_position_embedding(self.pos_embed, self.config.grid, grid)
        return x

    def _attention_biases(self, images: Tensor) -> list[Bias]:
        """The bias of each block for this input size, prepared for the kernel; one object where it is shared."""
        grid = (images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size)
        dtype = images.dtype
        if torch.is_autocast_enabled(images.device.type):
            dtype = torch.get_autocast_dtype(images.device.type)

        def prepared(table: Tensor | None) -> Bias:
            if table is None:
                return None
            table = resize_relative_position_bias_table(table, self.config.grid, grid)
            return kernels.prepare_bias(kernels.relative_position_bias(table, grid), dtype)

        if self.rel_pos_bias is not None:
            return [prepared(self.rel_pos_bias.relative_position_bias_table)] * len(self.blocks)
        return [prepared(block.attn.relative_position_bias_table) for block in self.layers()]

    def _run_blocks(
        self,
        x: Tensor,
        biases: list[Bias],
        drop_path: Tensor | None,
        count: int,
        final_norm: nn.LayerNorm | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The first `count` blocks; each hands its successor the LayerNorm that this one reads first.

        `final_norm` is what reads the output of the last of them (None: nothing does).
        """
        layers = list(self.layers())[:count]
        norms: list[nn.LayerNorm | None] = [*(block.norm1 for block in layers), final_norm]
        normed = None if norms[0] is None else norms[0](x)
        for index, (block, following) in enumerate(zip(layers, norms[1:], strict=True)):
            factors = None if drop_path is None else drop_path[index]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, normed = checkpoint(block.chain, x, normed, biases[index], factors, following, use_reentrant=False)
            else:
                assert normed is not None
                x, normed = block.chain(x, normed, biases[index], factors, following)
        return x, normed


class Beit(BeitTrunk):
    """BEiT as a classifier or feature extractor (paper section 2.6), `config.for_classification(...)`.

    With `global_pool="avg"` the mean of the patch tokens, CLS left out, goes through `fc_norm` to `head`; with
    `"token"` the CLS token goes through `norm` to `head`.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__(config)
        width, eps = config.width, config.layer_norm_eps
        after = config.norm_after_pooling
        self.norm = nn.Identity() if after else nn.LayerNorm(width, eps=eps)
        self.fc_norm = nn.LayerNorm(width, eps=eps) if after else nn.Identity()
        self.head = nn.Linear(width, config.num_classes) if config.num_classes > 0 else nn.Identity()
        init_for_fine_tuning(self)

    def forward_features(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """(B, C, S, S) -> (B, N, D): all tokens after the last block (and `norm`, unless pooling by the mean)."""
        biases = self._attention_biases(images)
        drop_path = self.drop_path(images.shape[0], sample_keys)
        final_norm = self.norm if isinstance(self.norm, nn.LayerNorm) else None
        x, normed = self._run_blocks(self._embed(images), biases, drop_path, len(self.blocks), final_norm)
        return x if normed is None else normed

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, num_classes); with `pre_logits` the pooled (B, D)."""
        pool = self.config.global_pool
        if pool == "avg":
            features = features[:, 1:].mean(dim=1)
        elif pool == "token":
            features = features[:, 0]
        features = self.fc_norm(features)
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """(B, C, S, S) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(images, sample_keys))


def _rescale_outputs(trunk: BeitTrunk) -> None:
    """Divides the output matrices of block l by sqrt(2l), which keeps deep pre-training stable (paper section 2.5)."""
    with torch.no_grad():
        for index, block in enumerate(trunk.layers(), start=1):
            block.attn.proj.weight.div_(math.sqrt(2.0 * index))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * index))


def _init_matrices(trunk: BeitTrunk, std: float, bound: float, patch_embed: bool) -> None:
    """Truncated normal weights and zero biases for every linear layer, and for the patch projection if asked for."""
    for module in trunk.modules():
        if isinstance(module, nn.Linear) or (patch_embed and isinstance(module, nn.Conv2d)):
            _truncated_normal(module.weight, std, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for token in (trunk.cls_token, trunk.pos_embed):
        if token is not None:
            _truncated_normal(token, std, bound)


def _truncated_normal(weight: Tensor, std: float, bound: float) -> None:
    nn.init.trunc_normal_(weight, mean=0.0, std=std, a=-bound, b=bound)


def init_for_pretraining(trunk: BeitTrunk, mask_token: Tensor) -> None:
    """The official initialisation of pre-training: normal, truncated at one standard deviation."""
    std = trunk.config.init_std
    _init_matrices(trunk, std, bound=std, patch_embed=True)
    _truncated_normal(mask_token, std, std)
    _rescale_outputs(trunk)


def init_for_fine_tuning(model: Beit) -> None:
    """The official initialisation of fine-tuning: normal, truncated at +-2; the head scaled down."""
    _init_matrices(model, model.config.init_std, bound=2.0, patch_embed=False)
    _rescale_outputs(model)
    if isinstance(model.head, nn.Linear):
        with torch.no_grad():
            model.head.weight.mul_(model.config.head_init_scale)
