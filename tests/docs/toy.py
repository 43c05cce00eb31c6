"""Commands of the documentation at toy size, and the data that they are given."""

import runpy
from dataclasses import is_dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from beit_fast import Beit, BeitConfig, BeitForMaskedImageModeling
from beit_fast.cli.options import option_names

ROOT = Path(__file__).parents[2]
RUN = {"--device": "cpu", "--log.progress": "none", "--steps": "2", "--max-steps": "2", "--batch-size": "4",
       "--batch-per-device": "2", "--optim.warmup-steps": "1", "--data.threads": "1"}  # fmt: skip
BACKBONE = {"--model.width": "32", "--model.depth": "4", "--model.num-heads": "2", "--model.patch-size": "8",
            "--model.image-size": "32"}  # fmt: skip
TOY = {
    "PretrainConfig": RUN | BACKBONE | {
        "--masking.num-masked": "6", "--masking.min-num-patches": "2", "--tokenizer.name": "demo",
        "--objective.early-layers": "3",
        "--evaluation.images": "4", "--evaluation.pictures": "1", "--data.builtin-images": "16",
        "--data.builtin-size": "48",
    },
    "FinetuneConfig": RUN | BACKBONE | {"--data.num-classes": "2"},
    "ProbeConfig": RUN | BACKBONE | {"--data.num-classes": "2"},
    "SegmentConfig": RUN | BACKBONE | {
        "--model.channels": "8", "--model.auxiliary-channels": "8", "--crops.base": "128 32", "--data.num-classes": "3",
    },
    "TrainVqkdConfig": RUN | {
        "--model.width": "64", "--model.depth": "1", "--model.decoder-depth": "1", "--model.patch-size": "8",
        "--model.image-size": "32", "--model.vocab-size": "24", "--model.code-dim": "8", "--data.builtin-images": "16",
        "--data.builtin-size": "48", "--evaluation.images": "4", "--teacher.name": "random",
    },
    "TrainTokenizerConfig": RUN | {
        "--vocab-size": "100", "--hidden-dim": "8", "--codebook-dim": "4", "--held-out-images": "2",
        "--data.view-sizes": "32 48", "--quantizer.live-codes": "16", "--quantizer.init-latents": "64",
        "--quantizer.autoencoder-steps": "1",
    },
}  # fmt: skip
WITH_TORCHVISION = """
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable
make_torchvision_importable()
from beit_fast.cli.main import main
raise SystemExit(main())
"""
"""`beit-fast` where torch and torchvision are of two kinds, which timm refuses to be imported with."""
KEPT = {"--tokenizer.name"}
"""Options that keep the value of the page where it gives one."""


def toy_words(words: list[str]) -> list[str]:
    """The arguments of Python that run a command of a page small, on the CPU, with toy data."""
    words = [word.replace("/data/", "data/") for word in words]
    if words[0] == "torchrun":
        script = next(place for place, word in enumerate(words) if word.endswith(".py"))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return [*launcher, str(ROOT / words[script]), *toy_options(Path(words[script]).stem, words[script + 1 :])]
    if words[:2] == ["beit-fast", "train"] and len(words) > 2:
        return ["-m", "beit_fast", "train", words[2], *toy_options(words[2], words[3:])]
    if words[:2] == ["beit-fast", "verify"] and len(words) > 2:  # released files cannot be fetched by a test
        words = ["beit-fast", "verify", "dalle", "--weights", "demo", "--data.path", "data/images"]
    if words[0] == "beit-fast":
        rest = words[1:]
        if rest[0] in ("evaluate", "predict", "segment", "visualize", "embed", "knn", "verify") and "codes" not in rest:
            rest += ["--device", "cpu"]
        if rest[:2] == ["visualize", "reconstructions"]:
            rest += ["--images", "4", "--pictures", "1"]
        if rest[:2] == ["visualize", "codes"]:
            rest += ["--images", "4", "--count", "4"]
        return ["-c", WITH_TORCHVISION, *rest]
    return words[1:] if words[0] == "python" else words


def toy_options(name: str, given: list[str]) -> list[str]:
    """The options of a recipe, with toy values in place of the page's and of the recipe's own."""
    if "--help" in given:
        return given
    config = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["config"]
    options = pairs(given)
    if "--gpus" in options:
        options["--gpus"] = "2"
    known = set(option_names(config)) if is_dataclass(config) else set()
    for option, value in TOY[type(config).__name__].items():
        built_in = option == "--evaluation.images" and "--data.channels" in options  # those are RGB
        if option in known and not built_in and not (option in KEPT and option in options):
            options[option] = value
    if "--data.path" not in options:
        options.pop("--data.num-classes", None)
    if name == "segment_ade20k_base" and "surfaces" in options.get("--data.path", ""):
        options["--data.num-classes"] = "None"
    options.pop("--epochs", None)
    if "--eval-every" in options:
        options["--eval-every"] = "1"
    return [word for option, value in options.items() for word in (option, *value.split())]


def pairs(words: list[str]) -> dict[str, str]:
    """Options and their values, in order; a flag has the value ""."""
    found: dict[str, str] = {}
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word
            found[option] = ""
        else:
            found[option] = f"{found[option]} {word}".strip()
    return found


def make_data(folder: Path) -> None:
    """What the pages call /data/..., and a released file."""
    for root, count in (("data/imagenet", 8), ("data/labelled", 8)):
        for split in ("train", "val"):
            for kind in ("cat", "dog"):
                images(folder / root / split / kind, count)
    images(folder / "data/images", 16)
    images(folder / "data/held-out", 8)
    scans(folder / "data/scans", 16)
    for split in ("train", "val"):
        for kind in ("cat", "dog"):
            scans(folder / "data/labelled-scans" / split / kind, 6)
    for place, names in (
        ("data/ADEChallengeData2016", ("images/training", "annotations/training", "images/validation",
                                       "annotations/validation")),
        ("data/surfaces", ("train/images", "train/labels", "val/images", "val/labels")),
    ):  # fmt: skip
        labelled(folder / place, *names)
    (folder / "data/surfaces/classes.txt").write_text("sky\ngrass\nwater\n")
    config = BeitConfig.from_preset("tiny", width=32, depth=4, num_heads=2, patch_size=8, image_size=32)
    state = Beit(config.for_classification(1000)).state_dict()
    torch.save({"model": state}, folder / "beit_base_patch16_224_pt22k_ft22k.pth")
    pretrained = BeitForMaskedImageModeling(config).state_dict()
    torch.save({"model": pretrained}, folder / "beit_base_patch16_224_pt22k.pth")


def images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index, name in zip(range(count), "abcdefghijklmnop", strict=False):
        pixels = random.integers(0, 255, (48, 56 + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")


def scans(folder: Path, count: int) -> None:
    """Grey images of 16 bits."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    for index in range(count):
        pixels = random.integers(0, 65536, (48, 56 + index), dtype=np.uint16)
        Image.fromarray(pixels).save(folder / f"{index:02d}.tif")


def labelled(root: Path, *names: str) -> None:
    for pictures, labels in (names[:2], names[2:]):
        images(root / pictures, 4)
        (root / labels).mkdir(parents=True)
        for path in (root / pictures).iterdir():
            with Image.open(path) as picture:
                numbers = np.arange(picture.width * picture.height).reshape(picture.height, picture.width) % 3
            Image.fromarray((numbers + (labels.startswith("annotations"))).astype(np.uint8)).save(
                root / labels / f"{path.stem}.png"
            )
