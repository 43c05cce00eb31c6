"""What only a GPU can show of the ops: the dispatcher, capture in a CUDA graph, races, tensors of another GPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels import bias_gelu, color_jitter, masked_cross_entropy, residual_add, residual_layer_norm
from beit_fast.kernels.linear_argmax import linear_argmax

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def leaves(device: str = "cuda") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    B, N, D, V = 6, 33, 192, 500
    return {
        "x": draw(B, N, D),
        "branch": draw(B, N, D, dtype=torch.bfloat16),
        "gamma": draw(D),
        "weight": draw(D),
        "bias": draw(D),
        "branch_bias": draw(D),
        "head_weight": draw(V, D),
        "head_bias": draw(V),
    }


def step(i: dict[str, Tensor], rows: Tensor, targets: Tensor, factors: Tensor) -> list[Tensor]:
    """Every op of the residual path, GELU and the loss, and all gradients."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        x, y = residual_layer_norm(
            i["x"], i["branch"], i["gamma"], factors, i["weight"], i["bias"], 1e-6, i["branch_bias"]
        )
        x = residual_add(x, bias_gelu(y, i["branch_bias"]), i["gamma"], factors, i["branch_bias"])
        loss, correct = masked_cross_entropy(
            x.flatten(0, 1), rows, targets, i["weight"], i["bias"], i["head_weight"], i["head_bias"]
        )
    return [loss, correct, *torch.autograd.grad(loss, list(i.values()))]


def positions(device: str = "cuda", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(6 * 33, generator=generator)[:50]
    targets = torch.randint(0, 500, (50,), generator=generator)
    rows[45:], targets[45:] = rows[0], -100
    factors = torch.tensor([1.25, 0.0, 1.25, 1.25, 0.0, 1.25])
    return rows.to(device), targets.to(device), factors.to(device)


def test_opcheck() -> None:
    i, (rows, targets, factors) = leaves(), positions()
    ops = torch.ops.beit_fast
    norm = (i["x"], i["branch"], i["gamma"], factors, i["weight"], i["bias"], 1e-6, i["branch_bias"])
    torch.library.opcheck(ops.residual_norm, (*norm, None, "triton"))
    torch.library.opcheck(ops.residual_norm, (*norm[:4], None, None, 0.0, norm[7], None, "triton"))
    torch.library.opcheck(ops.bias_gelu, (i["branch"], i["bias"], "triton"))
    head = (i["x"].detach().flatten(0, 1).requires_grad_(), rows, targets, i["weight"], i["bias"])
    head += (i["head_weight"], i["head_bias"], 1e-6, torch.tensor(45, device="cuda"), torch.bfloat16)
    torch.library.opcheck(ops.masked_cross_entropy, (*head, True, "triton"))


def test_a_hundred_runs_give_the_same_bits() -> None:
    i, where = leaves(), positions()
    first = step(i, *where)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, step(i, *where), strict=True))


def test_capture_in_a_cuda_graph() -> None:
    """A captured step gives what an uncaptured one gives, also for other masks: nothing depends on their values."""
    i, where = leaves(), positions()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(i, *where)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(i, *where)
    for seed in (1, 2):
        others = positions(seed=seed)
        for buffer, value in zip(where, others, strict=True):
            buffer.copy_(value)
        graph.replay()
        for replayed, eager in zip(captured, step(i, *others), strict=True):
            assert torch.equal(replayed, eager)


def test_no_op_waits_for_the_host() -> None:
    i, where = leaves(), positions()
    step(i, *where)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(i, *where)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_gpu_that_is_not_the_current_one() -> None:
    found = [step(leaves(device), *positions(device)) for device in ("cuda:0", "cuda:1")]
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*found, strict=True))


def test_views_of_a_full_batch() -> None:
    crops = torch.randint(0, 256, (64, 224, 224, 3), dtype=torch.uint8, device="cuda")
    factors, flips = torch.rand(64, 3, device="cuda") + 0.5, torch.arange(64, device="cuda") % 2 == 0
    centers = torch.full((64,), 120.0, device="cuda")
    call: Callable[..., Tensor] = color_jitter
    on_gpu = call(crops, flips, factors, centers, (0.5,) * 3, (0.5,) * 3)
    on_cpu = call(*(t.cpu() for t in (crops, flips, factors, centers)), (0.5,) * 3, (0.5,) * 3)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-5)


def test_nearest_code_at_full_size() -> None:
    """64 images of BEiT v2's tokenizer: the same cosine as on the CPU, the same code where no other is as near."""
    generator = torch.Generator().manual_seed(0)
    rows, codes = (F.normalize(torch.randn(n, 32, generator=generator)) for n in (64 * 196, 8192))
    ids = linear_argmax(rows.cuda(), codes.cuda(), torch.zeros(8192, device="cuda")).cpu()
    best = (rows.double() @ codes.double().t()).topk(2)
    chosen = (rows.double() * codes[ids].double()).sum(1)
    assert (best.values[:, 0] - chosen).max() <= 1e-6
    clear = best.values[:, 0] - best.values[:, 1] > 1e-6
    assert clear.double().mean() > 0.99
    assert torch.equal(ids[clear], best.indices[clear, 0])
    torch.library.opcheck(torch.ops.beit_fast.linear_argmax, (rows.cuda(), codes.cuda(), codes[:, 0].cuda(), "triton"))
