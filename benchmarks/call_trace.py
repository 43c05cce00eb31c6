"""How much code one call runs through: own files, functions and calls of one thread, counted with sys.setprofile.

    python -m benchmarks.call_trace               # a warm forward pass, timm's beside it, and one pre-training step
    python -m benchmarks.call_trace --list step   # and the functions that were entered, by file

The forward pass is the second of a two-block classifier under inference mode. The step is the third of the tiny
pre-training recipe at depth 4: from asking for its batch to asking for the next one, as the main thread sees it.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

MODEL = "beit_base_patch16_224"
SHAPE: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
TARGETS = {"forward": (17, 40, 120), "step": (36, 130, 650)}
"""Files, functions and calls at most."""


class Trace:
    """Calls of the functions of one package, by (file, line of the function, name)."""

    def __init__(self, package: str) -> None:
        root = Path(sys.modules[package].__file__ or "").resolve().parent
        self.roots = (f"{root}/", f"{(root / 'kernels').resolve()}/")  # ours is reached through a symlink
        self.calls: Counter[tuple[str, int, str]] = Counter()
        self.files: dict[str, str | None] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            sys.setprofile(None)

    def start(self) -> None:
        sys.setprofile(self._event)

    def _event(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            code = frame.f_code
            if code.co_filename not in self.files:
                path = str(Path(code.co_filename).resolve())
                self.files[code.co_filename] = path if path.startswith(self.roots) else None
            if path := self.files[code.co_filename]:
                self.calls[path, code.co_firstlineno, code.co_qualname] += 1

    def totals(self) -> tuple[int, int, int]:
        """Files, functions, calls."""
        return len({path for path, _, _ in self.calls}), len(self.calls), sum(self.calls.values())

    def listing(self) -> str:
        lines: list[str] = []
        for path in sorted({path for path, _, _ in self.calls}):
            lines.append(path)
            entries = sorted((line, name, n) for (of, line, name), n in self.calls.items() if of == path)
            lines += [f"  {n:5d}  {name} ({line})" for line, name, n in entries]
        return "\n".join(lines)


def trace_forward(package: str, create_model: Callable[..., torch.nn.Module]) -> Trace:
    """The second forward pass of a small classifier."""
    model = create_model(MODEL, **SHAPE).eval()
    images = torch.zeros(1, 3, 224, 224)
    trace = Trace(package)
    with torch.inference_mode():
        model(images)
        with trace.recording():
            model(images)
    return trace


def trace_step() -> Trace:
    """The third step of the tiny pre-training recipe."""
    from beit_fast.train import engine
    from beit_fast.train.tasks.pretrain import MaskedImageModeling
    from recipes.pretrain_tiny_builtin import config

    trace = Trace("beit_fast")

    class Traced(MaskedImageModeling):
        def batches(self, requests: Iterator[Any]) -> Iterator[Any]:
            batches = iter(super().batches(requests))
            for number in range(1, 100):
                sys.setprofile(None)  # asked for the batch after the traced one
                if number == 3:
                    trace.start()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                yield batch

    with tempfile.TemporaryDirectory() as folder:
        small = dataclasses.replace(
            config, output_dir=Path(folder) / "run", max_steps=5, device="cpu",
            data=dataclasses.replace(config.data, builtin_images=256),
            evaluation=dataclasses.replace(config.evaluation, images=8),
            log=dataclasses.replace(config.log, progress="none")
        )  # fmt: skip
        engine.run(Traced(small))
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", choices=("forward", "timm", "step"), help="name the functions of this one, too")
    wanted = parser.parse_args().list
    make_torchvision_importable()
    import timm

    import beit_fast

    traces = {"forward": trace_forward("beit_fast", beit_fast.create_model)}
    traces["timm"] = trace_forward("timm", timm.create_model)
    traces["step"] = trace_step()
    for name, trace in traces.items():
        files, functions, calls = trace.totals()
        limit = " / ".join(map(str, TARGETS[name])) if name in TARGETS else "-"
        print(f"{name:8s} {files:3d} files {functions:4d} functions {calls:5d} calls   (at most {limit})")
    if wanted:
        print(traces[wanted].listing())


if __name__ == "__main__":
    main()
