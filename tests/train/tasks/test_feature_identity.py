"""What cached features were made with: every field of a probe's options either changes it, or cannot change them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from beit_fast.data import ArraySource
from beit_fast.data.labelled import LabelledImages
from beit_fast.models import Beit
from beit_fast.train.config import OptimConfig, RunConfig, flat, to_plain
from beit_fast.train.distributed.world import World
from beit_fast.train.precision import DTYPES, precision_of
from beit_fast.train.tasks import probe
from beit_fast.train.tasks.finetune import ClassifierModelConfig
from beit_fast.train.tasks.probe import LinearProbe, ProbeConfig

CHANGES = {
    "features": "mean", "data.normalization": "half", "data.value_range": (0.0, 2.0), "data.crop_share": 0.5,
    "precision": "bf16", "seed": 1, "model.init_std": 0.1, "model.preset": "plus", "model.image_size": 64,
    "model.patch_size": 16, "model.width": 64, "model.depth": 3, "model.num_heads": 4,
    "model.use_abs_pos_emb": False, "model.layer_scale_init": 0.5,
}  # fmt: skip
IN_THE_IMAGES = {
    "data.path", "data.validation_path", "data.num_classes", "data.class_map", "data.builtin", "data.builtin_images",
    "data.builtin_validation_images", "data.builtin_size", "data.builtin_seed",
}  # fmt: skip
"""They choose images and labels, whose fingerprints are in the key: tested below."""
OTHERS = {"data.channels", "weights", "scratch", "model.size"}
"""Channels need images of their own, below; weights are seen as the model's numbers, its size as width and depth."""
HARMLESS = {
    "data.cache_dir", "data.max_bad_share", "data.decoder", "data.threads", "data.prefetch", "data.validate",
    "standardise", "augment", "feature_batch", "model.drop_path_rate", "model.grad_checkpointing",
    "model.global_pool", "model.compile",
}  # fmt: skip
"""What happens after the features, or how fast they are made; decoders agree to rounding; no head is used."""


def images(values=0, labels=(0, 1, 0), channels=3):
    pixels = np.full((len(labels), 40, 40, channels), values, np.uint8)
    return LabelledImages(ArraySource(pixels), np.array(labels), ("a", "b"))


def base(folder):
    model = ClassifierModelConfig(preset="plain", width=32, depth=2, num_heads=2, image_size=32, patch_size=8)
    return ProbeConfig(
        output_dir=folder, scratch=True, augment=False, model=model, device="cpu", precision="fp32",
        optim=OptimConfig(clip_grad=None),
    )  # fmt: skip


def changed(config, name, value):
    group, _, field = name.rpartition(".")
    inner = dataclasses.replace(getattr(config, group), **{field: value}) if group else value
    return dataclasses.replace(config, **{group or field: inner})


@pytest.fixture
def identity(monkeypatch):
    """The key under which the features of a probe's options are kept, and their shape."""

    class Kept(Exception):
        pass

    def keep(folder, key, shape, world):
        raise Kept(key, shape)

    monkeypatch.setattr(probe, "FeatureCache", keep)

    def give(config, of=None):
        task = LinearProbe(config)
        task.world = World(0, 1, torch.device("cpu"))
        task.dtype = DTYPES[precision_of(config, task.world.device)]
        torch.manual_seed(config.seed)
        task.backbone = Beit(config.model.classifier(0, config.data.in_chans)).eval()
        of = of or images()
        try:
            task._cached("training", of, task._evaluation_loader(of), (config.model.depth, config.model.width))
        except Kept as kept:
            return kept.args
        finally:
            task.close()

    return give


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_feature_changes_the_key(identity, tmp_path, name):
    assert identity(base(tmp_path)) == identity(base(tmp_path))
    assert identity(changed(base(tmp_path), name, CHANGES[name])) != identity(base(tmp_path))


def test_other_images_labels_and_channels(identity, tmp_path):
    config = base(tmp_path)
    gray = changed(changed(config, "data.path", str(tmp_path)), "data.channels", 1)
    found = [
        identity(config), identity(config, images(labels=(0, 1, 1))), identity(config, images(labels=(0, 1))),
        identity(gray, images(channels=1)), identity(changed(gray, "data.value_range", (0.0, 9.0)), images(channels=1)),
    ]  # fmt: skip
    assert all(a != b for number, a in enumerate(found) for b in found[:number])


@pytest.mark.parametrize("channels", [None, 1])
def test_another_mean_in_the_same_file_changes_the_key(identity, tmp_path, channels):
    file, found = tmp_path / "statistics.json", []
    config = changed(base(tmp_path), "data.path", str(tmp_path))
    config = changed(changed(config, "data.normalization", str(file)), "data.channels", channels)
    for mean in (0.25, 0.5):
        file.write_text(json.dumps({"mean": [mean] * (channels or 3), "std": [0.5] * (channels or 3)}))
        found.append(identity(config, images(channels=channels or 3)))
    assert found[0] != found[1]


def test_features_of_earlier_versions_are_found(identity, tmp_path):
    """What the key holds has not changed: another name in it would have all features computed anew."""
    names = {
        "model", "data", "features", "image_size", "crop_share", "normalization", "precision", "value_range", "labels",
        "num_heads",
    }  # fmt: skip
    assert set(identity(base(tmp_path))[0]) == names
    gray = changed(changed(base(tmp_path), "data.path", str(tmp_path)), "data.channels", 1)
    assert set(identity(gray, images(channels=1))[0]) == names | {"mean", "std", "channels"}


def test_every_field_is_known_here(tmp_path):
    """A new field must be put on one of the lists, and tested if it changes a feature."""
    fields = set(flat(to_plain(base(tmp_path))))
    run = {field.name for field in dataclasses.fields(RunConfig)} - {"precision", "seed"}
    elsewhere = {name for name in fields if name.split(".")[0] in run}
    listed = [set(CHANGES), IN_THE_IMAGES, OTHERS, HARMLESS, elsewhere]
    assert fields == set().union(*listed)
    assert sum(map(len, listed)) == len(fields)
