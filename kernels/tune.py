"""Times launch configurations on the GPU at hand and writes the user's own table: `python -m beit_fast tune`.

Every kernel starts from the row in force; another replaces it only if it is at least 3 % faster, measured in turns. All
rows are compiled first, in a process for each core.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from beit_fast.kernels.backend import triton_installed
from beit_fast.kernels.launch_table import (
    CANDIDATES,
    Config,
    architecture_of,
    forget,
    launch_config,
    recording,
    trial,
    user_table_path,
)

GAIN = 0.97  # a new row must take at most this share of the shipped row's time
TURNS = 7


@dataclass(frozen=True)
class Subject:
    """One kernel at one size.

    Args:
        kernel, bucket: its row in the launch table.
        run: launches it, with whatever row is in force.
        axes: what is varied, by the row's own names.
        rows: to be tried as they are, in place of axes; without one of them another kernel does the work.
    """

    kernel: str
    bucket: str | None
    run: Callable[[], object]
    axes: Mapping[str, Sequence[int]]
    rows: Sequence[Config] = ()

    @property
    def name(self) -> str:
        return self.kernel if self.bucket is None else f"{self.kernel}/{self.bucket}"

    def all_rows(self, device: torch.device) -> list[Config]:
        """Every row to be tried: the axes in all combinations, and the candidates of this architecture."""
        if self.rows:
            return list(self.rows)
        now = launch_config(self.kernel, device, self.bucket)
        choices = itertools.product(*self.axes.values())
        rows: list[Config] = [{**now, **dict(zip(self.axes, values, strict=True))} for values in choices]
        return rows + [row for row in CANDIDATES.get(architecture_of(device), {}).get(self.name, ()) if row not in rows]


def subjects(
    device: torch.device, batch: int, tokens: int, width: int, heads: int, vocabulary: int, dtype: torch.dtype
) -> list[Subject]:
    """Every kernel worth tuning, at the sizes of one model; `dtype` is that of activations."""
    from beit_fast.kernels.attention import backward, bias, forward
    from beit_fast.kernels.color_jitter import kernel as views
    from beit_fast.kernels.gelu import kernel as gelu
    from beit_fast.kernels.linear_argmax import kernel as codebook
    from beit_fast.kernels.mim_loss import kernel as loss
    from beit_fast.kernels.residual_norm import kernel as residual
    from beit_fast.kernels.tiles import block_of

    def draw(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=device).to(kind)

    B, N, D = batch, tokens, width
    warps: dict[str, Sequence[int]] = {"num_warps": (2, 4, 8, 16)}
    x, branch, vector, factors = draw(B, N, D), draw(B, N, D, kind=dtype), draw(D), torch.ones(B, device=device)
    total, normed, mean, rstd = residual.residual_norm(x, branch, vector, factors, vector, vector, 1e-6, vector)
    row_bucket = str(1 << (D - 1).bit_length())
    wide, wide_bias = draw(B, N, 4 * D, kind=dtype), draw(4 * D)
    M = B * max(1, (N - 1) * 3 // 8)
    rows, targets = torch.arange(M, device=device), torch.randint(0, vocabulary, (M,), device=device)
    logits, masked = draw(M, vocabulary, kind=dtype), draw(M, D, kind=dtype)
    _, row_mean, row_rstd = loss.gather_norm(x.view(-1, D), rows, vector, vector, 1e-6, dtype)
    side = max(1, round((N - 1) ** 0.5)) * 16
    crops = torch.randint(0, 256, (B, side, side, 3), dtype=torch.uint8, device=device)
    flips, colours = torch.zeros(B, dtype=torch.bool, device=device), torch.ones(B, 3, device=device)
    norm = [0.5] * 3
    latents, codes, code_bias = draw(B * (N - 1), 32), draw(vocabulary, 32), draw(vocabulary)

    found = [
        Subject(
            "residual_norm_forward", row_bucket,
            lambda: residual.residual_norm(x, branch, vector, factors, vector, vector, 1e-6, vector),
            warps,
        ),
        Subject(
            "residual_norm_backward", row_bucket,
            lambda: residual.residual_norm_backward(
                x, normed, total, mean, rstd, vector, branch, vector, factors, vector, dtype, [True] * 6
            ),
            {"PROGRAMS": (256, 512, 1024), **warps},
        ),
        Subject(
            "gelu_forward", None, lambda: gelu.bias_gelu(wide, wide_bias),
            {"ROWS": (1, 2, 4, 8), "COLS": (256, 512, 1024), "num_warps": (4, 8)},
        ),
        Subject(
            "gelu_backward", None, lambda: gelu.bias_gelu_backward(wide, wide, wide_bias, True),
            {"ROWS": (2, 4, 8), "COLS": (128, 256, 512), "PROGRAMS": (128, 256, 512), "num_warps": (4, 8)},
        ),
        Subject(
            "cross_entropy", None, lambda: loss.cross_entropy_(logits, targets, True), {"num_warps": (4, 8, 16, 32)},
        ),
        Subject(
            "gather_norm_forward", row_bucket,
            lambda: loss.gather_norm(x.view(-1, D), rows, vector, vector, 1e-6, dtype), warps,
        ),
        Subject(
            "gather_norm_backward", row_bucket,
            lambda: loss.gather_norm_backward(
                masked, factors[0], x.view(-1, D), rows, targets, row_mean, row_rstd, vector
            ),
            {"PROGRAMS": (128, 256, 512), **warps},
        ),
        Subject(
            "color_jitter", None, lambda: views.color_jitter(crops, flips, colours, factors, norm, norm, dtype),
            {"BLOCK": (256, 512, 1024, 2048), "num_warps": (2, 4, 8)},
        ),
        Subject(
            "linear_argmax", "32", lambda: codebook.linear_argmax(latents, codes, code_bias),
            {"ROWS": (32, 64), "COLS": (32, 64, 128), "num_warps": (4, 8)},
        ),
    ]  # fmt: skip
    qkv = draw(B, N, 3, heads, D // heads, kind=dtype)
    q, k, v = qkv.unbind(2)
    scale, learned = (D // heads) ** -0.5, draw(heads, N, N)
    out, lse = torch.empty_like(q), torch.empty(B, heads, N, device=device)

    @functools.cache
    def prepared_for(*rows: tuple[tuple[str, int], ...] | None) -> tuple[torch.Tensor, torch.Tensor]:
        return bias.prepare_bias(learned, dtype, True, *(None if row is None else dict(row) for row in rows))

    def prepared() -> tuple[torch.Tensor, torch.Tensor]:
        return prepared_for(*(None if row is None else tuple(row.items()) for row in bias.one_pass_rows(N, device)))

    def run_forward() -> object:
        return forward.attention_forward(q, k, v, learned, prepared()[0], scale, True)

    def run_backward() -> object:
        return backward.attention_backward(out, q, k, v, learned, *prepared(), out, lse, scale, True)

    tiles = {"ROWS": (32, 64, 128), "COLS": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
    head_bucket = str(block_of(D // heads))
    runs: dict[str, Callable[[], object]] = {"attention_forward": run_forward}
    runs |= dict.fromkeys(("attention_backward_query", "attention_backward_key"), run_backward)
    found += [Subject(name, head_bucket, run, tiles) for name, run in runs.items()]
    bucket = str((N + 15) // 16 * 16)
    candidates = CANDIDATES.get(architecture_of(device), {})
    backward_rows = candidates.get(f"attention_backward_one_pass/{bucket}", ())
    forward_rows = candidates.get(f"attention_forward_one_pass/{bucket}", ())

    def run_forward_beside() -> object:
        with trial("attention_backward_one_pass", bucket, backward_rows[0]):  # without which there is no such forward
            return run_forward()

    if backward_rows and D // heads <= 64:
        found.append(Subject("attention_backward_one_pass", bucket, run_backward, {}, backward_rows))
        if forward_rows:
            found.append(Subject("attention_forward_one_pass", bucket, run_forward_beside, {}, forward_rows))
    return found


def compile_all(found: Iterable[Subject], device: torch.device) -> None:
    """Compiles every row of every kernel into Triton's cache, in a process for each core."""
    jobs = []
    for subject in found:
        for row in subject.all_rows(device):
            with trial(subject.kernel, subject.bucket, row), recording() as launches:
                subject.run()
            jobs += [job for launch in launches if (job := compile_job(*launch)) not in jobs]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        for error in pool.map(_compile, jobs):
            if error:
                raise RuntimeError(error)


