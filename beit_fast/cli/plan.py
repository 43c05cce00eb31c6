"""What a run will take, measured on this device without training: --dry-run.

Opens the data and builds the model, as the run would, so what would stop the run stops the plan. Without a path the
built-in images stand in for those that the recipe is for, and no weights are needed. Then one micro-batch goes forward
and backward; nothing is stepped or saved.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_fast.cli.gpus import Work, measured_at, named, nearest_measurement
from beit_fast.data.labelled import LabelledImages
from beit_fast.data.segmentation import SegmentationImages
from beit_fast.train.checkpoint.format import mib, tensor_bytes
from beit_fast.train.config import RunConfig
from beit_fast.train.distributed.world import World, check_world, end_world, start_world
from beit_fast.train.memory import capacity_bytes, largest_micro_batch, state_memory
from beit_fast.train.precision import DTYPES, precision_of
from beit_fast.train.progress import duration
from beit_fast.train.schedules import accumulation, requests_of, run_length
from beit_fast.train.task import Task
from beit_fast.train.tasks.finetune import LabelledDataConfig
from beit_fast.train.tasks.model import ModelConfig
from beit_fast.train.tasks.pretrain import PretrainConfig
from beit_fast.train.tasks.segment import SegmentationDataConfig


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


IMAGES = {None: 1_281_167, 1000: 1_281_167, 21841: 14_197_122, 100: 50_000, 150: 20_210}
"""Training images by classes: of ImageNet-1k, which is that of pre-training too, ImageNet-22k, CIFAR-100, ADE20K."""
STAND_IN = " (of the data that the recipe is for; built-in images stand in)"
STANDING_IN = 64
"""Built-in images that stand in; the batch of a recipe is larger, so a smaller one is timed."""
MEASURED_ON_CPU = 2
"""Samples that are timed on a CPU where built-in images stand in: two, as mixup and batch norms need."""


def without_data(config: Any) -> tuple[Any, int | None]:
    """A recipe's configuration with built-in images for its own, and how many it would have; as it is with a path.

    Labels keep the number of classes that the recipe demands. The number of images of what is demanded by nothing, as
    by the tokenizer's recipe, is that of the built-in ones: None.
    """
    data = getattr(config, "data", None)
    known = hasattr(config, "model") and not getattr(config, "defaults_by_images_seen", False)  # a data set with a name
    if getattr(data, "path", None) is not None or not known:
        return config, None
    assert data is not None
    classes = getattr(data, "num_classes", None)
    if classes is not None:
        data = PLANNED[type(data)](**{field.name: getattr(data, field.name) for field in fields(data)})
    data = replace(data, builtin_images=STANDING_IN, **({"validate": False} if hasattr(data, "validate") else {}))
    if isinstance(config, PretrainConfig):
        classes = 21841 if data.normalization == "half" else 1000
    return replace(config, data=data), IMAGES.get(classes, IMAGES[None])


@dataclass(frozen=True, kw_only=True)
class PlannedLabels(LabelledDataConfig):
    """Built-in images that pretend to have the classes of others."""

    def open(self) -> tuple[LabelledImages, LabelledImages | None]:
        images, _ = LabelledDataConfig.open(replace(self, num_classes=None))
        names = tuple(map(str, range(self.num_classes or 0)))
        return LabelledImages(images.source, images.labels % len(names), names), None


@dataclass(frozen=True, kw_only=True)
class PlannedSegmentation(SegmentationDataConfig):
    """Built-in scenes that pretend to have the classes of others."""

    def open(self) -> tuple[SegmentationImages, SegmentationImages | None]:
        images, _ = super().open()
        return replace(images, classes=tuple(map(str, range(self.num_classes or 0)))), None


PLANNED = {LabelledDataConfig: PlannedLabels, SegmentationDataConfig: PlannedSegmentation}


def plan(task: Callable[[Any], Task], config: RunConfig, stand_in: bool) -> dict[str, float]:
    """Print parameters, FLOPs, memory, steps, disk and time of a run, and return the numbers printed.

    `stand_in`: without a path the recipe is meant for other images than the built-in ones.
    """
    config, assumed = without_data(config) if stand_in else (config, None)
    world = start_world(config.device)
    try:
        check_world(config, world)
        size = config.batch_per_device if world.device.type == "cuda" else MEASURED_ON_CPU
        size = min(size, config.batch_per_device, STANDING_IN // world.size)
        small = replace(config, batch_size=size * world.size, batch_per_device=size)
        made = task(config if assumed is None else small)
        with closing(made):
            numbers = _measure(made, config, world, assumed)
        if world.is_main:
            _print(made, config, world, numbers)
        return numbers
    finally:
        end_world(world)


def _measure(task: Task, config: RunConfig, world: World, assumed: int | None) -> dict[str, float]:
    device = world.device
    torch.manual_seed(config.seed)
    model = task.build(world).train()
    samples = assumed or task.num_samples()
    steps_per_epoch, total, _ = run_length(config, samples)
    target = min(total, config.max_steps or total)
    groups = task.parameter_groups(model, config.optim.weight_decay)
    precision = precision_of(config, device)
    dtype = DTYPES[precision]
    micro = accumulation(config, world.size)
    repeats = 1 if device.type == "cpu" else 4  # a GPU's first passes compile and allocate
    steps = -(-repeats // micro)
    timed, timed_epoch = task.config, task.num_samples() // task.config.batch_size
    steps = steps if timed is config else repeats
    batches = iter(task.batches(requests_of(0, steps, timed_epoch, timed, world.rank, world.size)))
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
    share = -(-local // micro)  # samples of a micro-batch
    done = share if timed is config else timed.batch_per_device  # of the one that was timed
    weights = tensor_bytes(model.state_dict())
    held = state_memory(model, groups, dict(model.named_parameters()) if config.optim.ema_decay is not None else None)
    moments, averages = held.moments, held.averages
    saved_bytes = weights + moments + averages
    frozen = [p for module in task.frozen() for p in module.parameters()]
    frozen_bytes = sum(p.nbytes for p in frozen)
    step_s = (max(seconds["data"], seconds["prepare"] + seconds["train"])) * local / done
    extras = task.plan()
    if "token_cache_bytes" in extras:
        extras["token_cache_bytes"] *= samples / task.num_samples()
    prepared_steps = min(target, extras.get("prepared_epochs", 2**62) * steps_per_epoch)
    later_s = max(seconds["data"], seconds["train"]) * local / done  # once what `prepare` gives is kept
    return {
        "parameters": sum(p.numel() for p in [*model.parameters(), *frozen]),
        "trained_parameters": sum(p.numel() for group in groups for p in group["params"]),
        "samples": samples,
        "assumed": int(assumed is not None),
        "steps_per_epoch": steps_per_epoch,
        "schedule_steps": total,
        "steps": target,
        "micro_batch": share,
        "accumulation": micro,
        "state_bytes": held.total + frozen_bytes,
        "frozen_bytes": frozen_bytes,
        "weights_bytes": weights,
        "gradients_bytes": held.gradients,
        "moments_bytes": moments,
        "averages_bytes": averages,
        "activation_bytes": kept * share / done,
        "activation_bytes_per_sample": kept / done,
        "largest_micro_batch": largest_micro_batch(capacity_bytes(device), held.total + frozen_bytes, kept / done),
        "checkpoint_bytes": saved_bytes,
        "disk_bytes": saved_bytes * (config.checkpoint.keep + 1),
        "data_ms_per_sample": 1000 * seconds["data"] / done,
        "prepare_ms_per_sample": 1000 * seconds["prepare"] / done,
        "train_ms_per_sample": 1000 * seconds["train"] / done,
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
    flops = sum(n.get(f"{part}flops_per_image", 0.0) for part in ("", "tokenizer_", "teacher_"))
    if not flops:
        return [(f"on {count} x {gpu.name}", "no FLOPs are known of this task, so no time can be said")]
    work: Work = "pre-training" if n.get("tokenizer_flops_per_image") else "training"
    work = "inference" if n.get("forward_flops_per_image") == n.get("flops_per_image") else work
    model = getattr(config, "model", None)
    model = model if isinstance(model, ModelConfig) else None
    usual = model is not None and (model.preset, model.image_size, model.width, model.depth) == (
        "plus",
        224,
        None,
        None,
    )
    known = measured_at(gpu, work, model.size) if model is not None and usual else None
    if known is not None:
        rate, source = (
            known.images_per_s,
            f"measured at batch {known.batch}, without the input pipeline: {known.record}",
        )
    else:
        width = 768 if model is None else model.architecture(8192).width
        near = nearest_measurement(work, width, config.batch_per_device)
        rate = near.share * gpu.peak_flops_per_s / flops
        source = (
            f"estimate: {100 * near.share:.0f} % of {gpu.peak_flops_per_s / 1e12:,.0f} TFLOP/s, the share measured on "
            f"an {near.gpu} in {near.work} of BEiT-{near.size} at batch {near.batch}"
        )
    seconds = n["steps"] * config.batch_size / (rate * count)
    return [
        (f"on {count} x {gpu.name}", f"{duration(seconds)}, {rate:,.0f} {noun}/s each ({source})"),
        ("  largest batch there", f"--batch-per-device {fits} of {gpu.memory_bytes / 2**30:.0f} GiB (estimate)"),
    ]


def _print(task: Task, config: RunConfig, world: World, n: dict[str, float]) -> None:
    where = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    parent = next(p for p in [config.output_dir, *config.output_dir.absolute().parents] if Path(p).exists())
    noun, note = task.sample_noun, STAND_IN * int(n["assumed"])
    parts = [part for part in ("weights", "frozen", "gradients", "moments", "averages") if n[f"{part}_bytes"]]
    rows = [
        ("device", f"{world.size} x {where}, {precision_of(config, world.device)}"),
        ("parameters", f"{n['parameters']:,.0f} ({n['trained_parameters']:,.0f} trained)"),
        *((name.replace("_", " ").replace("flops", "FLOPs"), f"{value / 1e9:,.2f}e9")
          for name, value in n.items() if "flops" in name),
        ("data", f"{n['samples']:,.0f} {noun}, {n['steps_per_epoch']:,.0f} steps per epoch{note}"),
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
