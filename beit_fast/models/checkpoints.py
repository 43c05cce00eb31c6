"""Weights of others into our models, with a report of what became of each tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from beit_fast.models.backbone import BeitBackbone
from beit_fast.models.configs import BeitConfig
from beit_fast.models.key_names import to_official
from beit_fast.models.reading import CheckpointError, read_checkpoint
from beit_fast.models.resize import resize_position_embedding, resize_relative_position_bias_table

# What comes and goes with the task: fresh where the file has none, ignored where the model has none.
_TASK_SPECIFIC = (
    "head.", "fc_norm.", "norm.", "lm_head.", "mask_token", "cls_pt_layers.", "fpn1.", "fpn2.", "decode_head.",
    "auxiliary_",
)  # fmt: skip
_SHARED = "rel_pos_bias.relative_position_bias_table"
_TABLE = "relative_position_bias_table"


@dataclass
class LoadReport:
    """What `load_checkpoint` did; every parameter of the model is in exactly one of the first four or in `missing`."""

    source: str
    """The file or folder."""
    loaded: list[str] = field(default_factory=list)
    """Parameters that took the file's tensor as it is."""
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Parameters whose tensor was fitted to another image size or number of channels: its shape and theirs."""
    expanded: list[str] = field(default_factory=list)
    """Tables of single blocks that took the table which all blocks of the file share (resized too, if it had to be)."""
    missing: list[str] = field(default_factory=list)
    """Parameters of the task that the file has not, or of another size; they keep the model's own initial values."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Tensors of the file that went nowhere, by their names there, and why."""
    taken: str = ""
    """Which of the file's sets of weights was taken, where it has averaged ones and others."""
    skipped: list[str] = field(default_factory=list)
    """Classes and functions named in the file, of which nothing was executed."""

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} tensors loaded, {len(self.resized)} resized, {len(self.expanded)} expanded"
        lines = [f"{self.source}: {counts}, {len(self.ignored)} ignored, {len(self.missing)} left as initialised"]
        if self.taken:
            lines.append(f"  taken: {self.taken}")
        if self.skipped:
            lines.append(f"  skipped, not executed: {', '.join(self.skipped)}")
        if self.missing:
            lines.append(f"  left as initialised: {', '.join(self.missing)}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.ignored.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  ignored ({reason}): {shown}")
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    sha256: str | None = None,
    source_grid: tuple[int, int] | None = None,
    ema: bool = True,
    verbose: bool = True,
) -> LoadReport:
    """Load the weights of a file into a BEiT of this library: all of them, or none and an error.

    Reads what `models.reading.read_checkpoint` reads, under the names of the official code, timm, transformers 4 and 5
    or mmsegmentation. A table that all blocks share is copied to each block where each has its own; tables and position
    embeddings are resized to the model's image size (official spline, bicubic); a patch projection is fitted to another
    number of channels as timm does; a head of another size stays as it was initialised. Parameters keep their identity.

    Args:
        model: `Beit`, `BeitForMaskedImageModeling`, `BeitForSemanticSegmentation` (in the report without `backbone.`),
            or a feature extractor.
        sha256: expected of the file, in hexadecimal.
        source_grid: (h, w), the patches of the images the weights were learned at; only needed where it is not square.
        ema: take the averaged weights where the file has some beside the others, as timm does.
        verbose: print the report.

    Returns:
        A `LoadReport`: the names that were loaded, resized, expanded, ignored, and missing.

    Raises:
        CheckpointError: the file is damaged or hostile, or does not fit; the model is then as it was.

    Examples:
        >>> import tempfile, torch, beit_fast
        >>> from beit_fast.models import load_checkpoint
        >>> model = beit_fast.create_model("beit_tiny_patch16_224", depth=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(model.state_dict(), f"{folder}/weights.pth")
        ...     report = load_checkpoint(model, f"{folder}/weights.pth", verbose=False)
        >>> report.missing
        []
    """
    checkpoint = read_checkpoint(path, sha256=sha256, ema=ema)
    report = load_state_dict(model, checkpoint.tensors, source=str(path), source_grid=source_grid)
    report.taken, report.skipped = checkpoint.taken, checkpoint.skipped
    if verbose:
        print(report)
    return report


def load_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str = "state dict",
    source_grid: tuple[int, int] | None = None,
    verbose: bool = False,
) -> LoadReport:
    """`load_checkpoint` from tensors at hand; arguments and errors as there."""
    whole = model if isinstance(model, BeitBackbone) else getattr(model, "model", model)
    backbone = getattr(whole, "backbone", whole)  # of a segmentation model, which also has heads
    if not isinstance(backbone, BeitBackbone):
        raise CheckpointError(f"model is a {type(model).__name__}; weights can be loaded into a BEiT of beit_fast only")
    try:
        tensors, unknown = to_official(state)
        fit = _Fit(backbone.config, tensors, LoadReport(source), source_grid)
        targets = {name.removeprefix("backbone."): t for name, t in whole.state_dict(keep_vars=True).items()}
        values = {name: fit(name, target) for name, target in targets.items()}
        fit.check_leftovers(unknown)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error.__cause__
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    with torch.no_grad():
        for name, parameter in targets.items():
            value = values[name]
            if value is not None:
                parameter.copy_(value)
    if verbose:
        print(fit.report)
    return fit.report


