"""Training BEiT v2's tokenizer through the engine, its teachers, and pre-training with its tokens."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from beit_fast.models import Beit, BeitConfig
from beit_fast.tokenizers import load_tokenizer
from beit_fast.tokenizers.vqkd import VqkdTokenizer
from beit_fast.train import engine
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.metrics import read_metrics
from beit_fast.train.tasks.model import MaskingConfig, ModelConfig, ObjectiveConfig, TokenizerConfig
from beit_fast.train.tasks.pretrain import DataConfig, EvaluationConfig, MaskedImageModeling, PretrainConfig
from beit_fast.train.tasks.teacher import TeacherConfig, open_teacher
from beit_fast.train.tasks.vqkd import (
    TrainVqkd,
    TrainVqkdConfig,
    VqkdDataConfig,
    VqkdEvaluationConfig,
    VqkdModelConfig,
    codes_sheet,
)
from benchmarks.baselines.libraries import make_torchvision_importable

CPU = torch.device("cpu")


def small(folder: Path, name: str, **changes: object) -> TrainVqkdConfig:
    config = TrainVqkdConfig(
        output_dir=folder / name,
        steps=6,
        batch_size=8,
        batch_per_device=4,
        precision="fp32",
        device="cpu",
        teacher=TeacherConfig(name="random"),
        model=VqkdModelConfig(
            width=64, depth=1, decoder_depth=1, image_size=32, patch_size=8, vocab_size=24, code_dim=8
        ),
        data=VqkdDataConfig(builtin_images=32, builtin_size=32, cache_dir=str(folder.parent / "cache"), threads=1),
        evaluation=VqkdEvaluationConfig(images=8),
        optim=OptimConfig(lr=1e-3, warmup_steps=1, weight_decay=1e-4, betas=(0.9, 0.99), clip_grad=None),
        checkpoint=CheckpointConfig(every_steps=3),
        log=LogConfig(every_steps=1, progress="none"),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    config = small(tmp_path_factory.mktemp("vqkd"), "whole")
    assert engine.run(TrainVqkd(config)).exit_code == 0
    return config.output_dir


def test_train_continue_and_load(whole: Path) -> None:
    lines = [line for line in read_metrics(whole / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["commitment"] > 0 for line in lines] == [False] + [True] * 5, "codes begin after the first step"
    assert [line["used_codes_share"] > 0 for line in lines] == [False] * 2 + [True] * 4
    broken = small(whole.parent, "broken")
    for stop in (1, 4, None):  # just after k-means, and later
        engine.run(TrainVqkd(dataclasses.replace(broken, max_steps=stop)))
    one, two = (load_file(folder / "tokenizer.safetensors") for folder in (whole, broken.output_dir))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    with safe_open(whole / "tokenizer.safetensors", framework="pt") as opened:
        assert "functional check" in opened.metadata()["data"]
        assert opened.metadata()["teacher"] == "random"
    assert (whole / "codes.png").stat().st_size > 500
    tokenizer = load_tokenizer(whole / "tokenizer.safetensors")
    assert int(tokenizer.encode(torch.rand(2, 3, 32, 32)).max()) < tokenizer.vocab_size == 24


def test_micro_batches_do_not_matter(whole: Path) -> None:
    config = small(whole.parent, "split", batch_per_device=2)
    engine.run(TrainVqkd(config))
    one, two = (load_file(folder / "tokenizer.safetensors") for folder in (whole, config.output_dir))
    for name in ("quantize.embedding.weight", "quantize.cluster_size"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_held_out_values_against_their_definitions(whole: Path) -> None:
    from beit_fast.train.distributed.world import World

    task = TrainVqkd(small(whole.parent, "evaluated"))
    try:
        model = task.build(World(0, 1, CPU)).eval()
        model.load_state_dict(load_file(whole / "tokenizer.safetensors"))
        with torch.no_grad():
            values = task.evaluate(model, 6)
        images = torch.cat([*task._held_out_images(1000)])
        target = task.teacher(images)
    finally:
        task.close()
    last = [line for line in read_metrics(whole / "metrics.jsonl") if "held_out_cosine" in line][-1]
    assert all(last[name] == pytest.approx(value, rel=1e-5) for name, value in values.items())
    ids = model.encode(images)
    cosine = F.cosine_similarity(model.decode_features(ids), target, dim=-1)
    assert values["held_out_cosine"] == pytest.approx(float(cosine.mean()), rel=1e-5)
    unit = F.normalize(target.flatten(0, 1), dim=1)
    best = unit @ F.normalize(unit.mean(0), dim=0)
    assert values["constant_cosine"] == pytest.approx(float(best.mean()), rel=1e-5)
    others = F.normalize(torch.randn(200, target.shape[2]), dim=1) @ unit.T
    assert values["constant_cosine"] > float(others.mean(1).max())
    assert values["held_out_used_codes_share"] == len(ids.unique()) / 24
    share = torch.bincount(ids.flatten()).double() / ids.numel()
    assert values["held_out_perplexity"] == pytest.approx(float(torch.distributions.Categorical(share).entropy().exp()))


@torch.no_grad()
def test_the_picture_shows_the_patches_nearest_to_each_code(whole: Path) -> None:
    """A row a code, most frequent first; in it its patches by cosine, each with a patch around, grey outside."""
    model = load_tokenizer(str(whole / "tokenizer.safetensors"))
    assert isinstance(model, VqkdTokenizer)
    codes = model.quantize.codes.numpy()
    colours = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(colours, scale_factor=8.0) + 0.05 * torch.rand(5, 3, 32, 32)).clamp(0, 1)
    sheet = np.asarray(codes_sheet(model, images, codes=3, crops=4))
    assert sheet.shape == (3 * 24, 4 * 24, 3)
    latents, ids = model.latents(images).numpy(), model.encode(images).flatten(1).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (8, 8), (8, 8)), constant_values=0.5)
    counts = np.bincount(ids.ravel(), minlength=24)
    shown = []
    for row in range(3):
        tiles = [sheet[row * 24 : row * 24 + 24, column * 24 : column * 24 + 24] for column in range(4)]
        best = sorted(
            (
                (float(latents[b, n] @ codes[code]), b, n, code)
                for code in range(24) for b in range(5) for n in range(16) if ids[b, n] == code
            ), reverse=True,
        )  # fmt: skip
        crops = {code: [(b, n) for _, b, n, c in best if c == code][:4] for code in range(24)}

        def crop(b: int, n: int) -> np.ndarray:
            top, left = 8 * (n // 4), 8 * (n % 4)
            return padded[b, :, top : top + 24, left : left + 24].transpose(1, 2, 0)

        fitting = [c for c, places in crops.items() if places and np.abs(crop(*places[0]) * 255 - tiles[0]).max() < 1]
        assert len(fitting) == 1
        (code,) = fitting
        shown.append(code)
        for tile, place in zip(tiles, crops[code], strict=False):
            assert np.abs(crop(*place) * 255 - tile).max() < 1
        for tile in tiles[len(crops[code]) :]:
            assert np.abs(tile - 127.5).max() < 1
    assert counts[shown].tolist() == sorted(counts, reverse=True)[:3]


def test_a_beit_teaches_with_its_last_normalised_patch_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BeitConfig.from_preset("tiny", depth=2, width=32, num_heads=2, image_size=32, patch_size=8, init_std=0.2)
    backbone = Beit(config.for_classification(0, global_pool="token")).eval()
    torch.nn.init.normal_(backbone.norm.weight)
    backbone.save_pretrained(tmp_path / "teacher")
    teacher = open_teacher(TeacherConfig(name=str(tmp_path / "teacher")), 4, CPU)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = backbone.forward_features((images - 0.5) / 0.5)[:, 1:]
    torch.testing.assert_close(teacher(images), expected)
    other = open_teacher(TeacherConfig(name=str(tmp_path / "teacher"), normalization="imagenet"), 4, CPU)
    assert not torch.allclose(other(images), expected, atol=1e-2)
    assert teacher(torch.rand(1, 3, 64, 64)).shape == (1, 16, 32)
    assert teacher.sha256() == other.sha256() != open_teacher(TeacherConfig(name="random"), 4, CPU).sha256()
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.slow
def test_clip_teaches_with_projected_patch_tokens(tmp_path: Path) -> None:
    make_torchvision_importable()
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    clip = transformers.CLIPVisionModelWithProjection(config).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    clip.save_pretrained(tmp_path / "clip")
    images = torch.rand(2, 3, 32, 32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        out = clip((images - mean) / std, output_hidden_states=True)
        tokens = F.layer_norm(out.last_hidden_state, (32,), *(p for p in clip.vision_model.post_layernorm.parameters()))
        expected = tokens @ clip.visual_projection.weight.T
    torch.testing.assert_close(expected[:, 0], out.image_embeds, rtol=1e-4, atol=1e-5)
    teacher = open_teacher(TeacherConfig(name=f"clip:{tmp_path / 'clip'}"), 4, CPU)
    torch.testing.assert_close(teacher(images), expected[:, 1:], rtol=1e-4, atol=1e-5)
    assert open_teacher(TeacherConfig(name=f"clip:{tmp_path / 'clip'}"), 6, CPU)(images).shape == (2, 36, 12)


@pytest.mark.slow
def test_timm_teaches_on_the_grid_of_the_tokenizer() -> None:
    make_torchvision_importable()
    timm = pytest.importorskip("timm")
    teacher = open_teacher(TeacherConfig(name="timm:vit_tiny_patch16_224"), 4, CPU, pretrained=False)
    images = torch.rand(2, 3, 64, 64)
    assert isinstance(teacher.network, timm.models.VisionTransformer)
    with torch.no_grad():
        expected = teacher.network.forward_features((images - 0.5) / 0.5)[:, 1:]
    torch.testing.assert_close(teacher(images), expected)


def pretraining(folder: Path, tokenizer: Path, **changes: object) -> PretrainConfig:
    config = PretrainConfig(
        output_dir=folder,
        steps=4,
        batch_size=6,
        batch_per_device=6,
        data=DataConfig(
            builtin_images=24, builtin_size=32, cache_dir=str(tokenizer.parents[2] / "cache"), threads=1, one_view=True
        ),
        model=ModelConfig(width=32, depth=3, num_heads=2, image_size=32, patch_size=8, drop_path_rate=0.3),
        objective=ObjectiveConfig(head_layers=2, early_layers=2),
        masking=MaskingConfig(num_masked=6, min_num_patches=2),
        tokenizer=TokenizerConfig(name=str(tokenizer)),
        evaluation=EvaluationConfig(images=8, pictures=2),
        optim=OptimConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=2),
        log=LogConfig(every_steps=1, progress="none"),
    )
    return dataclasses.replace(config, **changes)


def test_pre_training_with_its_tokens_and_both_heads(whole: Path, tmp_path: Path, capsys, weights) -> None:
    tokenizer = whole / "tokenizer.safetensors"
    config = pretraining(tmp_path / "run", tokenizer)
    assert engine.run(MaskedImageModeling(config)).exit_code == 0
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert all(0 <= line["extra_accuracy"] <= 1 for line in lines)
    assert 2 * 2.7 < lines[0]["loss"] < 2 * 3.7, "the sum of two cross-entropies over 24 tokens"
    assert "no reconstructions: the tokenizer" in capsys.readouterr().out
    broken = pretraining(tmp_path / "broken", tokenizer)
    engine.run(MaskedImageModeling(dataclasses.replace(broken, max_steps=3)))
    engine.run(MaskedImageModeling(broken))
    assert weights(tmp_path / "run") == weights(tmp_path / "broken")


@pytest.mark.parametrize("cycle", [None, 2])
def test_one_view_is_the_same_pixels(whole: Path, tmp_path: Path, cycle: int | None) -> None:
    """The tokens of the batch are those of the model's view with its normalisation undone, from the cache as well."""
    from beit_fast.data.loader import Request
    from beit_fast.train.distributed.world import World
    from beit_fast.train.schedules import requests_of

    tokenizer = whole / "tokenizer.safetensors"
    config = pretraining(tmp_path / "run", tokenizer, evaluation=EvaluationConfig())
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, view_cycle=cycle))
    config.output_dir.mkdir()
    task = MaskedImageModeling(config)
    try:
        task.build(World(0, 1, CPU))
        mean, std = (torch.tensor(v)[:, None, None] for v in config.data.mean_and_std())
        requests = list(requests_of(0, 12, 4, config, 0, 1))
        assert isinstance(requests[0], Request)
        for batch in task.batches(iter(requests)):
            images = batch.images * std + mean
            if cycle is None:
                torch.testing.assert_close(batch.token_images, images, rtol=0, atol=1e-6)
            expected = task.tokenizer.encode(images)[batch.mask]
            assert float((task.prepare(batch, 0).visual_tokens == expected).float().mean()) > 0.95
    finally:
        task.close()


