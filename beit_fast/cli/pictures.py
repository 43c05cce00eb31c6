"""`beit-fast report`, `compare`, `visualize` and `tokens`: runs, models and tokenizers as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from tyro.conf import Positional, arg

from beit_fast.cli.options import errors_in_one_line, fail, output_names, parse
from beit_fast.cli.predict import read_view
from beit_fast.data.arrays.statistics import normalization_of
from beit_fast.data.loader import Request
from beit_fast.models import Beit, BeitForMaskedImageModeling
from beit_fast.models.backbone import BeitBackbone
from beit_fast.models.checkpoints import load_checkpoint
from beit_fast.models.reading import read_state_dict
from beit_fast.tokenizers import load_tokenizer
from beit_fast.train.config import from_plain
from beit_fast.train.distributed.world import World, resolve_device
from beit_fast.train.evaluation.classifiers import architecture_of, open_classifier
from beit_fast.train.tasks.pretrain import MaskedImageModeling, PretrainConfig
from beit_fast.train.tasks.tokenizer import held_out_images, reconstruction_metrics
from beit_fast.train.tasks.weights import load_weights, resolve_weights
from beit_fast.visualize import pictures
from beit_fast.visualize.attention_maps import MASS, attention_maps, attention_sheet, save_attention
from beit_fast.visualize.reconstructions import Reconstructions, guesses, reconstruct, reconstruction_sheet
from beit_fast.visualize.run_report import write_comparison, write_report


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write the report.html of a run folder, finished or not."""

    run: Annotated[Positional[Path | None], arg(metavar="RUN")] = None
    """The run folder."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The curves of several runs on one page."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")] = ()
    """Run folders."""
    output: Path = Path("comparison.html")
    """The page to write."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """What a pre-trained model makes of masked, held-out images."""

    run: Annotated[Positional[Path | None], arg(metavar="RUN")] = None
    """A run of pre-training."""
    images: int = 200
    """Held-out images to measure on: those of the run's evaluation, or of --path, or built-in ones."""
    pictures: int = 8
    """The first of them are drawn."""
    path: str | None = None
    """Folder or shards of images that the run was not trained on."""
    output: Path = Path("reconstructions.png")
    """The picture to write."""
    cache_dir: str | None = None
    """Where built-in images are kept."""
    seed: int = 0
    """Of the random tokens to compare with."""
    device: str = "auto"
    """`auto`: cuda where there is one, else cpu."""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What a patch attends to."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = ""
    """A run, or any file or folder with a BEiT."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE")] = ()
    """Image files."""
    query: tuple[int, int] | None = None
    """Row and column of the patch that looks; None takes the middle one."""
    block: int = -1
    """Block to look into, negative from the end."""
    image_size: int | None = None
    """Pixels, a multiple of the patch; position parameters are resized. None: the model's own size."""
    mass: float = MASS
    """Share of the attention that the masks keep."""
    output_dir: Path = Path("attention")
    """Where to write a sheet per image, and a folder with the single pictures."""
    device: str = "auto"
    """`auto`: cuda where there is one, else cpu."""


@dataclass(frozen=True, kw_only=True)
class CodesOptions:
    """What the codes of a tokenizer look like."""

    tokenizer: Annotated[Positional[str], arg(metavar="TOKENIZER")] = ""
    """demo, dalle, or the path of a tokenizer."""
    count: int = 256
    """The most frequent codes on built-in images to draw."""
    images: int = 100
    """Built-in images to count and measure on."""
    size: int = 64
    """Their side in pixels."""
    output: Path = Path("codes.png")
    """The picture to write: every code decoded on its own, falling frequency."""


@dataclass(frozen=True, kw_only=True)
class TokensOptions:
    """The visual tokens of images: printed as a grid, drawn as colours, decoded."""

    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE")] = ()
    """Image files."""
    tokenizer: str = "demo"
    """demo, dalle, or the path of a tokenizer."""
    size: int = 112
    """Pixels of the central square that is cut into tokens; a multiple of the tokenizer's stride."""
    output_dir: Path = Path("tokens")
    """Where to write a picture per image: original, tokens as colours, decoding."""


def report_command(arguments: Sequence[str]) -> int:
    """Write the report.html of a run."""
    chosen = parse(ReportOptions(), arguments, "beit-fast report")
    if chosen.run is None:
        fail("report takes one run folder: beit-fast report RUN", code=2)
    with errors_in_one_line():
        print(write_report(chosen.run))
    return 0


