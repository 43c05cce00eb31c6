"""Initial weights of a run: from a file, or from another run of this library."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from beit_fast.models.checkpoints import LoadReport, load_checkpoint
from beit_fast.train.checkpoint.format import newest_checkpoint, opened, write_tensors
from beit_fast.train.checkpoint.resharding import whole_tensors


def resolve_weights(path: str | Path) -> Path:
    """The file or folder of weights that `path` means; of a run folder that is its newest sound checkpoint.

    Raises:
        ValueError: a run folder without a checkpoint; the rest is up to `load_checkpoint`.
    """
    root = Path(path)
    if not (root / "checkpoints").is_dir():
        return root
    found, rejected = newest_checkpoint(root / "checkpoints")
    if found is None:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in rejected)
        raise ValueError(f"{root} is a run folder without a sound checkpoint{f' ({reasons})' if reasons else ''}")
    return found.path


def load_weights(model: nn.Module, path: str | Path, verbose: bool = True) -> LoadReport:
    """Load what `path` means (`resolve_weights`) into `model`, as `models.load_checkpoint` does; prints its report."""
    place = resolve_weights(path)
    if not (place / "model").is_dir():
        return load_checkpoint(model, place, verbose=verbose)
    with tempfile.TemporaryDirectory() as folder:  # FSDP2 wrote parts: they are joined first
        whole = Path(folder) / "model.safetensors"
        write_tensors(whole, dict(whole_tensors(opened(place), "model")))
        return load_checkpoint(model, whole, verbose=verbose)
