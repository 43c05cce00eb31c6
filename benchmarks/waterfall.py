"""One rung of the waterfall, in a process of its own: the pre-training step with k techniques beside that with k - 1.

    python -m benchmarks.waterfall --techniques patches,attention --size base --depth 4 --batch-size 4

Prints one JSON object: seconds of the two in turns, peak memory, and the errors of loss and gradients against float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from beit_fast import BeitConfig
from benchmarks.baselines.official_style import TECHNIQUES, OfficialStep, OfficialStyle, trainable
from benchmarks.harness import OURS, Comparison, Measured, Rival, measure
from benchmarks.mim_batches import MimBatch, forward_flops, make_batch, make_model

LEARNING_RATE = 1e-6


def gradients(
    config: BeitConfig, state: dict[str, Tensor], batch: MimBatch, techniques: tuple[str, ...], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one forward and backward pass; float64 runs everything in it."""
    wide = dtype == torch.float64
    if wide:
        state = {n: t.double() if t.is_floating_point() else t for n, t in state.items()}
        batch = dataclasses.replace(batch, images=batch.images.double())
    weights = trainable(state)
    step = OfficialStep(OfficialStyle(config, weights, techniques), dtype=torch.float32 if wide else dtype)
    loss, _ = step.forward_backward(batch.images, batch.mask, batch.labels)
    return loss, {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def errors_against_float64(
    config: BeitConfig, state: dict[str, Tensor], techniques: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Of the loss, and relative (Frobenius) of the whole gradient and of its worst tensor; one image."""
    batch = make_batch(config, 1, device)
    exact_loss, exact = gradients(config, state, batch, (), torch.float64)
    loss, found = gradients(config, state, batch, techniques, dtype)
    difference = {name: float((found[name].double() - exact[name]).norm()) for name in exact}
    size = {name: float(exact[name].norm()) for name in exact}
    total = sum(value**2 for value in difference.values()) ** 0.5 / sum(value**2 for value in size.values()) ** 0.5
    return {
        "loss_error": abs(float(loss) - float(exact_loss)) / abs(float(exact_loss)),
        "gradient_error": total,
        "worst_tensor_error": max(difference[n] / size[n] for n in exact if size[n] > 0),
    }


def rung(
    config: BeitConfig,
    techniques: tuple[str, ...],
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    **how: Any,
) -> tuple[Measured, dict[str, float]]:
    """The step with `techniques`, in turns with the step without the last of them."""
    model = make_model(config, device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del model
    batch = make_batch(config, batch_size, device)
    errors = errors_against_float64(config, state, techniques, dtype, device)

    def step(used: tuple[str, ...]) -> Rival:
        made = OfficialStep(OfficialStyle(config, trainable(state), used), LEARNING_RATE, dtype=dtype)
        return Rival(lambda: made(batch.images, batch.mask, batch.labels))

    rivals = {OURS: lambda: step(techniques)}
    if techniques:
        rivals["before"] = lambda: step(techniques[:-1])
    comparison = Comparison(
        "waterfall",
        rivals,
        {"B": batch_size, "N": config.num_patches + 1},
        str(dtype).removeprefix("torch."),
        flops=3 * batch_size * forward_flops(config, batch.labels.shape[0] // batch_size),
        images=batch_size,
    )
    return measure(comparison, device, **how), errors


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--techniques", default="", help=f"comma-separated, of {', '.join(TECHNIQUES)}")
    parser.add_argument("--config", default="{}", help="JSON of BeitConfig's fields")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", default="{}", help="JSON of measure()'s options")
    given = parser.parse_args(arguments)
    techniques = tuple(filter(None, given.techniques.split(",")))
    measured, errors = rung(
        BeitConfig(**json.loads(given.config)),
        techniques,
        given.batch_size,
        getattr(torch, given.dtype),
        torch.device(given.device),
        **json.loads(given.measure),
    )
    print(
        json.dumps(
            {
                "seconds": measured.seconds,
                "probes": measured.probes,
                "calls": measured.calls,
                "peak_memory_mib": measured.peak_memory_mib,
                "load": measured.load,
                "errors": errors,
            }
        )
    )


if __name__ == "__main__":
    main()
