"""R14: whatever is typed, a run or one line."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.images import write_scenes

WORDS = st.sampled_from(["", "x", "1e400", "--", "0"])
NUMBERS = st.one_of(st.integers(-3, 70), st.floats(allow_nan=True, width=32), WORDS)
NAMES = st.sampled_from(
    ["--steps", "--batch-size", "--batch-per-device", "--seed", "--optim.lr", "--optim.min-lr", "--optim.warmup-steps",
     "--optim.warmup-epochs", "--optim.weight-decay", "--optim.clip-grad", "--optim.ema-decay", "--optim.eps",
     "--optim.betas", "--optim.schedule", "--checkpoint.keep", "--checkpoint.every-steps", "--checkpoint.background",
     "--log.every-steps", "--log.progress", "--precision", "--device", "--parallel", "--hang-timeout-s", "--max-steps",
     "--eval-every", "--epochs", "--fresh", "--replay", "--gpus", "--compile", "--width", "--samples", "--dry-run",
     "--zzz", "--optim", "--lr", "surplus"]
)  # fmt: skip


def one_line_or_a_run(tiny, folder, arguments, capsys):
    from beit_fast.cli.train import main

    recipe = dataclasses.replace(tiny.RECIPE, steps=2, output_dir=folder)
    with pytest.raises(SystemExit) as stop:
        main(recipe, tiny.TinyTask, arguments=arguments)
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    if stop.value.code in (None, 0, 75):
        return
    assert stop.value.code in (1, 2)
    errors = [line for line in out.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, out.err
    assert len(errors[0]) > len("error: "), out.err


@pytest.fixture(scope="module")
def tiny():
    import importlib.util
    import sys
    from pathlib import Path

    path = Path(__file__).parents[1] / "train" / "tiny_task.py"
    spec = importlib.util.spec_from_file_location("tiny_task_options", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_task_options"] = module
    spec.loader.exec_module(module)
    return module


def fuzz(tiny, tmp_path_factory, capsys, monkeypatch, examples):
    from beit_fast.train.distributed import launch

    monkeypatch.setattr(launch, "launch", lambda count, device: 0)  # no processes: options are what is tested
    tried = 0

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(st.tuples(NAMES, NUMBERS), min_size=1, max_size=3))
    def attempt(options):
        nonlocal tried
        tried += 1
        arguments = [text for name, value in options for text in (name, str(value))]
        one_line_or_a_run(tiny, tmp_path_factory.mktemp("run") / "run", arguments, capsys)

    attempt()
    return tried


def test_options(tiny, tmp_path_factory, capsys, monkeypatch):
    fuzz(tiny, tmp_path_factory, capsys, monkeypatch, 25)


@pytest.mark.slow
@pytest.mark.long
def test_many_options(tiny, tmp_path_factory, capsys, monkeypatch, outcome):
    tried = fuzz(tiny, tmp_path_factory, capsys, monkeypatch, 500)
    outcome("R14", "random options and values: a run, or one line that says what is wrong", tried, tried, "all")


def bad_images(folder, count):
    """`count` files that are no images, each broken in one of eight ways; the same for every call."""
    import io

    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    png = buffer.getvalue()
    kinds = [b"", b"text, not an image", jpeg[:15], png[:20], b"\0" * 500, b"<html>404</html>", jpeg[:2] + b"\xff" * 90,
             b"GIF89a"]  # fmt: skip
    for number in range(count):
        (folder / f"bad{number:02d}.jpg").write_bytes(kinds[number % len(kinds)])


@pytest.mark.slow
@pytest.mark.long
def test_bad_images(tmp_path, outcome):
    """R11: 40 files that are no images among 60 that are; none ends the run, and the count is exact."""
    import torch
    from PIL import Image

    from beit_fast.data import builtin
    from beit_fast.train import engine
    from beit_fast.train.config import LogConfig, OptimConfig
    from beit_fast.train.metrics import read_metrics
    from beit_fast.train.tasks.pretrain import (  # fmt: skip
        DataConfig,
        MaskedImageModeling,
        MaskingConfig,
        ModelConfig,
        PretrainConfig,
        TokenizerConfig,
    )

    torch.set_num_threads(1)
    folder = tmp_path / "images"
    folder.mkdir()
    bad_images(folder, 40)
    write_scenes(folder, 58, "good{:02d}.jpg")
    scene = Image.fromarray(builtin.render(58, seed=5, size=48))
    scene.convert("CMYK").save(folder / "cmyk.jpg")
    scene.convert("L").save(folder / "grey.png")
    config = PretrainConfig(
        output_dir=tmp_path / "run", steps=10, batch_size=10, batch_per_device=10,
        data=DataConfig(path=str(folder), threads=1, max_bad_share=0.5),
        model=ModelConfig(width=32, depth=2, num_heads=2, image_size=32, patch_size=8),
        masking=MaskingConfig(num_masked=6, min_num_patches=2), tokenizer=TokenizerConfig(name="random"),
        optim=OptimConfig(warmup_steps=1), log=LogConfig(every_steps=1, progress="none"),
    )  # fmt: skip
    assert engine.run(MaskedImageModeling(config)).exit_code == 0
    counted = [x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if x["kind"] == "train"][-1]["bad_images"]
    text = (tmp_path / "run" / "bad_files.tsv").read_text()
    found = sum(f"bad{number:02d}.jpg" in text for number in range(40))
    assert counted == 40
    assert "good" not in text.replace(str(folder), "")
    outcome("R11", "files that are no images, among 60 that are, in one epoch: replaced, counted, named", 40, found,
            "40, no crash")  # fmt: skip
