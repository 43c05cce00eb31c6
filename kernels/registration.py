"""How an op is called: directly in eager mode, through the dispatcher where a graph is traced.

`torch.library.custom_op` is what `torch.compile`, export and fake tensors need. Its Python costs 0.1 ms a call, which
is as much as an op takes at batch 1 on a CPU, so eager mode runs the same functions without it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def traced(tensor: Tensor) -> bool:
    """Whether a call on this tensor must go through the dispatcher: it is compiled, fake, functional or a subclass."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the GPU of the first argument the current one, which is where Triton launches."""

    @functools.wraps(function)
    def run(first: Tensor, *others: Any) -> Any:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(first, *others)
        with torch.cuda.device(first.device):
            return function(first, *others)

    return run


def plain_op(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `function`, whose annotations give the schema, as beit_fast::`name`, without autograd.

    Args:
        function: its first argument is a tensor.
        fake: gives tensors of the shapes and dtypes of its results.

    Returns:
        what to call.
    """
    function = _on_its_device(function)
    op = torch.library.custom_op(f"beit_fast::{name}", function, mutates_args=())
    op.register_fake(fake)

    def call(first: Tensor, *others: Any) -> Any:
        return op(first, *others) if traced(first) else function(first, *others)

    return call


def differentiable_op(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Registers `function` as beit_fast::`name`, as `plain_op` does, and with a gradient.

    Args:
        setup_context, backward: as of `torch.autograd.Function`; `backward` calls what `plain_op` gave.

    Returns:
        what to call.
    """
    function = _on_its_device(function)
    op = torch.library.custom_op(f"beit_fast::{name}", function, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def once(ctx: Any, *grads: Any) -> Any:
        # torch's own `once_differentiable` complains only where the second pass meets it, and where that one is asked
        # for the gradients of certain tensors it may not: they then come out wrong
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"beit_fast::{name} has no second derivatives (create_graph=True): use_backend('reference') has them"
            )
        return backward(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(once)}
    eager: Any = type(name, (torch.autograd.Function,), members)

    def call(*inputs: Any) -> Any:
        if traced(inputs[0]):
            return op(*inputs)
        if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in inputs):
            return eager.apply(*inputs)
        return function(*inputs)

    return call
