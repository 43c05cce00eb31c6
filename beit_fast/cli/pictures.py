"""`python -m beit_fast` report, compare, visualize and tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from beit_fast.cli.predict import read_view, split_words
from beit_fast.cli.train import fail, parse
from beit_fast.data.loader import NORMALIZATION, Request
from beit_fast.data.screening import TooManyBadImages
from beit_fast.models import Beit, BeitForMaskedImageModeling
from beit_fast.models.backbone import BeitBackbone
from beit_fast.models.checkpoints import load_checkpoint
from beit_fast.models.reading import read_state_dict
from beit_fast.tokenizers import load_tokenizer
from beit_fast.train.config import from_plain
from beit_fast.train.distributed.world import World, resolve_device
from beit_fast.train.evaluation.classifiers import architecture_of, open_classifier
from beit_fast.train.tasks.pretrain import MaskedImageModeling, PretrainConfig
from beit_fast.train.tasks.tokenizer import held_out_images, measure
from beit_fast.train.tasks.weights import load_weights, resolve_weights
from beit_fast.visualize import pictures
from beit_fast.visualize.attention_maps import MASS, attention_maps, attention_sheet, save_attention
from beit_fast.visualize.reconstructions import Reconstructions, guesses, reconstruct, reconstruction_sheet
from beit_fast.visualize.run_report import write_comparison, write_report

USER_ERRORS = (ValueError, OSError, ModuleNotFoundError, TooManyBadImages)


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Curves of several runs over each other."""

    output: Path = Path("comparison.html")
    """The page to write."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """What a pre-trained model makes of masked, held-out images: visualize reconstructions RUN."""

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
    """What a patch attends to: visualize attention CHECKPOINT IMAGE..., a run, or any file or folder with a BEiT."""

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
    """What the codes of a tokenizer look like: visualize codes TOKENIZER."""

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
    """Visual tokens of images: tokens IMAGE..."""

    tokenizer: str = "demo"
    """demo, dalle, or the path of a tokenizer."""
    size: int = 112
    """Pixels of the central square that is cut into tokens; a multiple of the tokenizer's stride."""
    output_dir: Path = Path("tokens")
    """Where to write a picture per image: original, tokens as colours, decoding."""


def report_command(arguments: Sequence[str]) -> int:
    """`report RUN`: writes its report.html."""
    if len(arguments) != 1:
        fail("report takes one run folder: python -m beit_fast report RUN", code=2)
    try:
        print(write_report(Path(arguments[0])))
    except USER_ERRORS as error:
        fail(str(error), code=1)
    return 0


def compare_command(arguments: Sequence[str]) -> int:
    """`compare RUN... [--output FILE]`: one page for several runs."""
    places, options = split_words(arguments)
    chosen: CompareOptions = parse(CompareOptions(), options)  # type: ignore[type-var]
    if len(places) < 2:
        fail("compare takes two run folders or more: python -m beit_fast compare RUN RUN", code=2)
    try:
        print(write_comparison([Path(place) for place in places], chosen.output))
    except USER_ERRORS as error:
        fail(str(error), code=1)
    return 0


def visualize_command(arguments: Sequence[str]) -> int:
    """`visualize reconstructions RUN`, `visualize attention CHECKPOINT IMAGE...`, `visualize codes TOKENIZER`."""
    places, options = split_words(arguments)
    kind, places = (places[0], places[1:]) if places else ("", [])
    try:
        if kind == "reconstructions":
            chosen: ReconstructionOptions = parse(ReconstructionOptions(), options)  # type: ignore[type-var]
            if len(places) == 1:
                return _reconstructions(Path(places[0]), chosen)
        elif kind == "attention":
            looking: AttentionOptions = parse(AttentionOptions(), options)  # type: ignore[type-var]
            if len(places) >= 2:
                return _attention(places[0], places[1:], looking)
        elif kind == "codes":
            coding: CodesOptions = parse(CodesOptions(), options)  # type: ignore[type-var]
            if len(places) == 1:
                return _codes(places[0], coding)
    except USER_ERRORS as error:
        fail(str(error), code=1)
    fail(f"{(visualize_command.__doc__ or '').replace('`', '')}", code=2)


