"""Configuration: frozen dataclasses that check themselves. A field's docstring is its `--help`; a default exists once.

`RunConfig` is what the engine needs; every task's configuration derives from it.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

Config = TypeVar("Config")

TRACKER_NAMES = ("tensorboard", "wandb", "mlflow")


def free(default: Any) -> Any:
    """A field that may differ when a run is resumed: it changes speed, reports or length, not the result of a step."""
    return field(default=default, metadata={"free": True})


def expand_home(config: Config) -> Config:
    """Return the configuration with `~` expanded in every path; no other value begins with `~`."""
    changed: dict[str, Any] = {}
    for each in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            changed[each.name] = expand_home(value)
        elif isinstance(value, (str, Path)):
            changed[each.name] = type(value)(os.path.expanduser(value))
        elif isinstance(value, (list, tuple)) and any(isinstance(item, (str, Path)) for item in value):
            changed[each.name] = type(value)(
                type(item)(os.path.expanduser(item)) if isinstance(item, (str, Path)) else item for item in value
            )
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def at_least_1(option: str, value: int | None) -> None:
    """Raise ValueError naming the option where its value is given and smaller."""
    if value is not None and value < 1:
        raise ValueError(f"{option} is {value}, it must be at least 1")


def local(default: Any, free: bool = True) -> Any:
    """A field that may differ between the ranks of a run: a path, or how this machine does its part."""
    return field(default=default, metadata={"free": free, "local": True})


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule (paper, tables 12 and 13)."""

    lr: float = 1.5e-3
    """Peak learning rate, for the whole global batch. It is never scaled by batch size or world size."""
    min_lr: float = 1e-5
    """Learning rate that the schedule approaches at the end."""
    warmup_lr: float = 0.0
    """Learning rate of the first step; linear from there to the peak."""
    warmup_epochs: float = 10.0
    """Length of the warm-up in epochs; of a run that is shorter, a tenth."""
    warmup_steps: int | None = None
    """Length of the warm-up in optimizer steps, in place of epochs; of a run that is shorter, a tenth."""
    schedule: Literal["cosine", "linear", "constant", "poly"] = "cosine"
    """Shape of the decay after the warm-up. `poly`, that of segmentation, is a straight line over the whole run, which
    the warm-up multiplies by a factor that rises from warmup_lr / lr to 1."""
    weight_decay: float = 0.05
    """Decoupled weight decay. Exempt are 1-D parameters, biases, pos_embed and cls_token."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Coefficients of AdamW's running averages."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    clip_grad: float | None = 3.0
    """Largest gradient norm (of all parameters together); None does not clip."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay, e.g. 0.9999."""
    impl: Literal["torch", "apex"] = "torch"
    """`torch`: fused AdamW. `apex`: NVIDIA apex's FusedAdam, which has to be installed from source."""
    max_skipped_steps: int = free(20)
    """Stop the run after this many steps in a row whose gradient was not finite. Each is skipped and counted."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is written, and how much of it is kept."""

    every_steps: int = free(1000)
    """Optimizer steps between checkpoints. The last step and a SIGTERM are always saved."""
    keep: int = free(2)
    """Newest checkpoints to keep, at least 2, so that a damaged one has a predecessor."""
    best: str | None = free(None)
    """Keep the best evaluation's checkpoint and model in `best` of the run folder: the one with the largest value of
    this metric, e.g. top1_percent, or the smallest where its name contains loss, error or mae."""
    background: Literal["auto", "on", "off"] = free("auto")
    """Write files while the training goes on, from a copy of the state in host memory. `auto`: where there is a GPU."""

    def __post_init__(self) -> None:
        at_least_1("--checkpoint.every-steps", self.every_steps)
        if self.keep < 2:
            raise ValueError("--checkpoint.keep must be at least 2: a damaged checkpoint needs a predecessor")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported, and how often."""

    every_steps: int = free(20)
    """Optimizer steps per line of metrics.jsonl and of the terminal."""
    progress: Literal["auto", "bar", "lines", "none"] = local("auto")
    """`bar`: a live bar. `lines`: one line per interval. `auto`: a bar on a terminal, lines otherwise."""

    trackers: str = local("")
    """Also tell `tensorboard`, `wandb` or `mlflow`, several with commas between them: scalars, pictures, configuration.
    They need the extra [trackers]; metrics.jsonl is written in any case, and none of them can end the run."""

    def __post_init__(self) -> None:
        at_least_1("--log.every-steps", self.every_steps)
        if wrong := [name for name in self.tracker_names() if name not in TRACKER_NAMES]:
            raise ValueError(f"--log.trackers: {wrong[0]!r} is none of {', '.join(TRACKER_NAMES)}")

    def tracker_names(self) -> list[str]:
        """The trackers asked for."""
        return [name for part in self.trackers.split(",") if (name := part.strip())]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has: length, batch, precision, folder."""

    output_dir: Path = field(default=Path("runs/run"), metadata={"free": True, "local": True})
    """Run folder: config, environment, metrics, checkpoints, pictures. A run found there is continued."""
    fresh: bool = free(False)
    """Start anew: a run found in the folder is moved aside (to <folder>.1, .2, ...), not continued."""
    dry_run: bool = free(False)
    """Print parameters, FLOPs, memory, steps, disk and time on this device, and train nothing."""
    plan_gpu: str | None = local(None)
    """With --dry-run: say memory and time for --gpus of this GPU (V100, A100-80GB, H100, H200, ...) as well."""
    seed: int = 0
    """Decides the initial weights and, with epoch and sample, everything random."""
    epochs: float = 800.0
    """Length of the run and of the schedule, in epochs."""
    steps: int | None = None
    """Length of the run and of the schedule in optimizer steps, in place of epochs."""
    max_steps: int | None = free(None)
    """Stop after this many optimizer steps in all; the schedule keeps its full length."""
    batch_size: int = 2048
    """Global batch: samples per optimizer step over all devices. Accumulation follows from it."""
    batch_per_device: int = free(64)
    """Samples per device that go forward and backward at once; does not change results, only memory and speed."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type; weights and optimizer state are fp32 always. fp16 scales the loss (the paper's V100 way). `auto`:
    bf16 on a GPU that has it, fp16 on an older one, fp32 on the CPU."""
    device: str = local("auto")
    """`auto`: cuda where there is one, else cpu."""
    gpus: int | None = local(None)
    """Processes to start on this machine, one per GPU; what crashes is started again. None: this process alone, or
    what torchrun or Slurm started."""
    parallel: Literal["ddp", "fsdp2"] = free("ddp")
    """With several processes: `ddp`, a whole model on each; `fsdp2`, parameters and optimizer split over them, for
    models beyond one card. A run may continue with the other one, and at any number of processes."""
    compile: bool = free(False)
    """torch.compile of each block; the first step takes a minute longer."""
    cuda_graph: bool = free(False)
    """Record a step as one CUDA graph and launch that: the host's share of a step nearly vanishes, which counts where
    steps are short (small models, few samples per GPU). One micro-batch per step, masks of one size."""
    hang_timeout_s: float = local(600.0)
    """Without a step for so long the run ends, and each rank writes where it stands to hang_rank<N>.txt."""
    resume_from: int | None = free(None)
    """Continue from the kept checkpoint of this step, also with another learning rate; later ones are set aside."""
    replay: int | None = free(None)
    """Repeat this optimizer step of the run found in the folder, from the checkpoint before it, and write down what
    was not finite in it; changes nothing in the run. Its number is the one in anomalies.jsonl."""
    extend: bool = free(False)
    """Continue the run found there, finished or not, to another --epochs or --steps, also with other learning rates:
    from its last step on the schedule is that of a run of the new length, so the rate rises again."""
    change_batch_size: bool = free(False)
    """Continue the run found there with another --batch-size, also with other learning rates: from the same place in
    the epoch and, if --epochs gives the length, in the schedule. Rounds to whole batches."""
    eval_every: int | None = free(None)
    """Optimizer steps between held-out evaluations; None evaluates after the last step only."""
    stop_after_no_gain: int | None = free(None)
    """End the run when so many evaluations in a row brought no better value of --checkpoint.best."""
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_per_device", "max_steps", "steps", "eval_every", "resume_from", "replay",
                     "stop_after_no_gain"):  # fmt: skip
            at_least_1(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.stop_after_no_gain is not None and (self.checkpoint.best is None or self.eval_every is None):
            raise ValueError("--stop-after-no-gain needs --checkpoint.best METRIC and --eval-every STEPS")
        if self.hang_timeout_s <= 0:
            raise ValueError(f"--hang-timeout-s is {self.hang_timeout_s:g}, it must be positive")
        if self.parallel == "fsdp2" and self.optim.impl == "apex":
            raise ValueError("--parallel fsdp2 works with --optim.impl torch only: apex does not know split parameters")


def to_plain(config: Any) -> dict[str, Any]:
    """The configuration as JSON values: paths become strings, tuples lists."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def from_plain(kind: type[Config], value: Mapping[str, Any]) -> Config:
    """The configuration that `to_plain` was given; fields that `value` lacks keep their defaults.

    TypeError where `value` has a field that `kind` has not.
    """
    hints = get_type_hints(kind)

    def typed(hint: Any, item: Any) -> Any:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return from_plain(hint, item)
        if isinstance(item, list):
            return tuple(item)
        return Path(item) if hint is Path or (Path in get_args(hint) and isinstance(item, str)) else item

    return kind(**{name: typed(hints.get(name), item) for name, item in value.items()})


def fields_marked(config: Any, mark: str, prefix: str = "") -> set[str]:
    """Dotted names of the fields marked `free` (may differ in a continuation) or `local` (may differ between ranks)."""
    names: set[str] = set()
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata.get(mark):
            names.add(prefix + f.name)
        elif dataclasses.is_dataclass(value):
            names |= fields_marked(value, mark, f"{prefix}{f.name}.")
    return names


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    result: dict[str, Any] = {}
    for key, item in value.items():
        result |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return result