def compile_job(kernel: Any, grid: object, arguments: Sequence[Any], constants: Mapping[str, Any]) -> tuple[Any, ...]:
    """What another process needs to know to compile a launch: names, and of tensors the dtype."""
    kinds = tuple(value.dtype if isinstance(value, torch.Tensor) else value for value in arguments)
    return kernel.fn.__module__, kernel.fn.__name__, kinds, tuple(sorted(constants.items()))


def _compile(job: tuple[Any, ...]) -> str:
    """Compiles one launch; what went wrong, unless the row just does not fit the GPU."""
    module, name, kinds, constants = job
    try:
        getattr(importlib.import_module(module), name).warmup(*kinds, grid=(1,), **dict(constants))
    except Exception as error:
        return "" if _does_not_fit(error) else f"{name}: {error}"
    return ""


def best_row(subject: Subject, device: torch.device, clock: Callable[[Callable[[], object]], float]) -> Config | None:
    """The fastest row for this kernel, or None if the one in force is as good.

    Args:
        clock: seconds of a call.
    """
    times: dict[int, float] = {}
    rows = subject.all_rows(device)
    for index, row in enumerate(rows):
        with trial(subject.kernel, subject.bucket, row):
            try:
                times[index] = clock(subject.run)
            except Exception as error:
                if not _does_not_fit(error):
                    raise
    if not times:
        return None
    best = rows[min(times, key=times.__getitem__)]
    ratios = []
    for _ in range(TURNS):
        with trial(subject.kernel, subject.bucket, best):
            seconds = clock(subject.run)
        ratios.append(seconds / clock(subject.run))
    return best if median(ratios) < GAIN else None