def compare_command(arguments: Sequence[str]) -> int:
    """Write one page for several runs."""
    chosen = parse(CompareOptions(), arguments, "beit-fast compare")
    if len(chosen.runs) < 2:
        fail("compare takes two run folders or more: beit-fast compare RUN RUN", code=2)
    with errors_in_one_line():
        print(write_comparison(chosen.runs, chosen.output))
    return 0


def visualize_command(arguments: Sequence[str]) -> int:
    """Draw reconstructions, attention or codes."""
    kind, options = (arguments[0], arguments[1:]) if arguments else ("", ())
    program = f"beit-fast visualize {kind}"
    with errors_in_one_line():
        if kind == "reconstructions":
            reconstruction = parse(ReconstructionOptions(), options, program)
            if reconstruction.run is not None:
                return _reconstructions(reconstruction.run, reconstruction)
        elif kind == "attention":
            attention = parse(AttentionOptions(), options, program)
            if attention.images:
                return _attention(attention)
        elif kind == "codes":
            codes = parse(CodesOptions(), options, program)
            if codes.tokenizer:
                return _codes(codes.tokenizer, codes)
    fail("visualize reconstructions RUN, visualize attention CHECKPOINT IMAGE..., visualize codes TOKENIZER", code=2)


def tokens_command(arguments: Sequence[str]) -> int:
    """Print the grid of tokens of each image, and draw it between the image and its decoding."""
    chosen = parse(TokensOptions(), arguments, "beit-fast tokens")
    if not chosen.images:
        fail("tokens takes images: beit-fast tokens IMAGE...", code=2)
    with errors_in_one_line():
        tokenizer = load_tokenizer(chosen.tokenizer, decoder=True)
        for source, name in zip(chosen.images, output_names(chosen.images), strict=True):
            image = _image(source, chosen.size)
            ids = tokenizer.encode(image[None])
            print(f"{source}: {ids.shape[1]} x {ids.shape[2]} tokens of {tokenizer.vocab_size} ({chosen.tokenizer})")
            print("\n".join(" ".join(f"{token:5d}" for token in row) for row in ids[0].tolist()))
            row = [image, pictures.labels(ids[0], tokenizer.stride), tokenizer.decode(ids)[0]]
            page = pictures.sheet([row], columns=["image", "tokens", "decoded"])
            chosen.output_dir.mkdir(parents=True, exist_ok=True)
            path = chosen.output_dir / f"{name}_tokens.png"
            page.save(path)
            print(f"wrote {path}")
    return 0


def open_pretraining(
    run: Path, device: str, images: int = 0, path: str | None = None, cache_dir: str | None = None
) -> tuple[MaskedImageModeling, BeitForMaskedImageModeling]:
    """The task of a pre-training run, with tokenizer and held-out views, and its model at its newest checkpoint.

    ValueError where the folder holds none.
    """
    config = _saved_pretraining(run)
    if config is None:
        raise ValueError(f"{run} is not a run folder of pre-training")
    held_out = replace(config.evaluation, images=max(images, 1), path=path or config.evaluation.path)
    data = replace(config.data, cache_dir=cache_dir or config.data.cache_dir, threads=1)
    task = MaskedImageModeling(replace(config, evaluation=held_out, data=data))
    masking = task.open_tokenizer(World(0, 1, resolve_device(device)), decoder=True)
    if images:
        task.held_out = task.open_held_out(masking)
    model = BeitForMaskedImageModeling(task.architecture())
    load_weights(model, run, verbose=False)
    return task, model.to(task.world.device).eval()