def fitted_state_dict(model: BeitBackbone, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict in the shapes of the model's; what `model.load_state_dict` takes.

    Raises:
        CheckpointError: one that the model needs is missing or of another architecture.
    """
    fit = _Fit(model.config, to_official(state)[0], LoadReport("state dict"), None)
    values = {name: fit(name, target) for name, target in model.state_dict().items()}
    return {name: value for name, value in values.items() if value is not None}


class _Fit:
    """Finds the value of each parameter among the tensors of a file, and enters it in the report."""

    def __init__(
        self, config: BeitConfig, tensors: dict[str, Tensor], report: LoadReport, source_grid: tuple[int, int] | None
    ) -> None:
        self.config, self.tensors, self.report, self.source_grid = config, tensors, report, source_grid
        self.used: set[str] = set()
        self.shared_only = _SHARED in tensors and not any(n.endswith(f"attn.{_TABLE}") for n in tensors)

    def __call__(self, name: str, target: Tensor) -> Tensor | None:
        """The value of the parameter `name`, or None where it is to stay as it is."""
        source = name
        if name not in self.tensors and name.endswith(f"attn.{_TABLE}") and self.shared_only:
            source = _SHARED
        if source not in self.tensors:
            if name.startswith(_TASK_SPECIFIC):
                self.report.missing.append(name)
                return None
            raise CheckpointError(self._why_missing(name, target))
        self.used.add(source)
        tensor = self.tensors[source]
        if tensor.is_floating_point() != target.is_floating_point():  # batch norms count their batches in integers
            expected = "floating" if target.is_floating_point() else "an integer"
            raise CheckpointError(f"{source!r} is {tensor.dtype}, not {expected}")
        value = self._fitted(source, tensor, target)
        if value is None:
            self.report.ignored[source] = f"its shape {tuple(tensor.shape)} is not the model's {tuple(target.shape)}"
            self.report.missing.append(name)
            return None
        if not torch.isfinite(value.to(target.dtype)).all():
            raise CheckpointError(f"{source!r} holds infinite or undefined numbers: the file is damaged or diverged")
        if source != name:
            self.report.expanded.append(name)
        elif value is tensor:
            self.report.loaded.append(name)
        else:
            self.report.resized[name] = tuple(tensor.shape), tuple(target.shape)
        return value

    def _fitted(self, name: str, tensor: Tensor, target: Tensor) -> Tensor | None:
        """`tensor` in the shape of `target`; None if it belongs to another head."""
        positional = name == "pos_embed" or name.endswith(_TABLE)
        if tensor.shape == target.shape and not (positional and self.source_grid):
            return tensor
        if name.endswith(_TABLE) and tensor.dim() == 2 and tensor.shape[1] == target.shape[1]:
            window = self.source_grid or _square_window(name, tensor.shape[0])
            return resize_relative_position_bias_table(tensor, window, self.config.grid)
        if name == "pos_embed" and tensor.dim() == 3 and tensor.shape[::2] == target.shape[::2]:
            grid = self.source_grid or _square_grid(name, tensor.shape[1] - 1)
            if tensor.shape[1] == grid[0] * grid[1] + 1:
                return resize_position_embedding(tensor, grid, self.config.grid)
        if name == "patch_embed.proj.weight" and tensor.shape == (target.shape[0], 3, *target.shape[2:]):
            return _with_channels(tensor, target.shape[1])
        if (name.startswith(("head.", "lm_head.")) or ".conv_seg." in name) and tensor.shape[1:] == target.shape[1:]:
            return None
        raise CheckpointError(
            f"{name!r} is {tuple(tensor.shape)} in the file and {tuple(target.shape)} in the model: another size"
        )

    def _why_missing(self, name: str, target: Tensor) -> str:
        if name == _SHARED and any(n.endswith(f"attn.{_TABLE}") for n in self.tensors):
            return "the file has a table for each block and the model one for all: build it as a classifier"
        return f"{name!r} {tuple(target.shape)} is not in the file: it holds another architecture, or not all of it"

    def check_leftovers(self, unknown: list[str]) -> None:
        """Enters what no parameter used; tensors of a larger backbone than the model's are an error."""
        for name, tensor in self.tensors.items():
            if name in self.used:
                continue
            if not name.startswith(_TASK_SPECIFIC):
                raise CheckpointError(
                    f"{name!r} {tuple(tensor.shape)} has no place in the model: the file holds another architecture"
                )
            extra = name.startswith("cls_pt_layers.")
            self.report.ignored[name] = "extra head of pre-training" if extra else "belongs to another task"
        for name in unknown:
            index = name.endswith("relative_position_index")
            self.report.ignored[name] = "computed from the image size" if index else "no parameter of a BEiT"


def _square_window(name: str, rows: int) -> tuple[int, int]:
    side = math.isqrt(max(rows - 3, 0))
    if side * side != rows - 3 or side % 2 == 0:
        raise CheckpointError(
            f"{name!r} has {rows} rows, which is no square window: give source_grid=(patches down, patches across)"
        )
    return (side + 1) // 2, (side + 1) // 2


def _square_grid(name: str, patches: int) -> tuple[int, int]:
    side = math.isqrt(patches)
    if side * side != patches:
        raise CheckpointError(
            f"{name!r} has {patches} patches, which is no square: give source_grid=(patches down, patches across)"
        )
    return side, side


def _with_channels(weight: Tensor, channels: int) -> Tensor:
    """A projection of 3 colours for another number of channels, its response to grey kept (timm's rule)."""
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels]
    return repeated * (3 / channels)
