"""How many launches a training step would make on a GPU: an estimate, counted in Triton's interpreter."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.kernels import half_linear, launch_table

# operators that make or describe a tensor without running anything on a GPU
NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view",
             "promote_types", "lift_fresh", "_record_function_enter_new", "_record_function_exit")  # fmt: skip

# kernels of operators on lists of tensors, as a profile of BEiT-B's step on an H100 had them; BEiT-L has 3.5 times the
# weights
LISTS = {"_fused_adamw_": 9, "_foreach_norm": 6, "_foreach_mul_": 4, "_foreach_add_": 3, "_foreach_copy_": 6}


class Operators(TorchDispatchMode):
    """Counts the operators that are called under it, views and bare memory left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and name not in NO_LAUNCH:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def launches_of_a_step(depth: int) -> tuple[Counter[str], Counter[str]]:
    """Operators and Triton kernels of one step: loss, gradients, clipping, AdamW."""
    torch.manual_seed(0)
    config = BeitConfig(image_size=32, width=32, depth=depth, num_heads=1, vocab_size=64, drop_path_rate=0.1)
    model = BeitForMaskedImageModeling(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(0, 64, (2, 4))
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    masked_indices = mask.flatten().nonzero().squeeze(1)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(images, mask, tokens, masked_indices=masked_indices)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()

    kernels: Counter[str] = Counter()
    run = launch_table.launch

    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        kernels[kernel.fn.__name__] += 1
        with _disable_current_modes():  # the interpreter works with torch as well
            run(kernel, *arguments, **constants)

    def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        kernels["wide_product"] += 1  # on a GPU one product, on a CPU two casts and one
        with _disable_current_modes():
            return wide(left, right)

    wide = half_linear.wide_product
    step()  # what only a first step does is not counted
    with pytest.MonkeyPatch.context() as patch:
        for module in list(sys.modules.values()):
            if module.__name__.startswith("beit_fast.kernels.") and vars(module).get("launch") is run:
                patch.setattr(module, "launch", launch)
        patch.setattr(half_linear, "wide_product", wide_product)
        with Operators() as operators:
            step()
    return operators.found, kernels


def test_launches_of_a_step(triton_device: str) -> None:
    """Of a block at most 27, of them 12 our own: an estimate of at most 550 for 12 blocks and 1,000 for 24."""
    if triton_device != "cpu":
        pytest.skip("an estimate without a GPU")
    (few, few_kernels), (many, many_kernels) = (launches_of_a_step(depth) for depth in (2, 3))
    own = {name: many_kernels[name] - few_kernels[name] for name in many_kernels}
    of_torch = {name: many[name] - few[name] for name in many if many[name] > few[name]}
    assert sum(own.values()) - own["wide_product"] <= 12, own
    block = sum(own.values()) + sum(of_torch.values())
    assert 12 < block <= 27, of_torch
    others = sum(few.values()) + sum(few_kernels.values()) - 2 * block
    lists = sum(few[name] * (LISTS[name] - 1) for name in LISTS)
    assert lists > 0
    assert 12 * block + others + lists <= 550, few
    assert 24 * block + others + 3.5 * lists <= 1000, few
