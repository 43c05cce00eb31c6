"""Numbers of a run: summed on the device, read once per interval, one JSON object per line of metrics.jsonl."""

import json
import math
import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_fast.train.checkpoint.format import write_atomically, write_error
from beit_fast.train.distributed.world import World


class Interval:
    """Sums since the last line, on the device in fp64, without a host sync until `read`.

    Steps that were skipped (found_inf) count as skipped and add nothing else.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._names: list[str] = []
        self._shared: Tensor | None = None  # [steps, skipped, gradient norm]: the same on every rank
        self._summed: Tensor | None = None  # [loss / world size, sums ...]: to be added over ranks
        self.consecutive_skipped = torch.zeros((), dtype=torch.float64, device=world.device)
        self._longest = torch.zeros_like(self.consecutive_skipped)

    def add(self, loss: Tensor, sums: Mapping[str, Tensor], norm: Tensor, found_inf: Tensor) -> None:
        """One optimizer step: `loss` and `sums` of this rank (totals over its micro-batches)."""
        self._names = list(sums)
        skipped = found_inf.double()
        values = torch.stack([loss.double() / self._world.size, *map(Tensor.double, sums.values())])
        values = torch.where(skipped > 0, torch.zeros_like(values), values)
        shared = torch.stack([torch.ones_like(skipped), skipped, torch.where(skipped > 0, skipped * 0, norm.double())])
        self._summed = values if self._summed is None else self._summed + values
        self._shared = shared if self._shared is None else self._shared + shared
        self.consecutive_skipped = (self.consecutive_skipped + 1) * skipped
        self._longest = torch.maximum(self._longest, self.consecutive_skipped)

    def state(self) -> dict[str, Any]:
        """The sums over all ranks so far, for the checkpoint; waits for the device, and for the other ranks."""
        if self._summed is None or self._shared is None:
            return {"consecutive_skipped": float(self.consecutive_skipped)}
        return {
            "names": self._names,
            "summed": self._world.sum(self._summed.clone()).tolist(),
            "shared": self._shared.tolist(),
            "consecutive_skipped": float(self.consecutive_skipped),
            "longest": float(self._longest),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.consecutive_skipped.fill_(state["consecutive_skipped"])
        if "summed" in state:
            self._names = list(state["names"])
            summed = torch.tensor(state["summed"], dtype=torch.float64, device=self._world.device)
            self._summed = summed if self._world.is_main else torch.zeros_like(summed)
            self._shared = torch.tensor(state["shared"], dtype=torch.float64, device=self._world.device)
            self._longest.fill_(state["longest"])

    def read(self, reset: bool = True) -> dict[str, Any]:
        """Totals since the last reset: steps, skipped, longest_skipped, means of loss and grad_norm, and `sums`."""
        assert self._summed is not None
        assert self._shared is not None
        summed = self._world.sum(self._summed.clone()).tolist()
        steps, skipped, norm, longest = torch.cat([self._shared, self._longest[None]]).tolist()
        if reset:
            self._summed = self._shared = None
            self._longest = torch.zeros_like(self._longest)
        clean = steps - skipped
        return {
            "steps": int(steps),
            "skipped": int(skipped),
            "longest_skipped": int(longest),
            "loss": summed[0] / clean if clean else math.nan,
            "grad_norm": norm / clean if clean else math.nan,
            "sums": dict(zip(self._names, summed[1:], strict=True)),
        }


class MetricsFile:
    """metrics.jsonl, continued at a step: lines beyond it, written before a kill, move to metrics.superseded.jsonl.

    No line is ever deleted; lines of another form stay as they are.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.evaluations: dict[int, Mapping[str, Any]] = {}
        """The evaluations it holds, by their steps."""
        kept: list[bytes] = []
        superseded: list[bytes] = []
        data = path.read_bytes() if path.exists() else b""
        for line in data.splitlines(keepends=True):
            value = parse_line(line)
            torn = value is None and not line.endswith(b"\n")
            beyond = value is not None and _step_in(value) > step
            (superseded if beyond or torn else kept).append(line if line.endswith(b"\n") else line + b"\n")
            if value is not None and not beyond and value.get("kind") == "evaluation":
                self.evaluations[int(_step_in(value))] = value
        if superseded:
            with path.with_name(f"{path.stem}.superseded{path.suffix}").open("ab") as file:
                file.writelines(superseded)
                file.flush()
                os.fsync(file.fileno())
            write_atomically(path, b"".join(kept))
        self._file = path.open("ab")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one object; NaN and infinities become null, which is JSON."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            os.write(self._file.fileno(), json.dumps(clean).encode() + b"\n")
        except OSError as error:
            raise write_error(error, self.path) from error
        if line.get("kind") == "evaluation":
            self.evaluations[int(line["step"])] = line

    def close(self) -> None:
        self._file.close()


def _step_in(value: Mapping[str, Any]) -> float:
    step = value.get("step", 0)
    return step if isinstance(step, (int, float)) and math.isfinite(step) else 0


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object in a line of a metrics file; None where it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_metrics(path: Path) -> Sequence[dict[str, Any]]:
    """The objects of a metrics.jsonl, foreign and torn lines left out. Empty where there is no file."""
    if not path.exists():
        return []
    return [value for line in path.read_bytes().splitlines() if (value := parse_line(line)) is not None]


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far: of the device's allocator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