def test_tokens_of_another_size_than_the_patches_need_a_view_of_their_own(tmp_path: Path, whole: Path) -> None:
    config = pretraining(tmp_path / "run", whole / "tokenizer.safetensors")
    model = dataclasses.replace(config.model, patch_size=16)
    with pytest.raises(ValueError, match=r"--data.one-view: the tokens of .* are 8 pixels wide, the patches 16; take"):
        engine.run(MaskedImageModeling(dataclasses.replace(config, model=model)))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (VqkdModelConfig, {"width": 100}, "--model.width 100 must be a multiple of 64"),
        (VqkdModelConfig, {"image_size": 100}, "--model.image-size 100 must be a multiple of --model.patch-size 16"),
        (VqkdModelConfig, {"vocab_size": 0}, "--model.vocab-size is 0"),
        (TrainVqkdConfig, {"decay": 1.0}, r"--decay must be in \[0, 1\)"),
    ],
)
def test_wrong_options_end_in_one_line(kind: type, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**change)


def test_a_teacher_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        open_teacher(TeacherConfig(name="nowhere"), 4, CPU)


RECIPES = Path(__file__).parents[3] / "recipes"


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.config


def test_values_of_the_paper() -> None:
    c = recipe("train_tokenizer_vqkd")
    assert (c.epochs, c.batch_size, c.optim.betas, c.optim.weight_decay, c.optim.warmup_epochs) == (
        100, 512, (0.9, 0.99), 1e-4, 10.0,
    )  # fmt: skip
    assert (c.optim.lr, c.optim.min_lr, c.commitment, c.decay, c.kmeans_rounds) == (2e-4, 1e-5, 1.0, 0.99, 10)
    assert (c.data.scale, c.data.jitter, c.model) == ((0.08, 1.0), 0.0, VqkdModelConfig())
    for size, early in (("base", 9), ("large", 21)):
        c = recipe(f"pretrain_beitv2_{size}")
        assert (c.objective.head_layers, c.objective.early_layers, c.model.size) == (2, early, size)
        assert (c.epochs, c.batch_size, c.optim.lr, c.optim.warmup_epochs, c.optim.clip_grad) == (
            1600, 2048, 1.5e-3, 10.0, 3.0,
        )  # fmt: skip
        assert (c.optim.weight_decay, c.optim.betas, c.model.drop_path_rate) == (0.05, (0.9, 0.999), 0.1)
        assert (c.data.scale, c.data.one_view, c.data.normalization) == ((0.2, 1.0), True, "imagenet")
        assert (c.masking.num_masked, c.tokenizer.name) == (75, "vqkd")
        architecture = c.model.architecture(8192)
        assert architecture.layer_scale_init == {"base": 0.1, "large": 1e-5}[size]
