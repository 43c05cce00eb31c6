"""residual_add and residual_layer_norm against their definition, in fp64 and in the dtypes they run in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels import residual_add, residual_layer_norm, use_backend
from beit_fast.kernels.residual_norm import op

NAMES = ("x", "branch", "gamma", "drop_path", "weight", "bias", "branch_bias")
Inputs = dict[str, Tensor | None]
Check = Callable[[str, Tensor, Tensor, Tensor], None]
presets = pytest.mark.parametrize(
    ("gamma", "drop", "branch_bias"),
    [(True, True, True), (True, False, False), (False, True, True), (False, False, True), (False, False, False)],
    ids=["plus drop bias", "plus", "plain drop bias", "plain bias", "plain"],
)


def make(
    B: int, N: int, D: int, gamma: bool, drop: bool, branch_bias: bool, device: str = "cpu", seed: int = 0
) -> Inputs:
    """fp64 inputs; every third sample is dropped."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    factors = torch.tensor([0.0 if b % 3 == 1 else 1.25 for b in range(B)], dtype=torch.float64, device=device)
    return {
        "x": 2 * draw(B, N, D) + 0.5,
        "branch": draw(B, N, D),
        "gamma": draw(D) if gamma else None,
        "drop_path": factors if drop else None,
        "weight": draw(D),
        "bias": draw(D),
        "branch_bias": draw(D) if branch_bias else None,
    }


def cast(inputs: Inputs, stream: torch.dtype, branch: torch.dtype, parameters: torch.dtype) -> Inputs:
    dtypes = {"x": stream, "branch": branch}
    return {k: v if v is None or k == "kept" else v.to(dtypes.get(k, parameters)) for k, v in inputs.items()}


def leaves(inputs: Inputs) -> Inputs:
    return {
        k: v.detach().clone().requires_grad_(k not in ("drop_path", "kept")) if v is not None else None
        for k, v in inputs.items()
    }


def run(inputs: Inputs, eps: float = 1e-6, norm: bool = True) -> dict[str, Tensor]:
    """Both outputs and every gradient, for fixed upstream gradients."""
    i: Any = leaves(inputs)
    if norm:
        outputs = residual_layer_norm(
            i["x"], i["branch"], i["gamma"], i["drop_path"], i["weight"], i["bias"], eps, i["branch_bias"],
            i.get("kept"),
        )  # fmt: skip
    else:
        outputs = (residual_add(i["x"], i["branch"], i["gamma"], i["drop_path"], i["branch_bias"], i.get("kept")),)
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    torch.autograd.backward(outputs, upstream)
    found = {name: o.detach() for name, o in zip(("sum", "normed"), outputs, strict=False)}
    return found | {f"d {k}": v.grad for k, v in i.items() if v is not None and v.grad is not None}


def compare(inputs: Inputs, stream: torch.dtype, branch: torch.dtype, check: Check, norm: bool = True) -> None:
    low = cast(inputs, stream, branch, torch.float32)
    exact_inputs = cast(low, torch.float64, torch.float64, torch.float64)
    ours = run(low, norm=norm)
    with use_backend("reference"):
        eager, exact = run(low, norm=norm), run(exact_inputs, norm=norm)
    assert ours.keys() == exact.keys()
    for name in exact:
        check(name, ours[name], eager[name], exact[name])


@presets
def test_gradients_in_fp64(gamma: bool, drop: bool, branch_bias: bool) -> None:
    i: Any = leaves(make(3, 4, 6, gamma, drop, branch_bias))

    def norm(x: Tensor, branch: Tensor, gamma: Any, weight: Tensor, bias: Tensor, branch_bias: Any) -> Any:
        return residual_layer_norm(x, branch, gamma, i["drop_path"], weight, bias, 1e-6, branch_bias)

    def add(x: Tensor, branch: Tensor, gamma: Any, branch_bias: Any) -> Tensor:
        return residual_add(x, branch, gamma, i["drop_path"], branch_bias)

    assert torch.autograd.gradcheck(norm, [i[k] for k in ("x", "branch", "gamma", "weight", "bias", "branch_bias")])
    assert torch.autograd.gradcheck(add, [i[k] for k in ("x", "branch", "gamma", "branch_bias")])


