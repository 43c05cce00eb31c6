"""Repeat one step of a run and say what in it was not finite: `--replay STEP`.

A step is a function of the checkpoint before it and of (seed, step), so nothing has to be recorded while training: the
run is repeated, silently, from the newest checkpoint before the step (the run keeps it once it has seen such a step),
on as many processes as then. The run folder is only read, but for `replay/step_<STEP>.json` and `.safetensors`.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast.train.checkpoint import format as checkpoint
from beit_fast.train.checkpoint.format import Checkpoint
from beit_fast.train.checkpoint.run_folder import RunFolder
from beit_fast.train.distributed.parallel import local
from beit_fast.train.distributed.world import check_world, end_world, start_world
from beit_fast.train.engine import TrainingRun
from beit_fast.train.schedules import accumulation
from beit_fast.train.task import Task

REPORTED = 10


def replay(task: Task) -> int:
    """Repeat step number `config.replay` and report; returns 0.

    ValueError where there is no run, or none of its checkpoints lies before the step.
    """
    config = task.config
    assert config.replay is not None
    world = start_world(config.device)
    folder = RunFolder(config.output_dir)
    try:
        check_world(config, world)
        folder.compare(config, task.name)
        with closing(TrainingRun(task, world, folder)) as job:
            found = before(folder, config.replay)
            if found is not None and found.state["world_size"] != world.size and world.is_main:
                print(
                    f"the run had {found.state['world_size']} processes, this replay has {world.size}: sums are "
                    "rounded in another order",
                    flush=True,
                )
            job.prepare(found)
            if not job.step < config.replay <= job.schedule.last:
                raise ValueError(f"--replay {config.replay} is none of the steps 1 to {job.schedule.last} of this run")
            job.log(f"replaying step {config.replay} from {'the start' if found is None else found.path}")
            report = repeat(job, config.replay)
        if world.is_main:
            folder.replay.mkdir(exist_ok=True)
        world.barrier()
        name = f"step_{config.replay:08d}" + (f"_rank{world.rank}" if world.size > 1 else "")
        (folder.replay / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        for line in summary(report, world.rank if world.size > 1 else None):
            print(line, flush=True)
        return 0
    finally:
        task.close()
        end_world(world)


def before(folder: RunFolder, step: int) -> Checkpoint | None:
    """The newest sound checkpoint, of the run's own and of those kept for replays, before step number `step`."""
    kept = checkpoint.list_checkpoints(folder.checkpoints) + checkpoint.list_checkpoints(folder.replay)
    older = [path for path in kept if (checkpoint.step_of(path) or 0) < step]
    for path in sorted(older, key=lambda path: path.name, reverse=True):
        try:
            return checkpoint.verify(path)
        except checkpoint.DamagedCheckpoint as reason:
            print(f"{path} is damaged: {reason}", file=sys.stderr, flush=True)
    return None


def repeat(job: TrainingRun, step: int) -> dict[str, Any]:
    """Train on to `step`, then take it apart: what each module gave, what each parameter received."""
    config, world, task = job.config, job.world, job.task
    batches = iter(task.batches(job.schedule.requests(job.step, step, world.rank, world.size)))
    micro = accumulation(config, world.size)
    job.model.train()
    while job.step < step - 1:
        job.train_step([next(batches) for _ in range(micro)])
        job.step += 1
    group = [next(batches) for _ in range(micro)]
    with observed(job.module) as outputs:
        loss, _ = job.compute.gradients(group, job.step + job.schedule.schedule_offset)
    gradients = {
        name: local(parameter.grad).detach()
        for name, parameter in job.module.named_parameters()
        if parameter.grad is not None
    }
    largest = {name: float(g.abs().amax()) if g.numel() else 0.0 for name, g in gradients.items()}
    weights = {name: bool(local(p).isfinite().all()) for name, p in job.module.named_parameters()}
    job.folder.replay.mkdir(exist_ok=True)
    path = job.folder.replay / f"step_{step:08d}_rank{world.rank}_batch.safetensors"
    tensors = dict(tensors_in(group))
    checkpoint.write_tensors(path, tensors)
    return {
        "step": step,
        "rank": world.rank,
        "loss": str(float(loss)),
        "loss_scale": float(job.scaler.scale),
        "first_module_not_finite": next((name for name, value in outputs if not value < float("inf")), None),
        "gradients_not_finite": [name for name, value in largest.items() if not value < float("inf")],
        "weights_not_finite": [name for name, finite in weights.items() if not finite],
        "largest_outputs": [[name, str(value)] for name, value in top(dict(outputs))],
        "largest_gradients": [[name, str(value)] for name, value in top(largest)],
        "batch": path.name,
        "batch_not_finite": [
            name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())
        ],
    }


def top(values: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(values.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"), reverse=True)[
        :REPORTED
    ]


@contextmanager
def observed(model: nn.Module) -> Iterator[list[tuple[str, float]]]:
    """Collects (module, largest absolute output, NaN if there is one) of every module, in the order of their calls.

    A BEiT calls all its parts while they are watched, in place of fusing them.
    """
    seen: list[tuple[str, float]] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            values = [t for _, t in tensors_in(output) if t.is_floating_point() and t.numel()]
            if values:
                seen.append((name, float(torch.stack([t.detach().abs().amax().float() for t in values]).amax())))

        return look

    handles = [module.register_forward_hook(hook(name or "model")) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested tuples, lists, dicts and dataclasses, with the path that leads to it."""
    if isinstance(value, Tensor):
        yield name or "0", local(value).detach()
        return
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        items = value._asdict().items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif hasattr(value, "__dataclass_fields__"):
        items = vars(value).items()
    for key, item in items:
        yield from tensors_in(item, f"{name}.{key}" if name else str(key))


def summary(report: dict[str, Any], rank: int | None) -> list[str]:
    """The report in a few lines."""
    where = "" if rank is None else f"rank {rank}: "
    bad = report["gradients_not_finite"]
    lines = [f"{where}step {report['step']}: loss {report['loss']}, loss scale {report['loss_scale']:g}"]
    if report["batch_not_finite"]:
        lines.append(f"{where}not finite in the batch itself: {', '.join(report['batch_not_finite'])}")
    if report["weights_not_finite"]:
        lines.append(f"{where}weights that were not finite before it: {', '.join(report['weights_not_finite'][:5])}")
    if report["first_module_not_finite"]:
        lines.append(f"{where}first module whose output is not finite: {report['first_module_not_finite']}")
    if bad:
        lines.append(f"{where}{len(bad)} gradients are not finite, e.g. {bad[0]}")
    if len(lines) == 1:
        lines.append(f"{where}everything was finite; largest gradient {' '.join(report['largest_gradients'][0])}")
    return lines
