"""masked_cross_entropy against its definition: loss, accuracy, every gradient, padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels import masked_cross_entropy, use_backend

NAMES = ("hidden", "norm_weight", "norm_bias", "head_weight", "head_bias")
Inputs = dict[str, Tensor]
Check = Callable[[str, Tensor, Tensor, Tensor], None]


def make(T: int, M: int, D: int, V: int, padding: int = 0, device: str = "cpu", seed: int = 0) -> Inputs:
    """fp64 inputs; the last `padding` rows have no target and repeat a row that has one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    rows = torch.randperm(T, generator=generator)[:M]
    targets = torch.randint(0, V, (M,), generator=generator)
    if padding:
        rows[M - padding :] = rows[0]
        targets[M - padding :] = -100
    return {
        "hidden": 3 * draw(T, D) + 1,
        "rows": rows.to(device),
        "targets": targets.to(device),
        "norm_weight": 1 + 0.1 * draw(D),
        "norm_bias": 0.1 * draw(D),
        "head_weight": draw(V, D) / D**0.5,
        "head_bias": 0.1 * draw(V),
    }


def cast(inputs: Inputs, hidden: torch.dtype, head: torch.dtype) -> Inputs:
    """`hidden` of its dtype, the head of its own, the LayerNorm in fp32 (fp64 for fp64)."""
    norm = torch.promote_types(hidden, torch.float32)
    dtypes = {"hidden": hidden, "head_weight": head, "head_bias": head, "norm_weight": norm, "norm_bias": norm}
    return {k: v.to(dtypes[k]) if k in dtypes else v for k, v in inputs.items()}


def run(inputs: Inputs, num_targets: Tensor | None = None) -> dict[str, Tensor]:
    i: Any = {k: v.detach().clone().requires_grad_(k in NAMES) for k, v in inputs.items()}
    loss, correct = masked_cross_entropy(**i, num_targets=num_targets)
    (1.7 * loss).backward()
    return {"loss": loss.detach(), "num_correct": correct} | {f"d {name}": i[name].grad for name in NAMES}


def compare(inputs: Inputs, head: torch.dtype, check: Check) -> None:
    low = cast(inputs, torch.float32, head)
    ours = run(low)
    exact = by_hand(cast(low, torch.float64, torch.float64))
    eager = by_hand(low)
    assert ours.pop("num_correct") == exact.pop("num_correct")
    for name in exact:
        check(name, ours[name].to(eager[name].dtype), eager[name], exact[name])


def by_hand(inputs: Inputs) -> dict[str, Tensor]:
    """As a model in plain torch has it: LayerNorm of all tokens, selection, head, cross entropy."""
    i: Any = {k: v.detach().clone().requires_grad_(k in NAMES) for k, v in inputs.items()}
    wide = torch.promote_types(i["hidden"].dtype, torch.float32)
    normed = F.layer_norm(i["hidden"].to(wide), i["hidden"].shape[-1:], i["norm_weight"], i["norm_bias"], 1e-6)
    logits = F.linear(normed[i["rows"]].to(i["head_weight"].dtype), i["head_weight"], i["head_bias"]).to(wide)
    loss = F.cross_entropy(logits, i["targets"], ignore_index=-100)
    (1.7 * loss).backward()
    correct = ((logits.argmax(-1) == i["targets"]) & (i["targets"] != -100)).sum()
    return {"loss": loss.detach(), "num_correct": correct} | {f"d {name}": i[name].grad for name in NAMES}


@pytest.mark.parametrize("padding", [0, 2])
def test_equals_a_plain_model_in_fp64(padding: int) -> None:
    inputs = make(20, 7, 12, 33, padding)
    expected = by_hand(inputs)
    for name, value in run(inputs).items():
        torch.testing.assert_close(value, expected[name])
    with use_backend("reference"):
        for name, value in run(inputs).items():
            torch.testing.assert_close(value, expected[name])


def test_gradients_in_fp64() -> None:
    i = make(6, 5, 4, 7, padding=2)

    def loss(*learned: Tensor) -> Tensor:
        given = dict(zip(NAMES, learned, strict=True))
        return masked_cross_entropy(**given, rows=i["rows"], targets=i["targets"])[0]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, [i[name].clone().requires_grad_() for name in NAMES])


@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_accuracy_on_cpu(head: torch.dtype, assert_accurate: Check) -> None:
    compare(make(300, 60, 192, 2048, padding=3), head, assert_accurate)


def test_without_gradient_and_global_count() -> None:
    inputs: Any = make(20, 9, 12, 33, padding=1)
    with_gradient = run(inputs)
    with torch.no_grad():
        loss, correct = masked_cross_entropy(**inputs)
        torch.testing.assert_close(loss, with_gradient["loss"])
        assert correct == with_gradient["num_correct"]
        assert correct.dtype == torch.int64
    halved = run(inputs, num_targets=torch.tensor(16))  # 8 targets here
    for name in ("loss", "d hidden", "d head_weight"):
        torch.testing.assert_close(2 * halved[name], with_gradient[name])


