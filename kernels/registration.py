"""How an op is registered: a typed function under `fused_op`, with its gradient under the op's `backward`.

`torch.library.custom_op` is what `torch.compile`, export and fake tensors need. Its Python costs 0.1 ms a call, which
is as much as an op takes at batch 1 on a CPU, so eager mode calls the same function without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")
Backward = TypeVar("Backward", bound=Callable[..., Any])


def is_traced(tensor: Tensor) -> bool:
    """Whether a call on this tensor must go through the dispatcher: it is compiled, fake, functional or a subclass."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator that caches a tensor made of plain numbers, made on the CPU as if no mode were on (inference, fake)."""

    @functools.lru_cache(maxsize=16)
    @functools.wraps(function)
    def make(*args: Any) -> Tensor:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return function(*args)

    return make


class FusedOp(Generic[P, R]):
    """A registered op; it is called with positional arguments, the first or else the second of them a tensor."""

    def __init__(self, name: str, function: Callable[P, R], fake: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._name, self._function = name, function
        self._registered = torch.library.custom_op(name, function, mutates_args=())
        self._registered.register_fake(fake)
        self._eager: Any = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args[0] is not None else args[1]
        if torch.compiler.is_compiling() or type(first) not in (Tensor, torch.nn.Parameter):  # as `is_traced`
            return self._registered(*args, **kwargs)
        if self._eager is not None and torch.is_grad_enabled():
            for value in args:
                if isinstance(value, Tensor) and value.requires_grad:
                    return self._eager.apply(*args, **kwargs)
        return self._function(*args, **kwargs)

    def backward(self, setup_context: Callable[..., None]) -> Callable[[Backward], Backward]:
        """Decorator of the function that gives the op its gradient.

        Args:
            setup_context: called with (ctx, inputs, output) after the forward pass, as of `torch.autograd.Function`;
                the decorated function takes (ctx, *grads) and returns one gradient for each input.
        """

        def register(backward: Backward) -> Backward:
            self._registered.register_autograd(backward, setup_context=setup_context)

            def forward(ctx: Any, *inputs: Any) -> Any:
                output = self._function(*inputs)  # type: ignore[call-arg]
                setup_context(ctx, inputs, output)
                return output

            def once(ctx: Any, *grads: Any) -> Any:
                # torch's own `once_differentiable` complains only where the second pass meets it, and where that one
                # is asked for the gradients of certain tensors it may not: they then come out wrong
                if torch.is_grad_enabled():
                    raise RuntimeError(
                        f"{self._name} has no second derivatives (create_graph=True): use_backend('reference') has them"
                    )
                return backward(ctx, *grads)

            members = {"forward": staticmethod(forward), "backward": staticmethod(once)}
            self._eager = type(self._name.split("::")[1], (torch.autograd.Function,), members)
            return backward

        return register


def fused_op(name: str, fake: Callable[..., Any]) -> Callable[[Callable[P, R]], FusedOp[P, R]]:
    """Decorator that registers a function, whose annotations give the schema, as the op `name`.

    Args:
        name: "beit_fast::" and the op's own name.
        fake: takes the same arguments and returns tensors of the shapes and dtypes of the results.
    """
    return lambda function: FusedOp(name, function, fake)
