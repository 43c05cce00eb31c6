"""color_jitter against a pixel-by-pixel formula, the compiled CPU pass, and as a Triton kernel."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit_fast.kernels import color_jitter, use_backend

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Check = Callable[[str, Tensor, Tensor, Tensor], None]


def make(B: int, H: int, W: int, device: str = "cpu") -> dict[str, Any]:
    generator = np.random.default_rng(0)
    factors = generator.uniform(0.3, 1.7, (B, 3)).astype(np.float32)
    factors[:1] = (3.0, 2.0, 2.5)  # enough to clip at every step
    arrays = {
        "crops": generator.integers(0, 256, (B, H, W, 3), dtype=np.uint8),
        "flips": np.arange(B) % 2 == 1,
        "factors": factors,
        "centers": generator.uniform(60, 180, B).astype(np.float32),
    }
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def by_hand(crops: Tensor, flips: Tensor, factors: Tensor, centers: Tensor) -> Tensor:
    """One pixel at a time, in Python's own floats."""

    def clip(value: float) -> float:
        return min(max(value, 0.0), 255.0)

    B, H, W, _ = crops.shape
    out = torch.empty(B, 3, H, W, dtype=torch.float64)
    for b in range(B):
        brightness, contrast, saturation = map(float, factors[b])
        level = clip(brightness * float(centers[b]))
        for y in range(H):
            for x in range(W):
                rgb = [clip(brightness * float(v)) for v in crops[b, y, W - 1 - x if flips[b] else x]]
                rgb = [clip(contrast * v + (1 - contrast) * level) for v in rgb]
                gray = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
                for c, v in enumerate(rgb):
                    out[b, c, y, x] = (clip(saturation * v + (1 - saturation) * gray) / 255 - MEAN[c]) / STD[c]
    return out


def test_equals_the_formula_by_hand() -> None:
    views = make(3, 5, 4)
    ours = color_jitter(**views, mean=MEAN, std=STD)
    torch.testing.assert_close(ours.double(), by_hand(**views), rtol=1e-5, atol=1e-5)


def test_equals_the_compiled_pass() -> None:
    _C = pytest.importorskip("beit_fast._C", reason="beit_fast._C is not built")
    views = make(4, 24, 17)
    arrays = [views[name].numpy() for name in ("crops", "flips", "factors", "centers")]
    compiled = torch.from_numpy(_C.transform_views(*arrays, MEAN, STD))
    torch.testing.assert_close(color_jitter(**views, mean=MEAN, std=STD), compiled, rtol=1e-5, atol=1e-5)


def test_maps_pixels_for_a_tokenizer() -> None:
    """mean = -b / a and std = 1 / a give a x + b, such as the 0.8 x + 0.1 of the DALL-E tokenizer."""
    views = make(2, 4, 4)
    views["factors"].fill_(1.0)
    mapped = color_jitter(**views, mean=(-0.125,) * 3, std=(1.25,) * 3)
    pixels = views["crops"].permute(0, 3, 1, 2).float() / 255
    pixels[1] = pixels[1].flip(2)
    torch.testing.assert_close(mapped, 0.8 * pixels + 0.1)


def test_dispatch() -> None:
    views = make(2, 4, 6)
    arguments = (*views.values(), list(MEAN), list(STD), torch.bfloat16, "cpu")
    torch.library.opcheck(torch.ops.beit_fast.color_jitter, arguments)
    compiled = torch.compile(color_jitter, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*views.values(), MEAN, STD), color_jitter(*views.values(), MEAN, STD))
    assert color_jitter(**make(0, 4, 6), mean=MEAN, std=STD).shape == (0, 3, 4, 6)


@pytest.mark.parametrize("name", ["crops", "flips", "factors", "centers"])
def test_wrong_arguments_are_named(name: str) -> None:
    views = make(3, 4, 4)
    views[name] = views[name][:2] if name != "crops" else views[name].float()
    with pytest.raises(ValueError, match=name):
        color_jitter(**views, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="mean and std"):
        color_jitter(**make(3, 4, 4), mean=(0.5,), std=(0.5,))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton(triton_device: str, dtype: torch.dtype, assert_accurate: Check) -> None:
    views = make(3, 40, 31, triton_device)
    ours = color_jitter(**views, mean=MEAN, std=STD, dtype=dtype)
    with use_backend("reference"):
        eager = color_jitter(**views, mean=MEAN, std=STD, dtype=dtype)
        wide = views | {"factors": views["factors"].double()}
        exact = color_jitter(**wide, mean=MEAN, std=STD, dtype=torch.float64)
    assert_accurate("view", ours, eager, exact)
