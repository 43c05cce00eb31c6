"""transformers' output of masked image modelling, whose logits are computed when they are first read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput


class _Later:
    """A computation to be done later, under the grad mode and autocast of now, as long as its weights stay."""

    def __init__(self, compute: Callable[[], Tensor], weights: Iterable[Tensor], device: str) -> None:
        self.compute, self.device = compute, device
        self.weights = [(weight, weight._version) for weight in weights if not weight.is_inference()]
        self.grad = torch.is_grad_enabled()
        self.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def __call__(self) -> Tensor:
        if any(weight._version != version for weight, version in self.weights):
            raise RuntimeError(
                "these logits were not read before the weights changed, and computing them now would give others: read "
                "them before the optimizer's step, or undo beit_fast.accelerate with beit_fast.restore"
            )
        enabled, dtype = self.autocast
        with torch.set_grad_enabled(self.grad), torch.autocast(self.device, dtype=dtype, enabled=enabled):
            return self.compute()


@dataclass
class LaterLogits(MaskedLMOutput):
    """A `MaskedLMOutput` in every respect, except that `logits` costs nothing until it is read."""

    @classmethod
    def of(cls, compute: Callable[[], Tensor], weights: Iterable[Tensor], loss: Tensor, **fields: Any) -> LaterLogits:
        """An output with this loss, these fields, and logits to come from `compute` while `weights` are unchanged."""
        return cls(loss=loss, logits=_Later(compute, weights, loss.device.type), **fields)

    def _computed(self) -> Tensor:
        later = self.__dict__["logits"]
        if isinstance(later, _Later):
            self["logits"] = later()
        return self.__dict__["logits"]

    def _store(self, value: Tensor | _Later | None) -> None:
        self.__dict__["logits"] = value

    def __getitem__(self, key: Any) -> Any:
        name = list(self.keys())[key] if isinstance(key, int) else key
        if isinstance(name, str) and name in self.keys():
            return getattr(self, name)
        return super().__getitem__(key)

    def items(self) -> Any:
        self._computed()
        return super().items()

    def values(self) -> Any:
        self._computed()
        return super().values()

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key) if key in self.keys() else default

    def __reduce__(self) -> Any:
        """Copies and pickles are those of transformers' own class."""
        return MaskedLMOutput, (self.loss, self.logits, self.hidden_states, self.attentions)


# Set here, because the decorator would take a property in the body for the default of the field.
LaterLogits.logits = property(LaterLogits._computed, LaterLogits._store)
