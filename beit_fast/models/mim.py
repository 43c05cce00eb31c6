"""Masked image modelling: predict the visual tokens of masked patches (paper sections 2.2 to 2.4).

The ablations of the paper's table 4 are options: `BeitConfig.mim_target` regresses pixels in place of visual tokens,
and `predict_all` takes all patches in place of the masked ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from beit_fast.kernels import Bias, masked_cross_entropy
from beit_fast.models.backbone import BeitBackbone
from beit_fast.models.beit import Beit
from beit_fast.models.checkpoints import load_state_dict
from beit_fast.models.configs import BeitConfig
from beit_fast.models.hub import HubMethods
from beit_fast.models.initialisation import init_for_pretraining, rescale_outputs
from beit_fast.nn import Block, DropPathRates
from beit_fast.nn.block import cast_weights
from beit_fast.nn.stock import all_stock


@dataclass
class MaskedImageModelingOutput:
    """Result of one forward pass; all tensors are 0-d and stay on the device."""

    loss: Tensor
    """Cross-entropy (nats) or squared error over the masked positions, float32; the mean, unless `num_targets` said
    otherwise."""
    accuracy: Tensor
    """Share of masked positions whose most probable token is the right one, float32; nan for pixels."""
    num_masked: int
    """M, the masked positions of this batch; all its patches where the loss is taken at all of them."""
    num_correct: Tensor
    """Masked positions predicted right, int64; 0 for pixels."""
    extra_num_correct: Tensor | None = None
    """The same of BEiT v2's extra head, whose loss is then part of `loss`; None where it did not run."""


# DDP finds the tensors of an output by torch's tree of containers; with a static graph, gradients of a tensor that it
# does not find are never reduced.
register_dataclass(MaskedImageModelingOutput)


