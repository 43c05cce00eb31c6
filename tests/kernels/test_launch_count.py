"""How many launches a training step would make on a GPU: an estimate, counted in Triton's interpreter."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.kernels import launch_table

# operators that make or describe a tensor without running anything on a GPU
NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view",
             "promote_types", "lift_fresh", "_record_function_enter_new", "_record_function_exit")  # fmt: skip


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

    step()
    with pytest.MonkeyPatch.context() as patch:
        for module in list(sys.modules.values()):
            if module.__name__.startswith("beit_fast.kernels.") and vars(module).get("launch") is run:
                patch.setattr(module, "launch", launch)
        with Operators() as operators:
            step()
    return operators.found, kernels


def test_launches_of_a_step(triton_device: str) -> None:
    """Of a block at most 40, of them 12 our own; 100 besides: an estimate of 580 for 12 blocks."""
    if triton_device != "cpu":
        pytest.skip("an estimate without a GPU")
    (few, few_kernels), (many, many_kernels) = (launches_of_a_step(depth) for depth in (2, 3))
    own = {name: many_kernels[name] - few_kernels[name] for name in many_kernels}
    of_torch = {name: many[name] - few[name] for name in many if many[name] > few[name]}
    assert sum(own.values()) <= 12, own
    assert sum(own.values()) + sum(of_torch.values()) <= 40, of_torch
    assert sum(few.values()) + sum(few_kernels.values()) - 2 * 40 <= 100, few
