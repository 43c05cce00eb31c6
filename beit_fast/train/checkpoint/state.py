"""What a checkpoint holds of a run: model, optimizer and averages, as named tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from beit_fast.train.checkpoint.format import Checkpoint
from beit_fast.train.checkpoint.resharding import restore_tensors, saved_names, whole_tensors
from beit_fast.train.distributed.parallel import is_split
from beit_fast.train.optim import empty_optimizer_state, load_optimizer_state, optimizer_state


def files_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None
) -> dict[str, Mapping[str, Tensor]]:
    """The live tensors to save, by file."""
    files: dict[str, Mapping[str, Tensor]] = {"model": model.state_dict(), "optimizer": optimizer_state(optimizer)}
    return files if average is None else files | {"ema": average}


def restore_files(
    found: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None
) -> None:
    """Copy a checkpoint into live tensors, whichever of the two was split over whichever number of ranks.

    Raises ValueError where names or shapes differ, or averages are asked for and there are none.
    """
    restore_tensors(found, "model", model.state_dict(), "the model")
    if is_split(model):
        state = empty_optimizer_state(optimizer, saved_names(found, "optimizer"))
        restore_tensors(found, "optimizer", state, "the optimizer")
    else:
        load_optimizer_state(optimizer, dict(whole_tensors(found, "optimizer")))
    if average is not None:
        if not found.has("ema"):
            raise ValueError(f"{found.path} holds no averaged weights, but --optim.ema-decay asks to continue them")
        restore_tensors(found, "ema", average, "the averaged weights")