class BeitForMaskedImageModeling(HubMethods, BeitBackbone):
    """BEiT in pre-training: a mask token in place of each masked patch, a linear head over the visual vocabulary.

    Only masked positions go through the head, and in the last block only they go through everything after the
    attention: nothing reads the others, so the loss and all gradients are the same.

    With `config.mim_target` "pixels" the head predicts the C * P * P pixels of a patch instead, ordered (C, P, P). The
    paper does not say how it compares pixels (table 4); here it is by the mean squared error of the pixels as they are
    given, that is, normalised by the data's mean and standard deviation, each patch counting alike.

    With `config.head_layers` there is BEiT v2's extra head (arXiv 2208.06366, section 2.3), which makes CLS a summary
    of the image: the CLS token of the last block beside the patch tokens of block `early_layers` goes through so many
    extra blocks, the same norm and the same head. While training, its loss is added; in evaluation it does not run.

    Examples:
        >>> import torch
        >>> from beit_fast import BeitConfig, BeitForMaskedImageModeling
        >>> from beit_fast.data import BlockwiseMasking
        >>> model = BeitForMaskedImageModeling(BeitConfig.from_preset("tiny", depth=2))
        >>> images, tokens = torch.zeros(2, 3, 224, 224), torch.zeros(2, 196, dtype=torch.int64)
        >>> mask = BlockwiseMasking((14, 14), 75).sample(seed=0, epoch=0, indices=[0, 1])
        >>> output = model(images, mask, tokens)
        >>> output.loss.shape, int(output.num_masked)
        (torch.Size([]), 150)
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__(config)
        pixels = config.mim_target == "pixels"
        outputs = config.in_chans * config.patch_size**2 if pixels else config.vocab_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.width, outputs)
        init_for_pretraining(self, self.mask_token)
        if config.head_layers:
            window = config.grid if config.relative_position_bias == "per_block" else None
            # as in the official code, whose initialisation these blocks come after: their matrices are torch's own
            self.cls_pt_layers = nn.ModuleList(
                Block(
                    config.width, config.num_heads, config.mlp_ratio, config.layer_norm_eps, config.layer_scale_init,
                    window, config.qkv_bias, config.attn_drop_rate, config.proj_drop_rate,
                )
                for _ in range(config.head_layers)
            )  # fmt: skip
            rescale_outputs(self.extra_layers(), config.early_layers + 1)
            self.drop_path = DropPathRates(config.drop_path_rate, config.depth, config.head_layers, config.early_layers)

    def extra_layers(self) -> list[Block]:
        """The blocks of the extra head from first to last; none where the model has no such head."""
        return cast(list[Block], list(self.cls_pt_layers)) if self.config.head_layers else []

    def forward(
        self,
        images: Tensor,
        mask: Tensor,
        visual_tokens: Tensor | None = None,
        sample_keys: Tensor | None = None,
        num_targets: Tensor | None = None,
        masked_indices: Tensor | None = None,
        predict_all: bool = False,
    ) -> MaskedImageModelingOutput:
        """Loss and accuracy of predicting the visual tokens at the masked positions.

        Args:
            images: (B, C, S, S), normalised.
            mask: bool (B, N-1) or (B, h, w), true where a patch is hidden.
            visual_tokens: int64; of all patches, (B, N-1) or (B, h, w), or of the masked ones in row order, (M,) or
                (B, M/B). None where the targets are pixels: they are taken from `images`.
            sample_keys: int64 (B,), makes drop path a function of the sample (see `nn.drop_path_scales`).
            num_targets: 0-d; the sum of losses is divided by it instead of M, which makes the gradient independent
                of how a global batch was split.
            masked_indices: int64 (M,), `mask.flatten().nonzero()` known beforehand; it saves a host sync on a GPU.
            predict_all: take the loss at all patches, hidden or not ("recover 100 % visual tokens", table 4); the mask
                may then be empty.

        Raises:
            ValueError: nothing is masked, the shapes do not fit, or visual tokens are missing.
        """
        mask, masked_indices = self._masked_indices(images, mask, masked_indices, predict_all)
        num_masked = masked_indices.shape[0]
        count = num_masked if num_targets is None else num_targets
        pixels = self.config.mim_target == "pixels"
        if visual_tokens is None and not pixels:
            raise ValueError("visual_tokens are missing; only a model with mim_target='pixels' needs none")
        targets = None if visual_tokens is None else self._targets_at(visual_tokens, masked_indices, mask)
        hidden, *extra = self._hidden_at(images, mask, masked_indices, sample_keys, self.training)
        norm, head = self.norm, self.lm_head
        if pixels or targets is None:
            predicted = head(norm(hidden)).float()
            loss = (predicted - self._pixels_at(images, masked_indices)).square().mean(1).sum() / count
            nothing = torch.zeros((), dtype=torch.int64, device=hidden.device)
            return MaskedImageModelingOutput(loss, torch.full_like(loss, torch.nan), num_masked, nothing)
        losses, corrects = [], []
        for states in (hidden, *extra):
            if all_stock((norm, nn.LayerNorm), (head, nn.Linear)):
                rows = torch.arange(num_masked, device=states.device)
                loss, num_correct = masked_cross_entropy(
                    states, rows, targets, norm.weight, norm.bias, head.weight, head.bias, norm.eps, num_targets
                )
            else:
                logits = head(norm(states)).float()
                loss = F.cross_entropy(logits, targets, reduction="sum") / count
                num_correct = (logits.argmax(1) == targets).sum()
            losses.append(loss)
            corrects.append(num_correct)
        return MaskedImageModelingOutput(
            sum(losses[1:], losses[0]), corrects[0].float() / num_masked, num_masked, *corrects
        )

    def predict_tokens(self, images: Tensor, mask: Tensor, predict_all: bool = False) -> Tensor:
        """Logits (M, V), or pixels (M, C * P * P), at the masked positions in row order, or at all."""
        mask, masked_indices = self._masked_indices(images, mask, None, predict_all)
        return self.lm_head(self.norm(self._hidden_at(images, mask, masked_indices, None)[0]))

    def _masked_indices(
        self, images: Tensor, mask: Tensor, masked_indices: Tensor | None, predict_all: bool
    ) -> tuple[Tensor, Tensor]:
        """The mask as (B, N-1), and where to predict: the indices of its true entries in the flattened mask, or all."""
        height, width = self._grid_of(images)
        expected = images.shape[0], height * width
        mask = mask.flatten(1)
        if mask.shape != expected or mask.is_floating_point():
            raise ValueError(f"mask must be bool or of integers, {expected}, got {mask.dtype} {tuple(mask.shape)}")
        mask = mask.bool()
        if predict_all:
            masked_indices = torch.arange(mask.numel(), device=mask.device)
        elif masked_indices is None:
            masked_indices = mask.flatten().nonzero().squeeze(1)
        if torch.compiler.is_exporting():
            torch._check(masked_indices.shape[0] > 0)  # what the program may rely on: it knows no mask
        elif masked_indices.shape[0] == 0:
            raise ValueError("the mask hides no patch, so there is nothing to predict: mask at least one")
        return mask, masked_indices

    def _targets_at(self, visual_tokens: Tensor, masked_indices: Tensor, mask: Tensor) -> Tensor:
        """(M,): the visual tokens of the masked patches."""
        tokens = visual_tokens.flatten()
        if tokens.shape[0] == mask.numel():
            return tokens[masked_indices]
        if tokens.shape[0] != masked_indices.shape[0]:
            raise ValueError(
                f"visual_tokens has {tokens.shape[0]} entries; give one for each of the {mask.numel()} patches or for "
                f"each of the {masked_indices.shape[0]} masked ones"
            )
        return tokens

    def _pixels_at(self, images: Tensor, masked_indices: Tensor) -> Tensor:
        """(M, C * P * P) float32: the pixels of the masked patches."""
        patches = F.unfold(images.float(), self.config.patch_size, stride=self.config.patch_size)  # (B, C*P*P, N-1)
        return patches.transpose(1, 2).flatten(0, 1).index_select(0, masked_indices)

    def _hidden_at(
        self, images: Tensor, mask: Tensor, masked_indices: Tensor, sample_keys: Tensor | None, extra: bool = False
    ) -> list[Tensor]:
        """(M, D): the residual stream after the last block at the masked positions, before the final norm.

        With `extra` also the same of the extra head, where there is one.
        """
        bias_of = self._attention_biases(images)
        drop_path = (
            self.drop_path(images.shape[0], sample_keys, images.device)
            if self.training and self.drop_path.rate
            else None
        )
        x = self._embed(images, mask, self.mask_token)
        sample = torch.div(masked_indices, mask.shape[1], rounding_mode="floor")
        tokens = masked_indices + sample + 1  # every sample has one CLS token in front of its patches
        if not (extra and self.config.head_layers):
            return [self._run_at(x, bias_of, drop_path, self.layers(), tokens, sample)]
        every = torch.arange(x.shape[0], device=x.device)
        outputs: list[Tensor] = []
        last = self._run_at(
            x, bias_of, drop_path, self.layers(), torch.cat((tokens, every * x.shape[1])), torch.cat((sample, every)),
            outputs,
        )  # fmt: skip
        hidden, cls = last.split((tokens.shape[0], x.shape[0]))
        x = torch.cat((cls.unsqueeze(1), outputs[self.config.early_layers - 1][:, 1:]), dim=1)
        layers = self.extra_layers()
        if self.rel_pos_bias is None:
            bias_of = self._attention_biases(images, layers)
        rest = None if drop_path is None else drop_path[self.config.depth :]
        return [hidden, self._run_at(x, bias_of, rest, layers, tokens, sample)]

    def _run_at(
        self, x: Tensor, bias_of: Callable[[int], Bias], drop_path: Tensor | None, layers: list[Block], tokens: Tensor,
        sample: Tensor, outputs: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Run `layers` on x (B, N, D), the last of them at some tokens only: attention over all, the rest at those.

        Args:
            tokens: int64 (M,), indices into the B * N tokens.
            sample: int64 (M,), which sample each belongs to.
            outputs: receives the residual stream after each block but the last.

        Returns:
            (M, D), the residual stream after the last block.
        """
        *front, last = layers
        if not last.can_fuse():
            x, _ = self._run_blocks(x, bias_of, drop_path, layers, None, outputs)
            return x.flatten(0, 1).index_select(0, tokens)
        x, normed = self._run_blocks(x, bias_of, drop_path, front, last.norm1, outputs)
        assert normed is not None
        # each token a sample of one
        autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        half = cast_weights([last], x)[0] if autocast and not self.bias_within_blocks else None
        heads = last.attn.attend(normed, bias_of(len(front)), half)
        heads, x = (tensor.flatten(0, 1).index_select(0, tokens).unsqueeze(1) for tensor in (heads, x))
        factors = None if drop_path is None else drop_path[len(front)].index_select(1, sample)
        return last.forward_after_attention(x, heads, factors, half=half)[0].squeeze(1)


def without_extra_head(model: BeitForMaskedImageModeling) -> BeitForMaskedImageModeling:
    """A copy without BEiT v2's extra head, in evaluation mode; a model that has none itself."""
    if not model.config.head_layers:
        return model
    copy = BeitForMaskedImageModeling(replace(model.config, head_layers=0, early_layers=0))
    load_state_dict(copy, model.state_dict(), verbose=False)
    return copy.to(next(model.parameters()).device).eval()


def pretrained_backbone(model: BeitForMaskedImageModeling) -> Beit:
    """A copy of the pre-trained blocks and the norm behind them as a `Beit` without a head, in evaluation mode.

    Each block gets a copy of a shared table.
    """
    backbone = Beit(model.config.for_classification(0, global_pool="token"))
    load_state_dict(backbone, model.state_dict(), verbose=False)
    return backbone.to(next(model.parameters()).device).eval()