def tokens_command(arguments: Sequence[str]) -> int:
    """`tokens IMAGE...`: prints the grid of tokens, draws it beside the image and its decoding."""
    places, options = split_words(arguments)
    chosen: TokensOptions = parse(TokensOptions(), options)  # type: ignore[type-var]
    if not places:
        fail("tokens takes images: python -m beit_fast tokens IMAGE...", code=2)
    try:
        tokenizer = load_tokenizer(chosen.tokenizer, decoder=True)
        for place in places:
            image = _image(place, chosen.size)
            ids = tokenizer.encode(image[None])
            print(f"{place}: {ids.shape[1]} x {ids.shape[2]} tokens of {tokenizer.vocab_size} ({chosen.tokenizer})")
            print("\n".join(" ".join(f"{token:5d}" for token in row) for row in ids[0].tolist()))
            row = [image, pictures.labels(ids[0], tokenizer.stride), tokenizer.decode(ids)[0]]
            page = pictures.sheet([row], columns=["image", "tokens", "decoded"])
            chosen.output_dir.mkdir(parents=True, exist_ok=True)
            path = chosen.output_dir / f"{Path(place).stem}_tokens.png"
            page.save(path)
            print(f"wrote {path}")
    except USER_ERRORS as error:
        fail(str(error), code=1)
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


def _attention(checkpoint: str, images: Sequence[str], options: AttentionOptions) -> int:
    model, mean, std = open_backbone(checkpoint, options.device)
    device = next(model.parameters()).device
    size = options.image_size or model.config.image_hw[0]
    if size % model.config.patch_size:
        raise ValueError(f"--image-size must be a multiple of {model.config.patch_size}, got {size}")
    for name in images:
        image = _image(name, size).to(device)
        normalised = (image - mean) / std
        found = attention_maps(model, normalised, options.query, options.block, options.mass)
        folder = options.output_dir / Path(name).stem
        save_attention(folder, image, found)
        attention_sheet(image, found).save(folder / "sheet.png")
        print(
            f"wrote {folder}, patch {found.query} of {'x'.join(map(str, found.maps.shape[1:]))}, block {options.block}"
        )
    return 0


def open_backbone(checkpoint: str, device: str) -> tuple[BeitBackbone, Tensor, Tensor]:
    """A BEiT whoever saved it, in pre-training, as a classifier or without a head, and the mean and the deviation
    (3, 1, 1) of its pixels.

    ValueError where there is none.
    """
    root, place = Path(checkpoint), resolve_device(device)
    model: BeitBackbone
    pretraining = _saved_pretraining(root)
    mean, std = NORMALIZATION["half"]
    if pretraining is not None:
        mean, std = NORMALIZATION[pretraining.data.normalization]
        _, model = open_pretraining(root, device)
    else:
        try:
            classifier = open_classifier(root)
            model, mean, std = classifier.model, classifier.mean[:3], classifier.std[:3]  # type: ignore[assignment]
        except ValueError:
            weights = resolve_weights(root)
            model = Beit(architecture_of(read_state_dict(weights), checkpoint, classifier=False))
            load_checkpoint(model, weights)
    centre, spread = (torch.tensor(values, device=place)[:, None, None] for values in (mean, std))
    return model.to(place).eval(), centre, spread


def _codes(name: str, options: CodesOptions) -> int:
    tokenizer = load_tokenizer(name, decoder=True)
    images = held_out_images(options.images, options.size)
    found = measure(tokenizer, images)
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
    except (OSError, ValueError):
        return None
    if not isinstance(saved, dict) or saved.get("task") != MaskedImageModeling.name:
        return None
    return from_plain(PretrainConfig, saved["config"])


def _image(place: str, size: int) -> Tensor:
    """The central square (3, S, S) in [0, 1]; ValueError with the reason where it cannot be read."""
    view = read_view(Path(place), size, 1.0)
    if isinstance(view, str):
        raise ValueError(f"{place}: {view}")
    return view
