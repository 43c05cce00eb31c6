"""BEiT's pre-training step the way the official code makes it, and with the techniques of beit_fast added one by one.

Written from the description of the method. Without techniques it is the official order of work: a strided convolution
for the patches, a gathered bias added to the scores in fp32, one operation after the other on the residual stream, the
final norm on all tokens, the head on the masked ones, AdamW parameter by parameter with gradient clipping on the host's
terms, and `.item()` and a synchronisation in every step. Each technique replaces one of these pieces.

Weights are a flat dict by official name, those of `BeitForMaskedImageModeling.state_dict()`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast import BeitConfig, kernels
from beit_fast.train.optim import optimizer_step

TECHNIQUES = {
    "patches": "patch embedding as a matrix product",
    "products": "on a CPU, fp32 products by oneDNN where MKL has no AVX-512",
    "position_bias": "table spread without an index, folded without a sort",
    "attention": "fused attention, bias gradient included",
    "residual": "residual + LayerScale + LayerNorm in one op",
    "gelu": "bias and GELU in one op",
    "masked_rows": "last block behind its attention at masked positions only",
    "loss": "final norm, head, loss and accuracy in one op, masked rows only",
    "optimizer": "fused AdamW; clipping and skipping on the device",
    "no_sync": "no .item() and no synchronisation in the step",
}

Weights = Mapping[str, Tensor]


def trainable(state: Weights) -> dict[str, nn.Parameter]:
    """Copies of the floating tensors of a state dict, as parameters."""
    return {n: nn.Parameter(t.detach().clone()) for n, t in state.items() if t.is_floating_point()}


class OfficialStyle:
    """The forward pass over a dict of weights, with the given techniques."""

    def __init__(self, config: BeitConfig, weights: Weights, techniques: Collection[str] = ()) -> None:
        if unknown := set(techniques) - set(TECHNIQUES):
            raise ValueError(f"unknown techniques: {', '.join(sorted(unknown))}")
        self.config, self.w, self.uses = config, weights, frozenset(techniques)
        some = next(iter(weights.values()))
        self.index = kernels.relative_position_index(config.grid).to(some.device)
        self.scale = (config.width // config.num_heads) ** -0.5

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (kernels.linear if "products" in self.uses else F.linear)(x, weight, bias)

    def block(self, i: int) -> dict[str, Tensor | None]:
        prefix = f"blocks.{i}."
        found: dict[str, Tensor | None] = {
            name.removeprefix(prefix): value for name, value in self.w.items() if name.startswith(prefix)
        }
        return {"gamma_1": None, "gamma_2": None, **found}

    def loss(self, images: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, S, S), mask bool (B, N-1), labels (M,) in row order -> (loss, number predicted right), 0-d."""
        w, uses, c = self.w, self.uses, self.config
        x = self.tokens(images, mask)
        bias = self.bias(x.dtype if not torch.is_autocast_enabled(x.device.type) else None)
        rows = mask.flatten().nonzero().squeeze(1) if uses & {"masked_rows", "loss"} else None
        normed = F.layer_norm(x, (c.width,), w["blocks.0.norm1.weight"], w["blocks.0.norm1.bias"], c.layer_norm_eps)
        for i in range(c.depth):
            p = self.block(i)
            mixed = self.attention(p, normed, bias)
            last = i == c.depth - 1
            if last and rows is not None and "masked_rows" in uses:
                at = rows + rows // mask.shape[1] + 1
                mixed, x = (t.flatten(0, 1).index_select(0, at).unsqueeze(1) for t in (mixed, x))
            following = None if last else self.block(i + 1)
            x, normed = self.rest_of_block(p, x, mixed, following)
        if "masked_rows" in uses:
            hidden = x.flatten(0, 1)
            at = torch.arange(labels.shape[0], device=labels.device)
        else:
            hidden = x.flatten(0, 1)
            at = None if rows is None else rows + rows // mask.shape[1] + 1
        norm = w["norm.weight"], w["norm.bias"]
        head = w["lm_head.weight"], w["lm_head.bias"]
        if "loss" in uses:
            assert at is not None
            return kernels.masked_cross_entropy(hidden, at, labels, *norm, *head, c.layer_norm_eps)
        if "masked_rows" in uses:
            chosen = F.layer_norm(hidden, (c.width,), *norm, c.layer_norm_eps)
        else:
            chosen = F.layer_norm(x, (c.width,), *norm, c.layer_norm_eps)[:, 1:][mask]
        logits = self.linear(chosen, *head)
        return F.cross_entropy(logits, labels), (logits.max(-1)[1] == labels).sum()

    def tokens(self, images: Tensor, mask: Tensor) -> Tensor:
        w, c = self.w, self.config
        weight, bias, side = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], c.patch_size
        if "patches" in self.uses:
            batch, channels, (h, width) = images.shape[0], images.shape[1], c.grid
            patches = images.view(batch, channels, h, side, width, side).permute(0, 2, 4, 1, 3, 5)
            x = self.linear(patches.reshape(batch, h * width, -1), weight.flatten(1), bias)
            x = torch.where(mask.unsqueeze(-1), w["mask_token"], x.to(weight.dtype))
        else:
            x = F.conv2d(images, weight, bias, stride=side).flatten(2).transpose(1, 2)
            m = mask.unsqueeze(-1).type_as(w["mask_token"])
            x = x * (1 - m) + w["mask_token"].expand(len(x), x.shape[1], -1) * m
        x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x), dim=1)
        return x + w["pos_embed"] if "pos_embed" in w else x

    def bias(self, dtype: torch.dtype | None) -> Any:
        """(H, N, N), or what the fused attention wants, or None."""
        table = self.w.get("rel_pos_bias.relative_position_bias_table")
        if table is None:
            return None
        if "position_bias" in self.uses:
            bias = kernels.relative_position_bias(table, self.config.grid)
        else:
            n = self.index.shape[0]
            bias = table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        if "attention" in self.uses:
            bias = kernels.prepare_bias(bias, dtype or torch.get_autocast_dtype(table.device.type))
        return bias

    def attention(self, p: Mapping[str, Any], x: Tensor, bias: Any) -> Tensor:
        """(B, N, D) -> (B, N, D), before the output projection."""
        batch, n, width = x.shape
        heads = self.config.num_heads
        qkv_bias = torch.cat((p["attn.q_bias"], torch.zeros_like(p["attn.v_bias"]), p["attn.v_bias"]))
        qkv = self.linear(x, p["attn.qkv.weight"], qkv_bias).reshape(batch, n, 3, heads, width // heads)
        if "attention" in self.uses:
            return kernels.packed_attention(qkv, bias, self.scale).reshape(batch, n, width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(batch, n, width)

    def rest_of_block(
        self, p: Mapping[str, Any], x: Tensor, mixed: Tensor, following: Mapping[str, Any] | None
    ) -> tuple[Tensor, Tensor]:
        """Everything behind the mixing of tokens: the residual stream, and the next block's norm1 of it."""
        eps, width = self.config.layer_norm_eps, (self.config.width,)
        proj, norm2 = (p["attn.proj.weight"], p["attn.proj.bias"]), (p["norm2.weight"], p["norm2.bias"])
        fc2 = p["mlp.fc2.weight"], p["mlp.fc2.bias"]
        if "residual" in self.uses:
            branch = self.linear(mixed, proj[0])
            x, normed = kernels.residual_layer_norm(x, branch, p["gamma_1"], None, *norm2, eps, proj[1])
            branch = self.linear(self.hidden(p, normed), fc2[0])
            if following is None:
                x = kernels.residual_add(x, branch, p["gamma_2"], None, fc2[1])
                return x, x
            norm1 = following["norm1.weight"], following["norm1.bias"]
            return kernels.residual_layer_norm(x, branch, p["gamma_2"], None, *norm1, eps, fc2[1])
        branch = self.linear(mixed, *proj)
        x = x + (branch if p["gamma_1"] is None else p["gamma_1"] * branch)
        branch = self.linear(self.hidden(p, F.layer_norm(x, width, *norm2, eps)), *fc2)
        x = x + (branch if p["gamma_2"] is None else p["gamma_2"] * branch)
        if following is None:
            return x, x
        return x, F.layer_norm(x, width, following["norm1.weight"], following["norm1.bias"], eps)

    def hidden(self, p: Mapping[str, Any], normed: Tensor) -> Tensor:
        weight, bias = p["mlp.fc1.weight"], p["mlp.fc1.bias"]
        if "gelu" in self.uses:
            return kernels.bias_gelu(self.linear(normed, weight), bias)
        return F.gelu(self.linear(normed, weight, bias))


class OfficialStep:
    """One optimizer step over given images, mask and labels; `dtype` is autocast's on a GPU, fp32 means none."""

    def __init__(
        self, model: OfficialStyle, learning_rate: float = 1.5e-3, clip: float = 3.0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model, self.clip, self.dtype = model, clip, dtype
        exempt = ("pos_embed", "cls_token")
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": 0.05}, {"params": [], "weight_decay": 0.0}]
        for name, tensor in model.w.items():
            plain = tensor.ndim == 1 or name.endswith(".bias") or name in exempt
            groups[plain]["params"].append(tensor)
        fused = {"fused": True} if "optimizer" in model.uses else {}
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, **fused)
        self.parameters = [p for group in groups for p in group["params"]]
        self.one = torch.ones((), device=self.parameters[0].device)

    def forward_backward(self, images: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, number predicted right); gradients are fresh."""
        for parameter in self.parameters:
            parameter.grad = None
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss, correct = self.model.loss(images, mask, labels)
        loss.backward()
        return loss.detach(), correct

    def __call__(self, images: Tensor, mask: Tensor, labels: Tensor) -> tuple[Any, Any]:
        """(loss, accuracy): numbers on the host, or with `no_sync` tensors on the device."""
        uses, device = self.model.uses, images.device
        for parameter in self.parameters:
            parameter.grad = None
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss, correct = self.model.loss(images, mask, labels)
        if "no_sync" not in uses and not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()}")
        loss.backward()
        if "optimizer" in uses:
            optimizer_step(self.optimizer, self.one, self.clip)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
            self.optimizer.step()
        accuracy = correct / labels.shape[0]
        if "no_sync" in uses:
            return loss.detach(), accuracy
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return loss.item(), accuracy.item()
