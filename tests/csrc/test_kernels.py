"""What the compiled CPU kernels refuse; what they compute is tested with the ops, in tests/kernels."""

import pytest
import torch
from torch import Tensor

from beit_fast import _C


@pytest.mark.parametrize(
    "bias",
    [torch.zeros(5), torch.zeros(4, dtype=torch.float64), torch.zeros(8)[::2], torch.zeros(4, dtype=torch.int32),
     torch.zeros(4, device="meta")],
    ids=["size", "dtype", "strides", "integers", "device"],
)  # fmt: skip
def test_a_wrong_tensor_is_named(bias: Tensor) -> None:
    x, value, derivative = torch.zeros(3, 3, 4)
    with pytest.raises(ValueError, match="bias must be a contiguous float32 tensor of 4 elements on a CPU"):
        _C.bias_gelu(x, bias, value, derivative, 1)
    assert torch.equal(value, torch.zeros(3, 4))


@pytest.mark.parametrize("kept", [[3], [-1]])
def test_samples_that_are_not_there(kept: list[int]) -> None:
    x, total, branch = torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="kept"):
        _C.residual_norm(
            x, branch, None, torch.ones(3), None, torch.tensor(kept), None, None, 0.0, total, *torch.zeros(3, 0), 1
        )


def test_empty_tensors() -> None:
    nothing = torch.zeros(0, 4)
    _C.bias_gelu(nothing, torch.zeros(4), nothing.clone(), nothing.clone(), 2)
    _C.biased_softmax(torch.zeros(0, 2, 3, 3), torch.zeros(2, 3, 3), 2)
