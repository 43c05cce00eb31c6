"""Pictures of a pre-training run: reconstructions and attention maps of held-out images."""

import json
from pathlib import Path

import torch
from torch import Tensor

from beit_fast.data.pretraining import PretrainBatch
from beit_fast.models import BeitForMaskedImageModeling
from beit_fast.tokenizers import Tokenizer, TokenizerError
from beit_fast.visualize.attention_maps import attention_maps, attention_sheet
from beit_fast.visualize.pictures import displayable
from beit_fast.visualize.reconstructions import reconstruct, reconstruction_sheet

FOLDER = "pictures"
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


def draw(
    run_dir: Path,
    step: int,
    model: BeitForMaskedImageModeling,
    tokenizer: Tokenizer | None,
    batch: PretrainBatch,
    normalization: Normalization,
) -> list[Path]:
    """Writes `pictures/reconstructions_step_<step>.png`, where tokens are predicted and can be decoded, and
    `pictures/attention_step_<step>.png`, the last block's attention from the middle of the first image.
    """
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    paths = []
    with torch.autocast(batch.images.device.type, enabled=False):
        if tokenizer is not None and bool(batch.mask.any()):
            try:
                sheet = reconstruct(model, tokenizer, batch.images, batch.token_images, batch.mask)
            except TokenizerError as error:
                print(f"no reconstructions: {error}", flush=True)
            else:
                paths.append(folder / f"reconstructions_step_{step:08d}.png")
                reconstruction_sheet(sheet).save(paths[-1])
        mean, std = (torch.tensor(v, device=batch.images.device)[:, None, None] for v in normalization)
        paths.append(folder / f"attention_step_{step:08d}.png")
        image = batch.images[0]
        (shown,) = displayable((image * std + mean)[None])
        attention_sheet(shown[0], attention_maps(model, image)).save(paths[-1])
    return paths


def write_histogram(run_dir: Path, counts: Tensor, images: int) -> None:
    """`pictures/token_histogram.json`: how often each token that occurs does on the held-out images, falling."""
    if len(counts) > 1:
        falling = counts[counts > 0].sort(descending=True).values.long().tolist()
        value = {"images": images, "vocab_size": len(counts), "counts": falling}
        (run_dir / FOLDER / "token_histogram.json").write_text(json.dumps(value) + "\n")
