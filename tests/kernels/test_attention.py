"""Attention with a bias on CPU, against its definition in fp64: results, gradients, contracts with autograd."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from beit_fast.kernels import biased_attention, packed_attention, prepare_bias, use_backend
from beit_fast.kernels.attention import cpu, reference
from beit_fast.kernels.launch_table import trial

Check = Callable[[str, Tensor, Tensor, Tensor], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs_of(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float64, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, N, 3, H, K), bias (H, N, N) in at least fp32, gradient of the output."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator, dtype=torch.float64)
    bias = torch.randn(heads, tokens, tokens, generator=generator, dtype=torch.float64) * spread
    grad = torch.randn(batch, tokens, heads, head_dim, generator=generator, dtype=torch.float64)
    return qkv.to(dtype), bias.to(torch.promote_types(dtype, torch.float32)), grad.to(dtype)


def run(attention: Callable[..., Tensor], qkv: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of qkv and bias."""
    qkv = qkv.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    out = attention(qkv, bias)
    wanted = [qkv] if bias is None else [qkv, bias]
    return [out, *torch.autograd.grad(out, wanted, grad)]


def by_definition(qkv: Tensor, bias: Tensor | None, scale: float | None = None) -> Tensor:
    return reference.biased_attention(*qkv.unbind(2), bias, qkv.shape[-1] ** -0.5 if scale is None else scale)


def eager(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """What a model does without us, every step in the inputs' dtype."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def compare(check: Check, qkv: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    ours = run(packed_attention, qkv, bias, grad)
    usual = run(eager, qkv, bias, grad)
    exact = run(by_definition, qkv.double(), None if bias is None else bias.double(), grad.double())
    for name, *three in zip(("out", "qkv", "bias"), ours, usual, exact, strict=False):
        check(name, *(x.detach() for x in three))
    return ours


@pytest.fixture
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few bytes to keep the probabilities of anything, or the scores of more than two heads of 17 tokens."""
    monkeypatch.setattr(cpu, "KEEP_BYTES", 0)
    monkeypatch.setattr(cpu, "_SCRATCH_BYTES", 2 * 17 * 17 * 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 5, 17, 50, 65, 101])
