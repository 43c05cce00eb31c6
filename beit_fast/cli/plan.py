"""What a run will take, measured on this device without training: --dry-run.

Opens the data, loads the tokenizer and builds the model, as the run would, so what would stop the run stops the plan.
Then one micro-batch goes forward and backward; nothing is stepped or saved.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_fast.cli.gpus import ASSUMED_UTILISATION, measured_images_per_s, named
from beit_fast.train.checkpoint.format import mib, tensor_bytes
from beit_fast.train.config import RunConfig
from beit_fast.train.distributed.world import World, check_world, end_world, start_world
from beit_fast.train.memory import capacity_bytes, largest_micro_batch, state_memory
from beit_fast.train.precision import DTYPES, precision_of
from beit_fast.train.progress import duration
from beit_fast.train.schedules import accumulation, requests_of, run_length
from beit_fast.train.task import Task


class SavedForBackward:
    """Counts the bytes that autograd keeps between forward and backward; a storage that is kept twice counts once."""

    def __init__(self, parameters: Iterator[Tensor]) -> None:
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> "SavedForBackward":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def plan(task: Task) -> dict[str, float]:
    """Print parameters, FLOPs, memory, steps, disk and time of a run, and return the numbers printed."""
    config = task.config
    world = start_world(config.device)
    try:
        check_world(config, world)
        with closing(task):
            numbers = _measure(task, config, world)
        if world.is_main:
            _print(task, config, world, numbers)
        return numbers
    finally:
        end_world(world)


def _measure(task: Task, config: RunConfig, world: World) -> dict[str, float]:
    device = world.device
    torch.manual_seed(config.seed)
    model = task.build(world).train()
    steps_per_epoch, total, _ = run_length(config, task.num_samples())
    target = min(total, config.max_steps or total)
    groups = task.parameter_groups(model, config.optim.weight_decay)
    precision = precision_of(config, device)
    dtype = DTYPES[precision]
    micro = accumulation(config, world.size)
    repeats = 1 if device.type == "cpu" else 4  # a GPU's first passes compile and allocate
    steps = -(-repeats // micro)
    batches = iter(task.batches(requests_of(0, steps, steps_per_epoch, config, world.rank, world.size)))
    seconds = {"data": 0.0, "prepare": 0.0, "train": 0.0}
    kept = 0

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(repeats):
        times = [clock()]
        batch = next(batches)
        times.append(clock())
        targets = torch.as_tensor(task.num_targets(batch), dtype=torch.float32, device=device)
        with torch.no_grad():
            ready = task.prepare(batch, 0)
        times.append(clock())
        with SavedForBackward(model.parameters()) as saved:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                output = task.loss(model, ready, targets)
            kept = saved.bytes
        output.loss.backward()
        times.append(clock())
        seconds = dict(zip(seconds, (b - a for a, b in pairwise(times)), strict=True))
    local = config.batch_size // world.size
    share = -(-local // micro)  # samples of the micro-batch that was timed
    weights = tensor_bytes(model.state_dict())
    held = state_memory(model, groups, dict(model.named_parameters()) if config.optim.ema_decay is not None else None)
    moments, averages = held.moments, held.averages
    saved_bytes = weights + moments + averages
    step_s = (max(seconds["data"], seconds["prepare"] + seconds["train"])) * local / share
    extras = task.plan()
    prepared_steps = min(target, extras.get("prepared_epochs", 2**62) * steps_per_epoch)
    later_s = max(seconds["data"], seconds["train"]) * local / share  # once what `prepare` gives is kept
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for group in groups for p in group["params"]),
        "samples": task.num_samples(),
        "steps_per_epoch": steps_per_epoch,
        "schedule_steps": total,
        "steps": target,
        "micro_batch": share,
        "accumulation": micro,
        "state_bytes": held.total,
        "weights_bytes": weights,
        "gradients_bytes": held.gradients,
        "moments_bytes": moments,
        "averages_bytes": averages,
        "activation_bytes": kept,
        "activation_bytes_per_sample": kept / share,
        "largest_micro_batch": largest_micro_batch(capacity_bytes(device), held.total, kept / share),
        "checkpoint_bytes": saved_bytes,
        "disk_bytes": saved_bytes * (config.checkpoint.keep + 1),
        "data_ms_per_sample": 1000 * seconds["data"] / share,
        "prepare_ms_per_sample": 1000 * seconds["prepare"] / share,
        "train_ms_per_sample": 1000 * seconds["train"] / share,
        "run_s": step_s * prepared_steps + later_s * (target - prepared_steps),
        "saved_s": (step_s - later_s) * (target - prepared_steps),
        **extras,
    }


def on_gpu(config: RunConfig, n: dict[str, float], noun: str) -> list[tuple[str, str]]:
    """Memory and time on `config.gpus` of the GPU that --plan-gpu names.

    Activations are those measured here, halved where this device has none of the 16-bit types that the GPU would use.
    """
    assert config.plan_gpu is not None
    gpu, count = named(config.plan_gpu), config.gpus or 1
    per_sample = n["activation_bytes_per_sample"] * (
        0.5 if config.precision == "auto" and not torch.cuda.is_available() else 1
    )
    split = count if config.parallel == "fsdp2" else 1
    fits = largest_micro_batch(gpu.memory_bytes, n["state_bytes"] / split, per_sample)
    known = measured_images_per_s(gpu, getattr(getattr(config, "model", None), "size", "?"))
    flops = n.get("flops_per_image", 0.0) + n.get("tokenizer_flops_per_image", 0.0)
    if known is not None:
        rate, source = known[0], f"measured, {known[1]}"
    elif flops:
        rate = ASSUMED_UTILISATION * gpu.peak_flops_per_s / flops
        peak = gpu.peak_flops_per_s / 1e12
        source = f"estimate: {100 * ASSUMED_UTILISATION:.0f} % of {peak:,.0f} TFLOP/s, not measured"
    else:
        return [(f"on {count} x {gpu.name}", "no FLOPs are known of this task, so no time can be said")]
    seconds = n["steps"] * config.batch_size / (rate * count)
    return [
        (f"on {count} x {gpu.name}", f"{duration(seconds)}, {rate:,.0f} {noun}/s each ({source})"),
        ("  largest batch there", f"--batch-per-device {fits} of {gpu.memory_bytes / 2**30:.0f} GiB (estimate)"),
    ]


def _print(task: Task, config: RunConfig, world: World, n: dict[str, float]) -> None:
    where = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    parent = next(p for p in [config.output_dir, *config.output_dir.absolute().parents] if Path(p).exists())
    noun = task.sample_noun
    parts = [part for part in ("weights", "gradients", "moments", "averages") if n[f"{part}_bytes"]]
    rows = [
        ("device", f"{world.size} x {where}, {precision_of(config, world.device)}"),
        ("parameters", f"{n['parameters']:,.0f} ({n['trained_parameters']:,.0f} trained)"),
        *((name.replace("_", " ").replace("flops", "FLOPs"), f"{value / 1e9:,.2f}e9")
          for name, value in n.items() if "flops" in name),
        ("data", f"{n['samples']:,.0f} {noun}, {n['steps_per_epoch']:,.0f} steps per epoch"),
        ("steps", f"{n['steps']:,.0f} of a schedule of {n['schedule_steps']:,.0f}"),
        ("batch", f"{config.batch_size} = {world.size} devices x {n['accumulation']:.0f} x {n['micro_batch']:.0f}"),
        ("memory per device", f"{mib(int(n['state_bytes'] + n['activation_bytes']))} = "
         + " + ".join(f"{mib(int(n[f'{part}_bytes']))} {part}" for part in parts)
         + f" + {mib(int(n['activation_bytes']))} activations of {n['micro_batch']:.0f} {noun}"),
        ("largest batch", f"--batch-per-device {n['largest_micro_batch']:.0f} by this arithmetic (estimate)"),
        ("disk", f"{mib(int(n['checkpoint_bytes']))} per checkpoint, {mib(int(n['disk_bytes']))} in all; "
         f"{mib(shutil.disk_usage(parent).free)} free"),
        *([("token cache", f"{mib(int(n['token_cache_bytes']))} on disk; from epoch {n['prepared_epochs']:.0f} on no "
            f"tokenizer, {duration(n['saved_s'])} saved")] if "token_cache_bytes" in n else []),
        (f"time per {noun.rstrip('s')}", f"{n['train_ms_per_sample']:,.1f} ms forward and backward, "
         f"{n['prepare_ms_per_sample']:,.1f} ms before it, {n['data_ms_per_sample']:,.1f} ms of data beside it"),
        ("time", f"{duration(n['run_s'])} on {world.size} of this device (from one micro-batch)"),
    ]  # fmt: skip
    rows += task.plan_lines()
    if config.plan_gpu is not None:
        rows += on_gpu(config, n, noun)
    print(f"plan of {task.name}; nothing is trained")
    for name, value in rows:
        print(f"  {name:<26} {value}")
