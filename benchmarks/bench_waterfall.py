"""Where the time goes: the official style of the pre-training step, with one technique of beit_fast more in each row.

    pytest benchmarks/bench_waterfall.py --benchmark-only

All rows are measured in the same rounds; the gain of a technique is the ratio of its row to the row before. Beside the
speed stands the error of loss and gradient against float64, on one image. The step is forward, backward, clipping and
AdamW; no tokenizer.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.baselines.official_style import TECHNIQUES, OfficialStep, OfficialStyle, trainable
from benchmarks.harness import Comparison, Implementation, ratio_of
from benchmarks.models import (
    LEARNING_RATE,
    ModelCase,
    OfficialForwardBackward,
    forward_flops,
    make_batch,
    make_model,
    model_cases,
)

NAMES = ["official style", *(f"+ {name}" for name in TECHNIQUES)]


def cases(scale: Any) -> dict[str, ModelCase]:
    return model_cases(
        scale, tiny=[("tiny", "plus", 32, 1)], cpu=[("base", "plus", 224, 1)], gpu=[("base", "plus", 224, 256)]
    )


def compare(case: ModelCase) -> Comparison:
    config, device = case.config, case.device
    state = {name: tensor.clone() for name, tensor in make_model(config, device).state_dict().items()}
    batch = make_batch(config, case.batch_size, device)

    def gradients(techniques: tuple[str, ...], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        step = OfficialForwardBackward(config, state, batch.first(1), dtype, techniques=techniques)
        return step(), {name: p.grad for name, p in step.weights.items() if p.grad is not None}

    exact_loss, exact = gradients((), torch.float64)

    def errors(techniques: tuple[str, ...]) -> dict[str, float]:
        """Of the loss, and relative (Frobenius) of the whole gradient and of its worst tensor."""
        loss, found = gradients(techniques, case.dtype)
        off = {name: float((found[name].double() - exact[name]).norm()) for name in exact}
        size = {name: float(exact[name].norm()) for name in exact}
        whole = sum(value**2 for value in off.values()) ** 0.5 / sum(value**2 for value in size.values()) ** 0.5
        return {"loss_error": abs(float(loss) / float(exact_loss) - 1), "gradient_error": whole,
                "worst_tensor_error": max(off[n] / size[n] for n in exact if size[n] > 0)}  # fmt: skip

    def rung(number: int) -> Implementation:
        used = tuple(TECHNIQUES)[:number]
        step = OfficialStep(OfficialStyle(config, trainable(state), used), LEARNING_RATE, dtype=case.dtype)
        info = {"errors": errors(used), "rung": number}
        return Implementation(lambda: step(batch.images, batch.mask, batch.labels), info=info)

    masked = batch.labels.shape[0] // case.batch_size
    return Comparison(
        group=f"waterfall, whole step without tokenizer: {case.what}",
        implementations={name: lambda number=number: rung(number) for number, name in enumerate(NAMES)},  # type: ignore[misc]
        shapes={"B": case.batch_size, "N": config.num_patches + 1, "depth": config.depth}, dtype=case.scale.dtype,
        images=case.batch_size, flops=3 * case.batch_size * forward_flops(config, masked),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_waterfall(interleaved, benchmark, case, name):
    measured = interleaved(case, lambda: compare(case), name, 30.0)
    number = NAMES.index(name)
    if number:
        times = [measured.seconds[one] for one in (NAMES[number - 1], name, NAMES[0])]
        gain, so_far = ratio_of(times[0], times[1]), ratio_of(times[2], times[1])
        benchmark.extra_info["gain"] = gain._asdict() | {"what": TECHNIQUES[name.removeprefix("+ ")]}
        benchmark.extra_info["gain_so_far"] = so_far.median