def _does_not_fit(error: Exception) -> bool:
    """Whether a configuration asks for more registers or shared memory than there are, or tiles that do not exist."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return isinstance(error, OutOfResources | PTXASError | CompilationError)


def tune(found: Iterable[Subject], device: torch.device, path: Path, say: Callable[[str], None] = print) -> int:
    """Writes the rows that are faster than the shipped ones into the table at `path`, beside what it holds already.

    Returns:
        the number of rows written.
    """
    found = list(found)
    if device.type == "cuda":
        compile_all(found, device)
    clock = _gpu_clock if device.type == "cuda" else _wall_clock
    rows: dict[str, Config] = {}
    for subject in found:
        row = best_row(subject, device, clock)
        say(f"{subject.name:36s} {'as shipped' if row is None else json.dumps(row)}")
        if row is not None:
            rows[subject.name] = row
    if rows:
        table: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        table.setdefault(architecture_of(device), {}).update(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        draft.replace(path)
        forget()
    return len(rows)


def _gpu_clock(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=30, return_mode="median")) / 1e3


def _wall_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m beit_fast tune", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64, help="images on this GPU (default 64)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--width", type=int, default=768, help="768 for BEiT-B, 1024 for BEiT-L")
    parser.add_argument("--heads", type=int, default=12, help="12 for BEiT-B, 16 for BEiT-L")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or not triton_installed():
        print("error: tune needs a CUDA device and triton; without them no kernel of ours runs", file=sys.stderr)
        return 2
    device, path = torch.device("cuda", torch.cuda.current_device()), user_table_path()
    tokens = (options.image_size // 16) ** 2 + 1
    found = subjects(device, options.batch_size, tokens, options.width, options.heads, 8192, torch.bfloat16)
    count = tune(found, device, path)
    print(f"{count} rows written to {path}" if count else "the shipped table is as good; nothing written")
    return 0
