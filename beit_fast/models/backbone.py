"""The BEiT backbone: patches to tokens, tokens through the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit_fast.kernels import Bias, prepare_bias, relative_position_bias
from beit_fast.models.configs import BeitConfig
from beit_fast.models.resize import resize_position_embedding, resize_relative_position_bias_table
from beit_fast.nn import Block, DropPathRates, PatchEmbed, RelativePositionBias
from beit_fast.nn.attention import HalfWeights
from beit_fast.nn.block import cast_weights
from beit_fast.nn.stock import all_stock

torch.fx.wrap("resize_position_embedding")
torch.fx.wrap("bias_at_grid")


def bias_at_grid(table: Tensor, own_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The bias (H, N, N) at `grid` = (h, w) patches of a table that was learned at `own_grid`."""
    if grid != own_grid:
        table = resize_relative_position_bias_table(table, own_grid, grid)
    return relative_position_bias(table, grid)


class BeitBackbone(nn.Module):
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
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        self.drop_path = DropPathRates(config.drop_path_rate, config.depth)
        window = config.grid if config.relative_position_bias == "per_block" else None
        self.blocks = nn.ModuleList(
            Block(
                width, config.num_heads, config.mlp_ratio, config.layer_norm_eps, config.layer_scale_init, window,
                config.qkv_bias, config.attn_drop_rate, config.proj_drop_rate,
            )
            for _ in range(config.depth)
        )  # fmt: skip
        self.grad_checkpointing = False
        self.bias_within_blocks = False
        """Nothing is made of a block's weights before it is called: with FSDP2 they are whole only while it runs."""

    def layers(self) -> list[Block]:
        """The blocks from first to last."""
        return cast(list[Block], list(self.blocks))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs and compute the rest again in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of matrices and higher tensors that the official optimizer exempts from weight decay."""
        return {"pos_embed", "cls_token"}

    @torch.no_grad()
    def attention_probabilities(self, images: Tensor, block: int = -1, queries: Tensor | None = None) -> Tensor:
        """The attention of one block's tokens: float32 (B, H, Q, N); each row sums to 1.

        The blocks before it run as always, on the fused kernels; those after it do not run. Memory is that of the rows
        requested, so a single query is cheap at any resolution.

        Args:
            images: (B, C, S, S), normalised, of any size that is a multiple of the patch.
            block: number of the block, negative from the end.
            queries: int64 (Q,), tokens whose rows to give; 0 is CLS, 1 + row * w + column a patch. None: all.

        Raises:
            ValueError: there is no such block or token.
        """
        layers = self.layers()
        if not -len(layers) <= block < len(layers):
            raise ValueError(f"block {block} does not exist; the model has {len(layers)}, numbered from 0")
        block %= len(layers)
        grid = self._grid_of(images)
        tokens = 1 + grid[0] * grid[1]
        if queries is not None and queries.numel() and not 0 <= int(queries.min()) <= int(queries.max()) < tokens:
            raise ValueError(f"queries must lie in [0, {tokens}), got {int(queries.min())} to {int(queries.max())}")
        _, normed = self._run_blocks(
            self._embed(images), self._attention_biases(images), None, layers[:block], layers[block].norm1
        )
        assert normed is not None
        attn = layers[block].attn
        q, k, _ = F.linear(normed, attn.qkv.weight, attn.qkv_bias()).float().chunk(3, dim=-1)
        q, k = (x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for x in (q, k))  # (B, H, N, K)
        table = attn.relative_position_bias_table
        if self.rel_pos_bias is not None:
            table = self.rel_pos_bias.relative_position_bias_table
        bias = torch.zeros((), device=q.device)
        if table is not None:
            bias = bias_at_grid(table, self.config.grid, grid).float()
        if queries is not None:
            q, bias = q.index_select(2, queries), bias if table is None else bias.index_select(1, queries)
        return (q @ k.transpose(-2, -1) * attn.scale + bias).softmax(-1)

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        """(h, w), the patches of these images; in a symbolic trace what computes them.

        Raises:
            ValueError: they are no floating-point tensor.
        """
        if isinstance(images, torch.fx.Proxy):
            side = self.config.patch_size
            return images.shape[-2] // side, images.shape[-1] // side
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"images must be a tensor of normalised floating-point numbers, got {kind}: "
                "(torch.as_tensor(images).float() / 255 - mean) / std"
            )
        height, width = images.shape[-2:]
        return height // self.config.patch_size, width // self.config.patch_size

    def _embed(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, C, S, S) -> (B, N, D) in the parameters' dtype, masked patches replaced, CLS in front."""
        tokens = self.patch_embed(images).to(self.cls_token.dtype)
        if mask is not None and mask_token is not None:
            tokens = torch.where(mask.unsqueeze(-1), mask_token, tokens)
        x = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        if self.pos_embed is not None:
            grid, positions = self._grid_of(images), cast(Tensor, self.pos_embed)
            if isinstance(images, torch.fx.Proxy) or grid != self.config.grid:
                positions = resize_position_embedding(positions, self.config.grid, grid)
            x = x + positions
        return self.pos_drop(x)

    def _attention_biases(self, images: Tensor, layers: Sequence[Block] | None = None) -> Callable[[int], Bias]:
        """A function that makes the bias of block i for this input size, prepared for the kernel.

        Of the model's blocks, or of other `layers` that see the same tokens.

        Only when called, because at 1024 x 1024 each is 0.8 GB in a base model; a shared one is made once.
        """
        grid, symbolic = self._grid_of(images), isinstance(images, torch.fx.Proxy)
        dtype = images.dtype
        if not symbolic and images.device.type != "meta" and torch.is_autocast_enabled(images.device.type):
            dtype = torch.get_autocast_dtype(images.device.type)

        own_grid, shared_table = self.config.grid, self.rel_pos_bias
        layers = self.layers() if layers is None else layers

        def bias_of(index: int) -> Bias:
            holder = layers[index].attn if shared_table is None else shared_table
            table: Tensor | None = holder.relative_position_bias_table
            if table is None:
                return None
            bias = bias_at_grid(table, own_grid, grid)
            return bias if symbolic else prepare_bias(bias, dtype)

        if shared_table is None:
            return bias_of
        shared = bias_of(0)
        return lambda index: shared

    def _run_blocks(
        self,
        x: Tensor,
        bias_of: Callable[[int], Bias],
        drop_path: Tensor | None,
        layers: Sequence[Block],
        final_norm: nn.Module | None,
        outputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs `layers`, each passing its successor the LayerNorm that this one reads first.

        Args:
            final_norm: what reads the output of the last of them (None: nothing does).
            outputs: receives the residual stream after each block.

        Returns:
            The residual stream after the last block, and its `final_norm`.
        """
        # a symbolic trace shows every module
        fused = [not isinstance(x, torch.fx.Proxy) and block.can_fuse() for block in layers]
        # the norm that each block computes for its successor, where that one does not have to call it itself
        norms = [block.norm1 if can else None for block, can in zip(layers, fused, strict=True)]
        fused_norm = final_norm is not None and all_stock((final_norm, nn.LayerNorm)) and final_norm.bias is not None
        norms.append(cast(nn.LayerNorm, final_norm) if fused_norm else None)
        halves: list[HalfWeights | None] = [None] * len(layers)
        can_cast = all(fused) and not self.bias_within_blocks and x.device.type != "meta"
        if can_cast and torch.is_autocast_enabled(x.device.type):
            halves = cast_weights(layers, x)
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        normed: Tensor | None = None
        for index, block in enumerate(layers):
            run: Callable[..., Any] = block.forward_fused if fused[index] else block
            if checkpointing:
                # looking up the generator's state would break a CUDA graph; a block without dropout has no use for it
                drops = self.config.attn_drop_rate > 0 or self.config.proj_drop_rate > 0
                run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=drops)
            factors = None if drop_path is None else drop_path[index]
            # no name for the bias: one of an earlier block must be gone before the next is made
            if fused[index]:
                normed = block.norm1(x) if normed is None else normed
                x, normed = run(x, normed, bias_of(index), factors, norms[index + 1], halves[index])
            elif self.bias_within_blocks:
                x, normed = run(x, partial(bias_of, index), factors), None
            else:
                x, normed = run(x, bias_of(index), factors), None
            if outputs is not None:
                outputs.append(x)
        return x, final_norm(x) if normed is None and final_norm is not None else normed