def test_extreme_logits_stay_finite() -> None:
    """A target that softmax gives no probability at all in fp32."""
    inputs = cast(make(8, 4, 8, 5), torch.float32, torch.float32)
    inputs["head_bias"] = torch.tensor([300.0, -300.0, 0.0, 0.0, 0.0])
    inputs["targets"] = torch.tensor([1, 0, 1, 1])
    ours, exact = run(inputs), by_hand(cast(inputs, torch.float64, torch.float64))
    torch.testing.assert_close(ours["loss"].double(), exact["loss"])
    assert all(torch.isfinite(value).all() for value in ours.values())


def test_autocast_runs_the_head_in_bfloat16() -> None:
    inputs = cast(make(64, 16, 32, 40), torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = run(inputs)
    high = run(inputs)
    assert low["loss"].dtype == low["d head_weight"].dtype == torch.float32
    torch.testing.assert_close(low["loss"], high["loss"], rtol=1e-2, atol=0)
    assert not torch.equal(low["loss"], high["loss"])


def test_no_target_at_all() -> None:
    inputs: Any = make(8, 3, 4, 5, padding=3)
    found = run(inputs, num_targets=torch.tensor(1))
    assert found["loss"] == 0
    assert found["num_correct"] == 0
    assert all(not found[f"d {name}"].any() for name in NAMES)


def test_dispatch() -> None:
    i = {k: v.requires_grad_(k in NAMES) for k, v in cast(make(9, 4, 8, 11, 1), *[torch.float32] * 2).items()}
    rest, light = (1e-6, torch.tensor(3), torch.float32), ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.beit_fast.masked_cross_entropy, (*i.values(), *rest, True, "cpu"))
    given = [v.detach() for v in i.values()]
    arguments = (*given, *rest, False, "cpu")
    torch.library.opcheck(torch.ops.beit_fast.masked_cross_entropy, arguments, test_utils=light)


def test_compiles_without_a_break() -> None:
    inputs = make(12, 5, 8, 11, padding=1)
    i: Any = {k: v.detach().clone().requires_grad_(k in NAMES) for k, v in inputs.items()}
    compiled = torch.compile(masked_cross_entropy, fullgraph=True, backend="aot_eager")
    loss, correct = compiled(**i)
    (1.7 * loss).backward()
    expected = by_hand(inputs)
    torch.testing.assert_close(loss.detach(), expected["loss"])
    assert correct == expected["num_correct"]
    for name in NAMES:
        torch.testing.assert_close(i[name].grad, expected[f"d {name}"])


def test_wrong_arguments_are_named() -> None:
    i: Any = make(8, 4, 4, 5)
    with pytest.raises(ValueError, match="hidden must be"):
        masked_cross_entropy(**i | {"targets": i["targets"][:2]})
    with pytest.raises(ValueError, match="head_weight"):
        masked_cross_entropy(**i | {"head_weight": i["head_weight"][:, :2]})
    twice = i | {"rows": torch.tensor([1, 1, 2, 3])}
    with pytest.raises(ValueError, match="occurs twice"):
        run(twice)


@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_triton(triton_device: str, head: torch.dtype, assert_accurate: Check) -> None:
    inputs = make(16, 7, 48, 40, padding=2, device=triton_device)
    compare(inputs, head, assert_accurate)
    first, second = (run(cast(inputs, torch.float32, head)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_triton_reads_nothing_unwritten(triton_device: str, dirty_memory: None, assert_accurate: Check) -> None:
    inputs = make(16, 7, 24, 40, padding=2, device=triton_device)
    compare(inputs, torch.float32, assert_accurate)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_triton_cross_entropy(triton_device: str, with_gradient: bool, assert_accurate: Check) -> None:
    """In place, in registers and by loop, with ties, far-off logits and a missing target."""
    from beit_fast.kernels.launch_table import SHIPPED
    from beit_fast.kernels.mim_loss.kernel import cross_entropy_

    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(5, 200, generator=generator)
    logits[2, [50, 150]] = 99.0
    targets = torch.tensor([3, 199, 50, -100, int(logits[4].argmax())])
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, targets, ignore_index=-100, reduction="sum").backward()
    losses = F.cross_entropy(exact, targets, ignore_index=-100, reduction="none").detach()
    expected_hits = [0, 0, 1, 0, 1]
    expected_hits[1] = int(logits[1].argmax() == 199)
    row = SHIPPED["default"]["cross_entropy"]
    for block in (256, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("beit_fast.kernels.mim_loss.kernel.launch_config", lambda *_, b=block: {**row, "BLOCK": b})
            given = logits.clone().to(triton_device)
            loss, hits = cross_entropy_(given, targets.to(triton_device), with_gradient)
        assert_accurate("loss", loss, losses.float(), losses)
        assert hits.tolist() == expected_hits
        if with_gradient:
            assert_accurate("gradient", given, exact.grad.float(), exact.grad)  # type: ignore[union-attr, arg-type]
        else:
            assert torch.equal(given.cpu(), logits)


@pytest.mark.parametrize(("D", "V"), [pytest.param(768, 8192, marks=pytest.mark.slow, id="BEiT-B")])
def test_triton_model_size(triton_device: str, D: int, V: int, assert_accurate: Check) -> None:
    inputs = make(40, 12, D, V, padding=2, device=triton_device)
    compare(inputs, torch.bfloat16, assert_accurate)
