"""A step on the device, recorded once as a CUDA graph and launched as a whole from then on: `--cuda-graph`.

The graph holds forward and backward, the reduction over the ranks, clipping, AdamW, the loss scale and the averaged
weights; the batch and its tokens are copied into the graph's own inputs, the learning rate and the seed are set before
each launch. Unverified on a GPU: on the CPU its parts are tested by recording and repeating the operators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from beit_fast.train.distributed.world import World
from beit_fast.train.schedules import accumulation
from beit_fast.train.task import Task

WARM_UP_STEPS = 3
"""Steps before the recording: they compile kernels and allocate the optimizer's state."""
DDP_WARM_UP_STEPS = 11
"""The same where DDP has buckets to arrange (PyTorch's notes on CUDA graphs)."""


def check_cuda_graph(task: Task, world: World) -> None:
    """ValueError, one line, where a step of this run cannot be recorded."""
    config = task.config
    micro = accumulation(config, world.size)
    local = config.batch_size // world.size
    reasons = {
        f"needs a GPU, and this run is on the {world.device.type}: leave it out": world.device.type != "cuda",
        f"{task.name} cannot be recorded: leave it out": not task.can_capture,
        "works with --parallel ddp only": config.parallel == "fsdp2" and world.size > 1,
        "works with --optim.impl torch only: apex skips bad steps on the host": config.optim.impl == "apex",
        f"records a step of one micro-batch, this one has {micro}: --batch-per-device {local}": micro > 1,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"--cuda-graph {reason}")


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """The learning rates become tensors on the device: a number would be part of the recording."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        group["capturable"] = True


class CudaRecorder:
    """Records and launches on a stream of its own, which DDP has to be built on too (`on_its_stream`)."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def on_its_stream(self) -> Iterator[None]:
        """What is launched inside waits for all before it, and all after it waits for what was launched inside."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Just calls it."""
        with self.on_its_stream():
            return function()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What launches the recording, and its outputs; recording computes nothing.

        The default generator is registered with the graph by torch. Other threads (data, checkpoints, NCCL's watchdog)
        go on calling CUDA meanwhile, so only this thread's calls are restricted.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs


class CapturedStep:
    """Calls `function(inputs)` a few times as it is, then records it and launches the recording.

    Args:
        function: nested tuples, lists and dicts of tensors to the like. What else it changes it changes in place, at
            the same addresses in every call; it never waits for the device.
        device: where all its inputs are.
        warm_up: calls before the recording.
        recorder: `CudaRecorder`, or what does the same elsewhere.
    """

    def __init__(self, function: Callable[[Any], Any], device: torch.device, warm_up: int, recorder: Any) -> None:
        self.function, self.device, self.recorder = function, device, recorder
        self.left = warm_up
        self._inputs: list[Any] = []
        self._form: Any = None
        self._launch: Callable[[], None] | None = None
        self._outputs: Any = None

    def __call__(self, inputs: Any) -> Any:
        """Fresh copies of the outputs. ValueError where the inputs are not of the shapes and values recorded."""
        self._take(inputs)
        if self.left > 0:
            self.left -= 1
            return self.recorder.warm_up(self._call)
        if self._launch is None:
            self._launch, self._outputs = self.recorder.record(self._call)
        self._launch()
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self._outputs)

    def _call(self) -> Any:
        return self.function(tree_unflatten(self._inputs, self._form))

    def _take(self, inputs: Any) -> None:
        """Copy the inputs to where the recording reads them."""
        leaves, form = tree_flatten(inputs)
        if self._form is None:
            self._adopt(leaves)
            self._form = form
        if form != self._form or not all(map(_alike, self._inputs, leaves)):
            raise ValueError(
                f"--cuda-graph: this step's inputs are {_described(leaves)}, those of the steps before it were "
                f"{_described(self._inputs)}; leave out --cuda-graph where they change"
            )
        for kept, leaf in zip(self._inputs, leaves, strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(leaf, non_blocking=True)

    def _adopt(self, leaves: list[Any]) -> None:
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, int, float, bool, str, type(None))):
                raise TypeError(
                    f"--cuda-graph: a step's inputs hold a {type(leaf).__name__}, in which no tensors can be found"
                )
            if isinstance(leaf, Tensor) and leaf.device != self.device:
                raise ValueError(f"--cuda-graph: an input is on {leaf.device}, the step runs on {self.device}")
        self._inputs = [torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _alike(kept: Any, given: Any) -> bool:
    """Tensors of one shape and dtype; anything else, which the recording holds as it was, the same value."""
    if isinstance(kept, Tensor) and isinstance(given, Tensor):
        return kept.shape == given.shape and kept.dtype == given.dtype
    return type(kept) is type(given) and bool(kept == given)


def _described(leaves: list[Any]) -> str:
    return ", ".join(f"{tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