def test_accuracy(tokens: int, dtype: torch.dtype, assert_accurate: Check) -> None:
    compare(assert_accurate, *inputs_of(3, tokens, 3, 64, dtype))


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_how_many_samples_share_the_cache_changes_nothing(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time, the last alone; one at a time; all at once."""
    monkeypatch.setattr(cpu, "KEEP_BYTES", kept)
    inputs = inputs_of(5, 17, 3, 64, torch.float32)
    found = []
    for samples in (2, 1, 5):
        monkeypatch.setattr(cpu, "_CACHED_BYTES", samples * 3 * 17 * 17 * 4)
        found.append(run(packed_attention, *inputs))
    for one, two, five in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(five, one, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("compiled_kernels")
def test_the_bias_gradient_is_summed_over_more_samples_than_a_group(dirty_memory: None, assert_accurate: Check) -> None:
    """Nineteen: two groups of eight and a part, a few samples at once."""
    inputs = inputs_of(19, 50, 3, 16, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compare(assert_accurate, *inputs)[2])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_positions_that_a_bias_hides() -> None:
    """Where the bias is minus infinity, the weight is exactly 0, whatever the value there; NaN comes through."""
    qkv, bias, grad = inputs_of(3, 61, 4, 16, torch.float32)
    bias[:, :, 7] = float("-inf")
    qkv[:, 7, 2] = 1e30
    out, d_qkv, _ = run(packed_attention, qkv, bias, grad)
    exact = run(by_definition, qkv.double(), bias.double(), grad.double())
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d_qkv.double()[:, :, :2], exact[1][:, :, :2], rtol=1e-4, atol=1e-5)
    qkv[1, 3, 0] = float("nan")
    out = run(packed_attention, qkv, bias, grad)[0]
    assert out[1, 3].isnan().all()
    assert out[0].isfinite().all()


@pytest.mark.parametrize("tokens", [197, 257, 577, 1025])
def test_accuracy_at_image_sizes(tokens: int, assert_accurate: Check) -> None:
    compare(assert_accurate, *inputs_of(2, tokens, 2, 64, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_a_large_bias(dtype: torch.dtype, assert_accurate: Check) -> None:
    qkv, bias, grad = inputs_of(2, 50, 2, 64, dtype)
    compare(assert_accurate, qkv, bias.sign() * 30, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_accuracy_without_kept_probabilities(
    with_bias: bool, dtype: torch.dtype, few_bytes: None, assert_accurate: Check
) -> None:
    """Long sequences keep log-sum-exp only, and take heads a few at a time; a frozen bias takes torch's gradient."""
    qkv, bias, grad = inputs_of(2, 17, 5, 32, dtype)
    assert not cpu.keeps_probabilities(qkv[:, :, 0], learned=True)
    compare(assert_accurate, qkv, bias if with_bias else None, grad)
    if with_bias:
        compare_frozen(assert_accurate, qkv, bias, grad)


def compare_frozen(check: Check, qkv: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor) -> None:
    ours, usual, exact = (
        run(lambda x, _, attend=attend: attend(x, bias.to(x.dtype)), x, None, grad.to(x.dtype))
        for attend, x in ((packed_attention, qkv), (eager, qkv), (by_definition, qkv.double()))
    )
    for name, *three in zip(("out", "qkv"), ours, usual, exact, strict=True):
        check(name, *three)


@pytest.mark.parametrize("head_dim", [1, 32, 80, 96, 128])
def test_head_dims_and_scale(head_dim: int) -> None:
    qkv, bias, grad = inputs_of(1, 9, 2, head_dim)
    for scale in (None, 0.3):
        ours = run(lambda x, b: packed_attention(x, b, scale), qkv, bias, grad)  # noqa: B023
        exact = run(lambda x, b: by_definition(x, b, scale), qkv, bias, grad)  # noqa: B023
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_inference_keeps_nothing(with_bias: bool, dtype: torch.dtype, assert_accurate: Check) -> None:
    qkv, bias, _ = inputs_of(3, 50, 2, 64, dtype)
    given = bias if with_bias else None
    out = packed_attention(qkv, given)
    assert out.is_contiguous()
    assert out.grad_fn is None
    exact = by_definition(qkv.double(), None if given is None else given.double())
    assert_accurate("out", out, eager(qkv, given), exact)
    qkv.requires_grad_()
    with torch.no_grad():
        assert torch.equal(packed_attention(qkv, given), out)
    with torch.inference_mode():
        assert torch.equal(packed_attention(qkv, given), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_and_gradients(dtype: torch.dtype, assert_accurate: Check) -> None:
    """Slices, transposes and expanded gradients are as accurate as contiguous tensors.

    They need not give the same bits: the BLAS may have another kernel for another layout.
    """
    qkv, bias, grad = inputs_of(3, 11, 4, 16, dtype)
    wide = torch.zeros(6, 11, 3, 4, 32, dtype=dtype)
    wide[::2, ..., 8:24] = qkv
    sliced = wide[::2, ..., 8:24]
    by_heads = qkv.permute(3, 1, 2, 4, 0).contiguous().permute(4, 1, 2, 0, 3)
    by_tokens = grad.transpose(1, 3).contiguous().transpose(1, 3)
    for strided in (qkv, sliced, by_heads):
        for gradient in (grad, by_tokens, grad.new_ones(1).expand_as(grad)):
            compare(assert_accurate, strided, bias, gradient)


def test_three_tensors_equal_the_packed_one() -> None:
    qkv, bias, grad = inputs_of(3, 11, 4, 16, torch.float32)
    packed = run(packed_attention, qkv, bias, grad)
    separate = run(lambda x, b: biased_attention(*(t.clone() for t in x.unbind(2)), b), qkv, bias, grad)
    views = run(lambda x, b: biased_attention(*x.unbind(2), b), qkv, bias, grad)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(packed, separate, views, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_bias(dtype: torch.dtype, assert_accurate: Check) -> None:
    """A bias without requires_grad gets none, which leaves the rest as accurate, and the same at a second run."""
    qkv, bias, grad = inputs_of(2, 17, 3, 32, dtype)
    compare_frozen(assert_accurate, qkv, bias, grad)
    full = run(packed_attention, qkv, bias, grad)
    first, second = (run(lambda x, _: packed_attention(x, bias), qkv, None, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    table = bias.detach().requires_grad_()
    out = packed_attention(qkv, table)  # and the other way round: only the bias learns
    assert torch.equal(torch.autograd.grad(out, table, grad)[0], full[2])


def test_bias_gradient_properties() -> None:
    """Rows of the bias gradient sum to zero, gradients of parts of a batch add up, two runs agree bit for bit."""
    qkv, bias, grad = inputs_of(5, 50, 3, 32, torch.float32)
    whole = run(packed_attention, qkv, bias, grad)
    assert whole[2].sum(-1).abs().max() < 1e-5 * whole[2].abs().max() * 50
    again = run(packed_attention, qkv.clone(), bias.clone(), grad.clone())
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    parts = [run(packed_attention, qkv[s], bias, grad[s])[2] for s in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(parts[0] + parts[1], whole[2], rtol=1e-5, atol=1e-5)
    shifted = run(packed_attention, qkv, bias + torch.randn(3, 50, 1), grad)
    for name, a, b in zip(("out", "qkv", "bias"), whole, shifted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("keep", [True, False])
def test_uninitialised_memory_is_never_read(
    keep: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not keep:
        request.getfixturevalue("few_bytes")
    inputs = inputs_of(2, 17, 3, 32, torch.float32)
    clean = run(packed_attention, *inputs)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # which fills every new tensor with NaN
    try:
        assert torch.empty(3).isnan().all()
        poisoned = run(packed_attention, *inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


def test_gradcheck() -> None:
    qkv, bias, _ = inputs_of(2, 5, 2, 3)
    qkv.requires_grad_()
    bias.requires_grad_()
    assert torch.autograd.gradcheck(packed_attention, (qkv, bias))
    assert torch.autograd.gradcheck(lambda x: packed_attention(x, scale=0.7), (qkv,))
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv.unbind(2))
    assert torch.autograd.gradcheck(biased_attention, (q, k, v, bias))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(packed_attention(qkv, bias).square().sum(), bias, create_graph=True)


def check_ops(dtype: torch.dtype, bias_only: bool) -> None:
    qkv, bias, grad = inputs_of(2, 5, 2, 4, dtype)
    q, k, v = qkv.unbind(2)
    ops = torch.ops.beit_fast
    learned = bias.detach().requires_grad_()
    packed = (qkv.requires_grad_(), None, None)
    torch.library.opcheck(ops.attention.default, (*packed, learned, None, None, 0.5, True, True, "cpu"))
    if bias_only:
        return
    torch.library.opcheck(ops.attention.default, (*packed, None, None, None, 0.5, True, False, "cpu"))
    torch.library.opcheck(ops.attention.default, (*packed, bias, None, None, 0.5, True, False, "cpu"))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.attention.default, (*leaves, learned, None, None, 0.5, True, True, "cpu"))
    constants = [x.detach() for x in (q, k, v, bias)]
    torch.library.opcheck(ops.attention.default, (*constants, None, None, 0.5, False, False, "cpu"))
    for need_bias in (True, False):
        out, saved = (x.detach() for x in ops.attention(*packed, bias, None, None, 0.5, True, need_bias, "cpu"))
        arguments = (grad, *constants, None, None, out, saved, 0.5, need_bias, "cpu")
        torch.library.opcheck(ops.attention_backward.default, arguments)
        packed_arguments = (grad, qkv.detach(), None, None, bias, None, None, out, saved, 0.5, need_bias, "cpu")
        torch.library.opcheck(ops.attention_backward.default, packed_arguments)


def test_opcheck() -> None:
    check_ops(torch.float32, bias_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_every_op(dtype: torch.dtype) -> None:
    check_ops(dtype, bias_only=False)


def test_compiled_as_one_graph() -> None:
    qkv, bias, grad = inputs_of(2, 17, 2, 8, torch.float32)

    def attend(x: Tensor, b: Tensor) -> Tensor:
        return packed_attention(x.sin(), prepare_bias(b.cos(), x.dtype)).exp()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, qkv, bias, grad), run(attend, qkv, bias, grad))
    with torch.no_grad():
        torch.testing.assert_close(compiled(qkv, bias), attend(qkv, bias))


def test_reference_backend_is_the_definition() -> None:
    qkv, bias, grad = inputs_of(2, 9, 2, 8)
    with use_backend("reference"):
        forced = run(packed_attention, qkv, bias, grad)
    assert all(torch.equal(a, b) for a, b in zip(forced, run(by_definition, qkv, bias, grad), strict=True))


def test_bad_input_is_named() -> None:
    qkv, bias = torch.zeros(2, 5, 3, 2, 8), torch.zeros(2, 5, 5)
    with pytest.raises(ValueError, match=r"qkv must be floating \(B, N, 3, H, K\)"):
        packed_attention(qkv[:, :, :2], bias)
    with pytest.raises(ValueError, match=r"bias must be floating \(H, N, N\) = \(2, 5, 5\), got .*\(3, 5, 5\)"):
        packed_attention(qkv, torch.zeros(3, 5, 5))
    with pytest.raises(ValueError, match="bias is on meta but the queries are on cpu"):
        packed_attention(qkv, bias.to("meta"))
    q, k, v = qkv.unbind(2)
    with pytest.raises(ValueError, match="of one shape"):
        biased_attention(q[:1], k, v, bias)
    with pytest.raises(ValueError, match="one dtype and one device"):
        biased_attention(q.half(), k, v, bias)
    with pytest.raises(ValueError, match=r"\(H, N, N\)"):
        prepare_bias(torch.zeros(2, 5, 6), torch.float32)


def on(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(device) for t in tensors]


CASES = [  # tokens, batch, heads, head dim, dtype, with bias: every kind of tail, and none
    (2, 2, 1, 64, torch.bfloat16, True),
    (17, 3, 2, 32, torch.bfloat16, True),
    (50, 1, 2, 80, torch.float16, True),
    (64, 1, 1, 96, torch.bfloat16, False),
    (65, 2, 2, 64, torch.float16, True),
    (81, 1, 1, 128, torch.bfloat16, True),
    (101, 1, 1, 64, torch.float32, True),
    (65, 1, 2, 64, torch.bfloat16, False),
    (197, 1, 1, 64, torch.bfloat16, True),
]
SLOW_CASES = [
    (257, 3, 2, 64, torch.bfloat16, True),
    (577, 1, 1, 64, torch.float16, True),
    (1601, 1, 1, 64, torch.bfloat16, True),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW_CASES)], ids=str)
def test_kernels(
    case: tuple[int, int, int, int, torch.dtype, bool], triton_device: str, assert_accurate: Check
) -> None:
    tokens, batch, heads, head_dim, dtype, with_bias = case
    qkv, bias, grad = on(triton_device, *inputs_of(batch, tokens, heads, head_dim, dtype))
    ours = compare(assert_accurate, qkv, bias if with_bias else None, grad)
    with torch.no_grad():
        assert torch.equal(packed_attention(qkv, bias if with_bias else None), ours[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_with_a_large_bias(dtype: torch.dtype, triton_device: str, assert_accurate: Check) -> None:
    qkv, bias, grad = on(triton_device, *inputs_of(1, 65, 2, 64, dtype))
    compare(assert_accurate, qkv, bias.sign() * 30, grad)


def test_kernels_sum_the_bias_gradient_in_order(
    triton_device: str, monkeypatch: pytest.MonkeyPatch, assert_accurate: Check
) -> None:
    """Accurate, repeatable, with zero row sums, additive bit for bit, and the same wherever the batch is cut."""
    from beit_fast.kernels.attention import backward

    qkv, bias, grad = on(triton_device, *inputs_of(3, 66, 1, 16, torch.bfloat16))
    found = []
    for chunk in (2, 1, 3):
        monkeypatch.setattr(backward, "samples_per_chunk", lambda *_, chunk=chunk: chunk)
        whole = compare(assert_accurate, qkv, bias, grad)
        again = run(packed_attention, qkv, bias, grad)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
        assert whole[2].sum(-1).abs().max() < 2e-2 * whole[2].abs().max()
        parts = [run(packed_attention, qkv[s], bias, grad[s])[2] for s in (slice(0, 2), slice(2, 3))]
        assert torch.equal(parts[0] + parts[1], whole[2])
        found.append(whole)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_scratch_is_bounded_by_memory_alone() -> None:
    """At most 512 MB, unless one sample takes more; the whole batch of BEiT-B at once."""
    backward = pytest.importorskip("beit_fast.kernels.attention.backward")
    for tokens in (2, 65, 197, 257, 577, 785, 1025, 1601, 4097):
        for heads in (1, 3, 12, 16, 24):
            one = heads * tokens * backward.padded_width(tokens) * 2
            samples = backward.samples_per_chunk(256, one)
            assert samples >= 1
            assert samples == 1 or samples * one <= 512 * 2**20
    assert backward.samples_per_chunk(256, 12 * 197 * 208 * 2) == 256
    assert backward.samples_per_chunk(8, 12 * 197 * 208 * 2) == 8


ONE_PASS_CASES = [  # tokens, batch, heads, head dim, dtype, with bias, keys, queries
    (17, 3, 2, 32, torch.bfloat16, True, 64, 32),
    (33, 2, 2, 64, torch.float16, False, 64, 32),
    (50, 2, 1, 48, torch.float32, True, 64, 32),
    (101, 1, 2, 64, torch.bfloat16, True, 128, 64),
    (197, 1, 1, 64, torch.bfloat16, True, 64, 32),
]


@pytest.fixture
def one_pass() -> Iterator[Callable[[int, int, int], None]]:
    """Calling it with (tokens, keys, queries) gives the one-pass kernels launch rows for so many tokens."""
    with ExitStack() as stack:

        def use(tokens: int, keys: int, queries: int) -> None:
            row = {"KEYS": keys, "QUERIES": queries, "num_warps": 4 if keys == 64 else 8, "num_stages": 1}
            bucket = str((tokens + 15) // 16 * 16)
            stack.enter_context(trial("attention_backward_one_pass", bucket, row))
            row = {"ROWS": 64, "COLS": 128, "num_warps": 4, "num_stages": 2}
            stack.enter_context(trial("attention_forward_one_pass", bucket, row))

        yield use


@pytest.mark.parametrize("case", ONE_PASS_CASES, ids=str)
def test_one_pass_kernel(
    case: tuple[int, int, int, int, torch.dtype, bool, int, int],
    triton_device: str,
    one_pass: Callable[[int, int, int], None],
    assert_accurate: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same results as of three kernels, by two; nothing else writes them; two runs agree bit for bit."""
    from beit_fast.kernels.attention import backward, forward

    tokens, batch, heads, head_dim, dtype, with_bias, keys, queries = case
    one_pass(tokens, keys, queries)
    monkeypatch.setattr(forward, "attention_forward_kernel", None)  # to launch it would fail
    monkeypatch.setattr(backward, "attention_backward_query_kernel", None)
    monkeypatch.setattr(backward, "attention_backward_key_kernel", None)
    qkv, bias, grad = on(triton_device, *inputs_of(batch, tokens, heads, head_dim, dtype))
    given = bias if with_bias else None
    first = compare(assert_accurate, qkv, given, grad)
    with torch.no_grad():
        assert torch.equal(packed_attention(qkv, given), first[0])
    torch.use_deterministic_algorithms(True)  # fills every new tensor with NaN
    try:
        again = run(packed_attention, qkv, given, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_one_pass_kernel_in_chunks_and_with_a_bias_prepared_for_another(
    triton_device: str, one_pass: Callable[[int, int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the batch is cut changes nothing; a bias prepared without the row, or a head dim too large, still works."""
    from beit_fast.kernels.attention import backward

    qkv, bias, grad = on(triton_device, *inputs_of(3, 33, 1, 16, torch.bfloat16))
    wide = on(triton_device, *inputs_of(1, 33, 1, 80, torch.bfloat16))
    two_kernels = run(packed_attention, *wide)
    early = prepare_bias(bias, qkv.dtype)
    one_pass(33, 64, 32)
    whole = run(packed_attention, qkv, bias, grad)
    monkeypatch.setattr(backward, "samples_per_chunk", lambda *_: 2)
    cut = run(packed_attention, qkv, bias, grad)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    late = run(lambda x, _: packed_attention(x, early), qkv, None, grad)
    assert all(torch.equal(a, b) for a, b in zip(late, whole, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(run(packed_attention, *wide), two_kernels, strict=True))


def test_kernels_take_views_and_ignore_uninitialised_memory(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, bias, grad = on(triton_device, *inputs_of(2, 21, 2, 16, torch.bfloat16))
    clean = run(packed_attention, qkv, bias, grad)
    wide = torch.full((4, 21, 3, 2, 32), float("nan"), dtype=qkv.dtype, device=triton_device)
    wide[::2, ..., 8:24] = qkv
    torch.use_deterministic_algorithms(True)  # fills every new tensor with NaN
    try:
        results = [
            run(packed_attention, wide[::2, ..., 8:24], bias, grad),
            run(packed_attention, qkv.permute(4, 3, 1, 2, 0).contiguous().permute(4, 2, 3, 1, 0), bias, grad),
            run(lambda x, b: biased_attention(*x.unbind(2), b.mT.contiguous().mT), qkv, bias, grad.mT.contiguous().mT),
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, clean, strict=True))


def test_kernels_share_a_prepared_bias(triton_device: str) -> None:
    """Blocks sharing one prepared bias give what each would give alone; frozen, it costs no gradient."""
    qkv, bias, grad = on(triton_device, *inputs_of(1, 17, 2, 32, torch.bfloat16))

    def two_blocks(x: Tensor, b: Tensor | None, prepare: Callable[..., object]) -> Tensor:
        shared = prepare(bias if b is None else b, x.dtype)
        return packed_attention(x, shared) + packed_attention(x * 0.5, shared)

    shared = run(lambda x, b: two_blocks(x, b, prepare_bias), qkv, bias, grad)
    alone = run(lambda x, b: two_blocks(x, b, lambda b, _: b), qkv, bias, grad)
    frozen = run(lambda x, _: two_blocks(x, None, prepare_bias), qkv, None, grad)
    with torch.no_grad():
        early = prepare_bias(bias, qkv.dtype)  # without the copy that gradients read
    late = run(lambda x, _: packed_attention(x, early) + packed_attention(x * 0.5, early), qkv, None, grad)
    assert isinstance(early, tuple)
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))
    for other in (frozen, late):
        assert all(torch.equal(a, b) for a, b in zip(other, shared[:2], strict=True))