def _reconstructions(run: Path, options: ReconstructionOptions) -> int:
    task, model = open_pretraining(run, options.device, max(options.images, 1), options.path, options.cache_dir)
    try:
        assert task.held_out is not None
        if task.tokenizer is None:
            raise ValueError(f"{run} predicts pixels; only predicted tokens can be decoded")
        count = min(options.images, len(task.held_out.source))
        parts: list[Reconstructions] = []
        for part in np.array_split(np.arange(count, dtype=np.int64), max(1, -(-count // 32))):
            batch = next(iter(task.held_out.batches([Request(0, part)])))
            parts.append(reconstruct(model, task.tokenizer, batch.images, batch.token_images, batch.mask))
        drawn = Reconstructions(*(torch.cat(values)[: options.pictures] for values in zip(*parts, strict=True)))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        reconstruction_sheet(drawn).save(options.output)
        print(f"masked patches of {count} held-out images, mean absolute error of pixels in [0, 1] and right tokens:")
        for name, guess in guesses(parts, task.tokenizer, options.seed).items():
            print(f"  {name + ' tokens':17s} {guess.mean_absolute_error:.4f}  {100 * guess.accuracy:6.2f} %")
        print(f"wrote {options.output}")
    finally:
        task.close()
    return 0


def _attention(options: AttentionOptions) -> int:
    model, mean, std = open_backbone(options.checkpoint, options.device)
    device = next(model.parameters()).device
    size = options.image_size or model.config.image_hw[0]
    if model.config.in_chans != 3:
        raise ValueError(
            f"{options.checkpoint} sees {model.config.in_chans} channels; attention is drawn for RGB models"
        )
    if size % model.config.patch_size:
        raise ValueError(f"--image-size must be a multiple of {model.config.patch_size}, got {size}")
    for path, name in zip(options.images, output_names(options.images), strict=True):
        image = _image(path, size).to(device)
        maps = attention_maps(model, (image - mean) / std, options.query, options.block, options.mass)
        folder = options.output_dir / name
        save_attention(folder, image, maps)
        attention_sheet(image, maps).save(folder / "sheet.png")
        print(f"wrote {folder}, patch {maps.query} of {'x'.join(map(str, maps.maps.shape[1:]))}, block {options.block}")
    return 0


def open_backbone(checkpoint: str, device: str) -> tuple[BeitBackbone, Tensor, Tensor]:
    """A BEiT from any supported checkpoint, with or without a head, and the mean and the deviation
    (C, 1, 1) of its pixels.

    ValueError where there is none.
    """
    root, place = Path(checkpoint), resolve_device(device)
    model: BeitBackbone
    pretraining = _saved_pretraining(root)
    mean, std = normalization_of("half")
    if pretraining is not None:
        mean, std = pretraining.data.mean_and_std()
        _, model = open_pretraining(root, device)
    else:
        try:
            classifier = open_classifier(root)
            model, mean, std = classifier.model, classifier.mean, classifier.std
        except ValueError:
            weights = resolve_weights(root)
            model = Beit(architecture_of(read_state_dict(weights), checkpoint, classifier=False))
            load_checkpoint(model, weights)
    centre, spread = (torch.tensor(values, device=place)[:, None, None] for values in (mean, std))
    return model.to(place).eval(), centre, spread


def _codes(name: str, options: CodesOptions) -> int:
    tokenizer = load_tokenizer(name, decoder=True)
    images = held_out_images(options.images, options.size)
    found = reconstruction_metrics(tokenizer, images)
    ids = torch.cat([tokenizer.encode(part) for part in images.split(32)])
    counts = torch.bincount(ids.flatten(), minlength=tokenizer.vocab_size)
    order = counts.argsort(descending=True)[: min(options.count, int((counts > 0).sum()))]
    alone = tokenizer.decode(order[:, None, None].expand(-1, 3, 3).contiguous())
    stride = tokenizer.stride
    middle = alone[:, :, stride : 2 * stride, stride : 2 * stride]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    large = middle.repeat_interleave(3, 2).repeat_interleave(3, 3)
    pictures.mosaic(large, 32).save(options.output)
    print(
        f"{name}: mean absolute error {found['mae']:.4f} ({found['psnr_db']:.2f} dB), perplexity "
        f"{found['perplexity']:.0f}, {found['used_codes']:.0f} codes used on {options.images} built-in images of "
        f"{options.size} pixels\nwrote {options.output}"
    )
    return 0


def _saved_pretraining(run: Path) -> PretrainConfig | None:
    """The configuration of a pre-training run; None where the folder is none."""
    try:
        saved = json.loads((run / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(saved, dict) or saved.get("task") != MaskedImageModeling.name:
        return None
    return from_plain(PretrainConfig, saved["config"])


def _image(path: Path, size: int) -> Tensor:
    """The central square (3, S, S) in [0, 1]; ValueError with the reason where it cannot be read."""
    view = read_view(path, size, 1.0)
    if isinstance(view, str):
        raise ValueError(f"{path}: {view}")
    return view
