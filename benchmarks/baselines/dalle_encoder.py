"""DALL-E's encoder in plain torch, operation by operation, as the official code of BEiT runs it.

It is kept as it is, whatever becomes of beit_fast's own encoder, so that every baseline tokenises at the same speed. On
a GPU it runs in the official mixed precision: fp16 but for the output convolution.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS, BLOCKS = 4, 2


class PlainDalleEncoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, V, H/8, W/8).

    Args:
        state: the released file's tensors by name, without `blocks.` in front or with it.
        half: fp16 for all but the output convolution.
    """

    def __init__(self, state: Mapping[str, Tensor], half: bool) -> None:
        super().__init__()
        self.half_precision = half
        for name, tensor in state.items():
            name = name.removeprefix("blocks.")
            own = tensor.half() if half and not name.startswith("output") else tensor.float()
            self.register_buffer(name.replace(".", "_"), own.clone())

    def conv(self, x: Tensor, name: str) -> Tensor:
        name = name.replace(".", "_")
        w, b = self.get_buffer(f"{name}_w"), self.get_buffer(f"{name}_b")
        return F.conv2d(x.to(w.dtype), w, b, padding=w.shape[-1] // 2)

    def block(self, x: Tensor, name: str) -> Tensor:
        has_identity = hasattr(self, f"{name.replace('.', '_')}_id_path_w")
        identity = self.conv(x, f"{name}.id_path") if has_identity else x
        for number in (1, 2, 3, 4):
            x = self.conv(F.relu(x), f"{name}.res_path.conv_{number}")
        return identity + x / (GROUPS * BLOCKS) ** 2

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(0.8 * images + 0.1, "input")  # DALL-E's map of pixels to [0.1, 0.9]
        for group in range(1, GROUPS + 1):
            for number in range(1, BLOCKS + 1):
                x = self.block(x, f"group_{group}.block_{number}")
            x = F.max_pool2d(x, 2) if group < GROUPS else x
        return self.conv(F.relu(x), "output.conv")


def official_tokens(encoder: nn.Module, images: Tensor, mask: Tensor) -> Tensor:
    """Labels (M,) as the official code makes them: all logits, arg-max, then the mask (B, N)."""
    with torch.no_grad():
        return encoder(images).argmax(dim=1).flatten(1)[mask]
