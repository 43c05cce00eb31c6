"""What a run will take, without training: --dry-run."""

from beit_fast.train.config import RunConfig
from beit_fast.train.task import Task


def plan(task: Task, config: RunConfig) -> None:
    """Print parameters, FLOPs, memory, steps, disk and time of a run."""
    raise NotImplementedError