def test_against_torch_layer_norm() -> None:
    """The definition itself, by torch's own functions, on an odd batch and a width of the model."""
    i: Any = make(3, 17, 768, True, True, True)
    total, normed = residual_layer_norm(
        i["x"], i["branch"], i["gamma"], i["drop_path"], i["weight"], i["bias"], 1e-6, i["branch_bias"]
    )
    expected = i["x"].clone()
    for b in range(3):
        expected[b] += i["drop_path"][b] * i["gamma"] * (i["branch"][b] + i["branch_bias"])
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(normed, F.layer_norm(expected, (768,), i["weight"], i["bias"], 1e-6))
    assert torch.equal(total, residual_add(i["x"], i["branch"], i["gamma"], i["drop_path"], i["branch_bias"]))


@presets
@pytest.mark.parametrize(
    ("stream", "branch"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "mixed", "bf16"],
)
def test_accuracy_on_cpu(
    gamma: bool, drop: bool, branch_bias: bool, stream: torch.dtype, branch: torch.dtype, assert_accurate: Check
) -> None:
    inputs = make(4, 50, 192, gamma, drop, branch_bias)
    compare(inputs, stream, branch, assert_accurate)
    compare(inputs, stream, branch, assert_accurate, norm=False)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dispatch(stream: torch.dtype) -> None:
    i: Any = leaves(cast(make(2, 3, 8, True, True, True), stream, stream, torch.float32))
    norm = (i["x"], i["branch"], i["gamma"], i["drop_path"], i["weight"], i["bias"], 1e-6, i["branch_bias"])
    torch.library.opcheck(torch.ops.beit_fast.residual_norm, (*norm, None, "cpu"))
    kept = (norm[0], norm[1].detach()[:1].requires_grad_(), *norm[2:], torch.tensor([0]))
    torch.library.opcheck(torch.ops.beit_fast.residual_norm, (*kept, "cpu"))
    torch.library.opcheck(torch.ops.beit_fast.residual_norm, (*norm[:2], None, None, *norm[4:7], None, None, "cpu"))
    torch.library.opcheck(torch.ops.beit_fast.residual_norm, (*norm[:4], None, None, 0.0, norm[7], None, "cpu"))


