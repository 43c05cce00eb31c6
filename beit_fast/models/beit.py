"""BEiT as a classifier and feature extractor, with timm's methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from beit_fast.models.backbone import BeitBackbone
from beit_fast.models.checkpoints import fitted_state_dict
from beit_fast.models.configs import BeitConfig
from beit_fast.models.hub import HubMethods
from beit_fast.models.initialisation import init_for_fine_tuning, init_head
from beit_fast.models.resize import resize_position_embedding, resize_relative_position_bias_table


class Beit(HubMethods, BeitBackbone):
    """BEiT as a classifier or feature extractor (paper section 2.6), `config.for_classification(...)`.

    With `global_pool="avg"` the mean of the patch tokens, CLS left out, goes through `fc_norm` to `head`; with
    `"token"` the CLS token goes through `norm` to `head`; with `""` every token does.

    Examples:
        >>> import torch
        >>> from beit_fast import Beit, BeitConfig
        >>> config = BeitConfig.from_preset("tiny", depth=2, image_size=64)
        >>> model = Beit(config.for_classification(10))
        >>> model(torch.zeros(2, 3, 64, 64)).shape, model.forward_features(torch.zeros(2, 3, 64, 64)).shape
        (torch.Size([2, 10]), torch.Size([2, 17, 192]))
    """

    num_prefix_tokens = 1
    """The CLS token in front of the patches."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__(config)
        self.default_cfg: dict[str, Any] = {}
        norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        after = config.norm_after_pooling
        self.norm: nn.Module = nn.Identity() if after else norm
        self.fc_norm: nn.Module = norm if after else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head: nn.Module = nn.Identity()
        init_for_fine_tuning(self)
        self._make_head()

    def _make_head(self) -> None:
        if self.config.num_classes > 0:
            self.head = nn.Linear(self.config.width, self.config.num_classes)
            init_head(self.head, self.config.init_std, self.config.head_init_scale)
        else:
            self.head = nn.Identity()

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def in_chans(self) -> int:
        return self.config.in_chans

    @property
    def global_pool(self) -> str:
        return self.config.global_pool

    @property
    def embed_dim(self) -> int:
        """D; also known to users of timm as `num_features` and `head_hidden_size`."""
        return self.config.width

    num_features = head_hidden_size = embed_dim

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the weights: input size, mean and std of the normalisation, interpolation, ..."""
        return self.default_cfg

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """What `forward_intermediates` can give: of each block its module name, channels and stride in pixels."""
        width, stride = self.config.width, self.config.patch_size
        return [{"module": f"blocks.{i}", "num_chs": width, "reduction": stride} for i in range(len(self.blocks))]

    def replace_norms(self, norm_layer: Callable[[int], nn.Module]) -> None:
        """Puts `norm_layer(width)` in place of every LayerNorm; with any other kind of norm the blocks run unfused."""
        holders = [(m, name) for m in self.modules() for name, norm in m.named_children() if type(norm) is nn.LayerNorm]
        for module, name in holders:
            norm = norm_layer(self.config.width)
            setattr(module, name, norm)
        if type(norm) is nn.LayerNorm and norm.bias is not None:
            self.config = replace(self.config, layer_norm_eps=norm.eps)
        else:
            self.is_described_by_config = False

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg", "token", ""] | None = None) -> None:
        """A fresh head of `num_classes` outputs (0: none), and another pooling if given; the norms stay as they are."""
        pool = self.config.global_pool if global_pool is None else global_pool
        after = self.config.norm_after_pooling
        self.config = replace(self.config, num_classes=num_classes, global_pool=pool, use_fc_norm=after)
        self._make_head()
        self.head.to(device=self.cls_token.device, dtype=self.cls_token.dtype).train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns of parameter groups, for its layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed|rel_pos_bias",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Makes `img_size` the model's own: position parameters are resized once and for all, as new Parameters.

        Not needed to run on images of another size, which the model does by itself; it saves the resizing at each step
        of a fine-tuning, and it is the size that the weights are then saved with. None leaves it as it is.
        """
        if img_size is None:
            return
        before, self.config = self.config.grid, replace(self.config, image_size=img_size)
        grid = self.config.grid

        def resized(module: nn.Module, name: str) -> None:
            table = getattr(module, name, None)
            if table is not None:
                resize = resize_position_embedding if name == "pos_embed" else resize_relative_position_bias_table
                setattr(module, name, nn.Parameter(resize(table.detach(), before, grid).clone(), table.requires_grad))

        resized(self, "pos_embed")
        for module in (self.rel_pos_bias, *(block.attn for block in self.layers())):
            if module is not None:
                resized(module, "relative_position_bias_table")
        if self.rel_pos_bias is not None:
            self.rel_pos_bias.window_size = grid

    def forward_features(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """(B, C, S, S) -> (B, N, D): all tokens after the last block (and `norm`, where it comes before pooling)."""
        return self._features(images, sample_keys, len(self.blocks), None)

    def _features(self, images: Tensor, sample_keys: Tensor | None, count: int, outputs: list[Tensor] | None) -> Tensor:
        """The tokens after `count` blocks, and after `norm` if these are all."""
        biases = self._attention_biases(images)
        drop_path = (
            self.drop_path(images.shape[0], sample_keys, images.device)
            if self.training and self.drop_path.rate
            else None
        )
        final_norm = self.norm if count == len(self.blocks) else None
        layers = self.layers()[:count]
        x, normed = self._run_blocks(self._embed(images), biases, drop_path, layers, final_norm, outputs)
        return x if normed is None else normed

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, num_classes), (B, N, num_classes) without pooling; `pre_logits`: what goes into the head."""
        pool = self.config.global_pool
        if pool == "avg":
            features = features[:, 1:].mean(dim=1)
        elif pool == "token":
            features = features[:, 0]
        features = self.head_drop(self.fc_norm(features))
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """(B, C, S, S) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(images, sample_keys))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features of several blocks, as timm gives them.

        Args:
            images: (B, C, S, S).
            indices: which blocks, counted from 0 (negative: from the end); n: the last n; None: all.
            return_prefix_tokens: give (features, CLS (B, 1, D)) for each.
            norm: apply `norm` to each, where the model has one.
            stop_early: do not run the blocks after the last of `indices`.
            output_fmt: "NCHW" for (B, D, h, w) or "NLC" for (B, N-1, D), without the CLS token.
            intermediates_only: leave out the first result.

        Returns:
            The final features (B, N, D), unless `intermediates_only`; and the list of features.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is unknown; choose NCHW or NLC")
        taken = take_indices(len(self.blocks), indices)
        outputs: list[Tensor] = []
        final = self._features(images, None, max(taken) + 1 if stop_early else len(self.blocks), outputs)
        results: list[Any] = []
        for index in sorted(set(taken)):
            tokens = self.norm(outputs[index]) if norm else outputs[index]
            features = tokens[:, 1:]
            if output_fmt == "NCHW":
                features = features.transpose(1, 2).unflatten(2, self._grid_of(images)).contiguous()
            results.append((features, tokens[:, :1]) if return_prefix_tokens else features)
        if intermediates_only:
            return results
        if stop_early and len(outputs) < len(self.blocks):
            final = self.norm(final)
        return final, results

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the blocks after the last of `indices`, and `norm` and the head if told to; returns the indices."""
        taken = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max(taken) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.config = replace(
                self.config, global_pool="", use_fc_norm=self.config.norm_after_pooling, num_classes=0
            )
            self.fc_norm, self.head = nn.Identity(), nn.Identity()
        return taken


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: Beit) -> dict[str, Tensor]:
    """timm's name for what fits weights to a model before `load_state_dict`: as `load_checkpoint`, from tensors."""
    return fitted_state_dict(model, state_dict)


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Block numbers from 0: all for None, the last n for an integer n; negative ones count from the end.

    Raises:
        ValueError: there is no such block.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"the last {indices} of {count} blocks: give 1 to {count}")
        return list(range(count - indices, count))
    wrong = [i for i in indices if not -count <= i < count]
    if wrong or not indices:
        raise ValueError(f"indices {list(indices)}: give some of 0 to {count - 1}, or -{count} to -1")
    return [i % count for i in indices]
