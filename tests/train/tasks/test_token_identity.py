"""What a token cache was made with: every field of the configuration either changes it, or cannot change a token."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from beit_fast.data import ArraySource
from beit_fast.tokenizers import DiscreteVAE
from beit_fast.train.distributed.world import World
from beit_fast.train.tasks import pretrain
from beit_fast.train.tasks.pretrain import MaskedImageModeling, PretrainConfig

CHANGES = {
    # what the tokens of sample i in epoch e of the cycle depend on
    "seed": 1, "data.scale": (0.2, 1.0), "data.ratio": (0.5, 2.0), "data.flip_probability": 0.25, "data.jitter": 0.1,
    "data.value_range": (0.0, 2.0), "data.decoder": "pil", "data.view_cycle": 3, "data.builtin_size": 64,
    "data.one_view": True, "model.image_size": 64, "tokenizer.name": "other", "tokenizer.precision": "bf16",
}  # fmt: skip
IN_THE_SOURCE = {"data.path", "data.builtin_images"}
"""They choose the images: seen through the fingerprint of the source, tested below."""
CHANNELS = {"data.channels"}
"""Needs data of its own: tested below."""
ELSEWHERE = {
    "masking", "objective", "optim", "checkpoint", "log", "evaluation", "average", "ema", "weights", "lora",
    "fine_tuned_weights", "defaults_by_images_seen", "layer_decay", "frozen_blocks",
}  # fmt: skip
"""Groups of what happens after the tokens."""
HARMLESS = {
    "data.cache_dir", "data.normalization", "data.max_bad_share", "data.threads", "data.prefetch", "data.token_cache",
    "data.interpolation", "tokenizer.sha256", "model.patch_size",
}  # fmt: skip
"""Where, how fast and with what checks; the model's normalisation; the patch size changes the number of tokens, which
the store compares itself."""


def base(folder: Path) -> PretrainConfig:
    config = PretrainConfig(output_dir=folder, batch_size=2, batch_per_device=2)
    data = dataclasses.replace(config.data, view_cycle=2, decoder="dali", token_cache=str(folder / "tokens"))
    model = dataclasses.replace(config.model, image_size=32, patch_size=8)
    tokenizer = dataclasses.replace(config.tokenizer, name=str(folder / "base.safetensors"), precision="fp32")
    masking = dataclasses.replace(config.masking, num_masked=6, min_num_patches=2)
    return dataclasses.replace(config, data=data, model=model, tokenizer=tokenizer, masking=masking)


def changed(config, name, value):
    group, _, field = name.rpartition(".")
    if not group:
        return dataclasses.replace(config, **{field: value})
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{field: value})})


def images(count=3):
    return ArraySource(np.zeros((count, 8, 8, 3), np.uint8))


@pytest.fixture
def identity(monkeypatch, tmp_path):
    """Everything that decides whether a store fits: its settings, the number of samples and tokens, the cycle."""
    monkeypatch.setenv("BEIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrain, "open_store", lambda path, tokenizer, *rest: rest[:-1])
    for name, seed in (("base", 0), ("other", 1)):
        torch.manual_seed(seed)
        save_file(DiscreteVAE(20, 4, 8).state_dict(), tmp_path / f"{name}.safetensors")

    def give(config, source=None):
        task = MaskedImageModeling(config)
        masking = task.open_tokenizer(World(0, 1, torch.device("cpu")))
        task.source = source or images()
        return task.open_token_store(task.tokenizer, masking)

    return give


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_token_changes_the_identity(identity, tmp_path, name):
    value = str(tmp_path / "other.safetensors") if name == "tokenizer.name" else CHANGES[name]
    assert identity(changed(base(tmp_path), name, value)) != identity(base(tmp_path))


def test_a_tokenizer_of_the_same_name_and_other_weights(identity, tmp_path):
    before = identity(base(tmp_path))
    shutil.rmtree(tmp_path / "cache" / "hashes")
    (tmp_path / "other.safetensors").replace(tmp_path / "base.safetensors")
    assert identity(base(tmp_path)) != before


def test_other_images(identity, tmp_path):
    assert identity(base(tmp_path), images(4)) != identity(base(tmp_path))


def test_channels_and_depths(identity, tmp_path):
    def of(dtype, channels, value_range=None):
        data = {"path": str(tmp_path), "channels": channels, "value_range": value_range}
        config = base(tmp_path)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
        return identity(config, ArraySource(np.zeros((3, 8, 8, channels), dtype)))

    found = [of("uint8", 1), of("uint16", 1), of("uint16", 3), of("uint16", 1, (0.0, 4095.0))]
    assert all(a != b for number, a in enumerate(found) for b in found[:number])


def test_every_field_is_known_here():
    """A new field must be put on one of the lists, and tested if it changes a token."""
    fields = set()
    for field in dataclasses.fields(PretrainConfig):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if field.name in ("data", "model", "tokenizer"):
            fields |= {f"{field.name}.{inner.name}" for inner in dataclasses.fields(default)}
        elif not dataclasses.is_dataclass(default) or field.name not in ELSEWHERE:
            fields |= {field.name} - ELSEWHERE
    run = {field.name for field in dataclasses.fields(pretrain.RunConfig)} - {"seed"}
    network = {name for name in fields if name.startswith("model.")} - {"model.image_size", "model.patch_size"}
    unknown = fields - set(CHANGES) - CHANNELS - IN_THE_SOURCE - HARMLESS - run - network
    assert not unknown