@presets
def test_compiles_without_a_break(gamma: bool, drop: bool, branch_bias: bool) -> None:
    def two(x: Tensor, branch: Tensor, gamma: Any, factors: Any, weight: Tensor, bias: Tensor, extra: Any) -> Tensor:
        total, normed = residual_layer_norm(x, branch, gamma, factors, weight, bias, 1e-6, extra)
        return residual_add(total, normed, gamma, factors, extra)

    inputs = make(3, 5, 8, gamma, drop, branch_bias)
    results = []
    for function in (two, torch.compile(two, fullgraph=True, backend="aot_eager")):
        i: Any = leaves(inputs)
        out = function(*(i[name] for name in NAMES))
        out.square().sum().backward()
        results.append([out, *(v.grad for v in i.values() if v is not None)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled)


def test_frozen_inputs_and_unused_outputs() -> None:
    inputs: Any = make(2, 3, 8, True, True, True)
    args = (inputs["gamma"], inputs["drop_path"], inputs["weight"], inputs["bias"], 1e-6, inputs["branch_bias"])
    x = inputs["x"].clone().requires_grad_()
    residual_layer_norm(x, inputs["branch"], *args)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    branch = inputs["branch"].clone().requires_grad_()
    residual_layer_norm(inputs["x"], branch, *args)[1].sum().backward()
    assert branch.grad is not None
    with torch.no_grad():
        assert residual_layer_norm(x, branch, *args)[1].grad_fn is None


def test_non_contiguous_and_empty() -> None:
    inputs = make(4, 6, 8, True, True, True)
    turned = dict(inputs)
    for name in ("x", "branch"):
        turned[name] = inputs[name].transpose(0, 1).contiguous().transpose(0, 1)  # type: ignore[union-attr]
    for name, value in run(inputs).items():
        torch.testing.assert_close(run(turned)[name], value)
    found = run(make(0, 6, 8, True, True, True))
    assert found["normed"].shape == (0, 6, 8)
    assert torch.equal(found["d gamma"], torch.zeros(8, dtype=torch.float64))


def test_a_dropped_sample_is_left_alone() -> None:
    inputs = cast(make(3, 5, 16, True, True, True), *[torch.float32] * 3)
    found = run(inputs)
    assert torch.equal(found["sum"][1], inputs["x"][1])  # type: ignore[index]
    assert torch.equal(found["d branch"][1], torch.zeros(5, 16))


def drop_rows(inputs: Inputs, kept: list[int]) -> tuple[Inputs, Inputs]:
    """The inputs with the branch zero and dropped outside of `kept`, and with the branch of `kept` alone."""
    x, branch, whole, few = inputs["x"], inputs["branch"], dict(inputs), dict(inputs)
    assert x is not None
    assert branch is not None
    index = torch.tensor(kept, dtype=torch.int64, device=x.device)
    few["branch"] = branch[index]
    whole["branch"] = torch.zeros_like(branch).index_copy(0, index, branch[index])
    factors = x.new_zeros(len(x)).index_fill(0, index, 1.25)
    whole["drop_path"], few["drop_path"], few["kept"] = factors, factors, index
    return whole, few


@pytest.mark.parametrize("kept", [[], [0], [4], [1, 2], [0, 2, 4], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["add", "norm"])
@pytest.mark.parametrize("gamma", [False, True], ids=["plain", "plus"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_left_out_samples(kept: list[int], norm: bool, gamma: bool, backend: str) -> None:
    """A branch of some samples gives what it gives with zeros for the others, by the definition."""
    whole, few = drop_rows(make(5, 7, 16, gamma, True, True), kept)
    with use_backend("reference"):
        expected = run(whole, norm=norm)
    with use_backend(backend):
        found = run(few, norm=norm)
    assert found.keys() == expected.keys()
    expected["d branch"] = expected["d branch"][torch.tensor(kept, dtype=torch.int64)]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", [[], [0], [4], [1, 2], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["add", "norm"])
@pytest.mark.parametrize("gamma", [False, True], ids=["plain", "plus"])
def test_left_out_samples_in_the_compiled_kernel(
    kept: list[int], norm: bool, gamma: bool, dirty_memory: None, assert_accurate: Check
) -> None:
    """Widths that are no whole vectors, pieces of rows that end within a sample."""
    whole, few = drop_rows(cast(make(5, 61, 137, gamma, True, True), *[torch.float32] * 3), kept)
    with use_backend("reference"):
        eager, exact = (run(cast(whole, *[dtype] * 3), norm=norm) for dtype in (torch.float32, torch.float64))
    found = run(few, norm=norm)
    assert found.keys() == exact.keys()
    for of in (eager, exact):
        of["d branch"] = of["d branch"][torch.tensor(kept, dtype=torch.int64)]
    for name, value in found.items():
        assert_accurate(name, value, eager[name], exact[name])


@pytest.mark.usefixtures("compiled_kernels")
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, before = cast(make(3, 97, 140, True, True, True), *[torch.float32] * 3), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


def test_sums_do_not_lose_digits_over_many_rows(assert_accurate: Check) -> None:
    inputs = cast(make(6, 1500, 144, True, True, True), *[torch.float32] * 3)
    with use_backend("reference"):
        eager, exact = (run(cast(inputs, *[dtype] * 3)) for dtype in (torch.float32, torch.float64))
    for name, value in run(inputs).items():
        assert_accurate(name, value, eager[name], exact[name])


def test_twice_the_same_bits() -> None:
    inputs = cast(make(3, 33, 96, True, True, True), *[torch.float32] * 3)
    first, second = run(inputs), run(inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_wrong_shapes_are_named() -> None:
    i: Any = make(2, 3, 8, True, True, True)
    with pytest.raises(ValueError, match="x and branch"):
        residual_add(i["x"], i["branch"][:1], None, None)
    with pytest.raises(ValueError, match="drop_path"):
        residual_add(i["x"], i["branch"], None, i["gamma"])
    with pytest.raises(ValueError, match="gamma"):
        residual_layer_norm(i["x"], i["branch"], i["gamma"][:1], None, i["weight"], i["bias"])
    kept = torch.tensor([1])
    with pytest.raises(ValueError, match="where kept is"):
        residual_add(i["x"], i["branch"], None, i["drop_path"], None, kept)
    for wrong in ([1, 0], [0, 0], [0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="ascending indices of the 2 samples, got"):
            residual_add(i["x"], i["branch"], None, i["drop_path"], None, torch.tensor(wrong))
    with pytest.raises(ValueError, match="pass drop_path, too"):
        residual_add(i["x"], i["branch"][:1], None, None, None, kept)


@presets
def test_triton(triton_device: str, gamma: bool, drop: bool, branch_bias: bool, assert_accurate: Check) -> None:
    inputs = make(3, 2, 48, gamma, drop, branch_bias, triton_device)
    compare(inputs, torch.float32, torch.bfloat16, assert_accurate)
    compare(inputs, torch.float32, torch.float32, assert_accurate, norm=False)
    compare(inputs, torch.bfloat16, torch.bfloat16, assert_accurate, norm=False)
    if drop:
        whole, few = (cast(i, *[torch.float32] * 3) for i in drop_rows(inputs, [0, 2]))
        assert torch.equal(run(whole)["sum"], run(few)["sum"])


@pytest.mark.parametrize("D", [768, *(pytest.param(D, marks=pytest.mark.slow) for D in (1024, 1280))])
def test_triton_model_widths(triton_device: str, D: int, assert_accurate: Check) -> None:
    inputs = make(2, 3, D, True, True, True, triton_device)
    compare(inputs, torch.float32, torch.bfloat16, assert_accurate)
    first, second = (run(cast(inputs, torch.float32, torch.bfloat16, torch.float32)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_triton_reads_nothing_unwritten(triton_device: str, dirty_memory: None, assert_accurate: Check) -> None:
    inputs = make(2, 3, 24, True, True, True, triton_device)
    compare(inputs, torch.float32, torch.bfloat16, assert_accurate)
    compare(inputs, torch.float32, torch.bfloat16, assert_accurate, norm=False)


def test_triton_with_frozen_parameters(triton_device: str) -> None:
    inputs = cast(make(2, 3, 24, True, True, True, triton_device), *[torch.float32] * 3)
    expected = run(inputs)
    for learned in ("x", "gamma", "bias"):
        i: Any = dict(inputs) | {learned: inputs[learned].clone().requires_grad_()}  # type: ignore[union-attr]
        args = (i["gamma"], i["drop_path"], i["weight"], i["bias"], 1e-6, i["branch_bias"])
        outputs = residual_layer_norm(i["x"], i["branch"], *args)
        generator = torch.Generator().manual_seed(7)
        probes = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
        wanted = [(o, p) for o, p in zip(outputs, probes, strict=True) if o.requires_grad]
        torch.autograd.backward([o for o, _ in wanted], [p for _, p in wanted])
        torch.testing.assert_close(i[learned].grad, expected[f"d {learned}"])


def test_eager_calls_go_around_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs 0.1 ms a call, in the backward pass as well, whichever gradients there are."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the dispatcher was called")

    for op_ in (op._residual_norm, op._residual_norm_backward):
        monkeypatch.setattr(op_, "_registered", refuse)
    inputs = make(2, 3, 8, True, True, True)
    run(inputs)
    run(inputs, norm=False)
    i: Any = leaves(inputs)
    args = (i["gamma"], i["drop_path"], i["weight"], i["bias"], 1e-6, i["branch_bias"])
    residual_layer_norm(i["x"], i["branch"], *args)[1].sum().backward()  # the sum itself has no gradient
    residual_layer_norm(i["x"], i["branch"], *args)[0].sum().backward()
