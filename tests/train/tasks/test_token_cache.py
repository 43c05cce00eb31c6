"""Views that repeat and tokens that are kept: the same losses, bit for bit, as with the tokenizer in every step."""

import dataclasses
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from beit_fast.cli.train import main
from beit_fast.data import BlockwiseMasking, CropSampler, PretrainLoader, Request, open_source
from beit_fast.data.token_store import HEADER_BYTES, TokenStore
from beit_fast.tokenizers import Tokenizer
from beit_fast.train import engine
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.metrics import read_metrics
from beit_fast.train.tasks.pretrain import (
    DataConfig,
    MaskedImageModeling,
    MaskingConfig,
    ModelConfig,
    PretrainConfig,
    TokenizerConfig,
)
from tests.images import write_scenes

CYCLE, EPOCH, EPOCHS = 2, 4, 4  # epochs, steps, epochs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A flat folder of 26 small JPEG files: batches of 6 leave two of them out of every epoch, others each time."""
    return write_scenes(tmp_path_factory.mktemp("images"), 26)


@pytest.fixture
def config(images, tmp_path):
    return make_config(images, tmp_path)


def make_config(images, folder):
    return PretrainConfig(
        output_dir=folder / "cached",
        steps=EPOCHS * EPOCH,
        batch_size=6,
        batch_per_device=6,
        data=DataConfig(path=str(images), threads=1, view_cycle=CYCLE),
        model=ModelConfig(width=32, depth=2, num_heads=2, image_size=32, patch_size=8, drop_path_rate=0.5),
        masking=MaskingConfig(num_masked=6, min_num_patches=2),
        tokenizer=TokenizerConfig(name="random"),
        optim=OptimConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=5),
        log=LogConfig(every_steps=1, progress="none"),
    )


def with_data(config, folder, **changes):
    data = dataclasses.replace(config.data, **changes)
    return dataclasses.replace(config, data=data, output_dir=config.output_dir.with_name(folder))


@pytest.fixture
def encoded(monkeypatch):
    """How many images the tokenizer saw, call by call."""
    seen = []
    encode = Tokenizer.encode

    def counting(self, images, *arguments):
        seen.append(len(images))
        return encode(self, images, *arguments)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    return seen


def run(config, **changes):
    config = dataclasses.replace(config, **changes)
    return engine.run(MaskedImageModeling(config))


def losses(config):
    return {line["step"]: line["loss"] for line in read_metrics(config.output_dir / "metrics.jsonl") if "loss" in line}


def test_the_same_losses_with_and_without_the_cache(config, encoded):
    uncached = with_data(config, "uncached", token_cache="off")
    run(uncached)
    assert sum(encoded) == EPOCHS * EPOCH * 6
    encoded.clear()
    run(config)
    assert losses(config) == losses(uncached)
    # All of two epochs; later only what their order left out: at most two images for each epoch of the cycle.
    assert 2 * EPOCH * 6 <= sum(encoded) <= 2 * 26
    fresh = with_data(config, "fresh", view_cycle=None)
    run(fresh)
    first_cycle = range(1, CYCLE * EPOCH + 1)
    assert [losses(fresh)[s] for s in first_cycle] == [losses(config)[s] for s in first_cycle]
    assert losses(fresh) != losses(config)


def test_a_second_run_and_a_damaged_record(config, encoded, tmp_path):
    """A cache is shared by runs of the same views, whatever the model; what was damaged is computed again."""
    shared = str(tmp_path / "shared" / "tokens")
    one = with_data(config, "one", token_cache=shared)
    run(one)
    raw = bytearray(Path(shared).read_bytes())
    for record in range(0, 2 * 26, 4):
        raw[HEADER_BYTES + record * (2 * 16 + 4) + 5] ^= 0x40
    Path(shared).write_bytes(raw)
    encoded.clear()
    two = with_data(config, "two", token_cache=shared)
    run(two)
    assert losses(two) == losses(one)
    assert 0 < sum(encoded) <= 2 * 26 / 4 + 4
    damaged = [line["damaged_token_records"] for line in read_metrics(two.output_dir / "metrics.jsonl")]
    assert damaged == sorted(damaged)
    assert damaged[-1] > 0


def test_resume_reads_the_cache(config, encoded):
    whole = with_data(config, "whole")
    run(whole)
    run(config, max_steps=9)
    encoded.clear()
    run(config)
    assert losses(config) == losses(whole)
    assert sum(encoded) <= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1"], "was made with seed 0, now 1; restore the settings"),
        (["--data.jitter", "0.3"], "was made with jitter 0.4, now 0.3;"),
        (["--data.view-cycle", "3"], "was made with view_cycle 2, now 3;"),
        (["--data.view-cycle", "0"], "--data.view-cycle is 0"),
        (["--data.view-cycle", "None"], "--data.token-cache needs --data.view-cycle"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_wrong_settings_are_one_line(config, tmp_path, capsys, arguments, message, dry):
    task = MaskedImageModeling(shared := with_data(config, "first", token_cache=str(tmp_path / "tokens")))
    from beit_fast.train.distributed.world import World

    task.build(World(0, 1, torch.device("cpu")))
    task.close()
    with pytest.raises(SystemExit) as stop:
        main(shared, MaskedImageModeling, arguments=[*arguments, *(["--dry-run"] if dry else [])])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_dry_run_shows_disk_and_time_and_writes_nothing(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(config, MaskedImageModeling, arguments=["--dry-run", "--steps", "1000"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "token cache" in text
    assert "from epoch 2 on no tokenizer" in text
    assert "saved" in text
    assert not config.output_dir.exists()


def test_views_repeat_and_masks_do_not(images, tmp_path):
    source, masking = open_source(images), BlockwiseMasking((4, 4), 6, min_num_patches=2)
    options = {"seed": 3, "image_size": 32, "token_image_size": 32, "threads": 1}

    def make(epochs, **more):
        with PretrainLoader(source, masking, CropSampler(), **options, **more) as views:
            found = {}
            for batch in views.batches(Request(e, np.arange(26)) for e in epochs):
                order = batch.indices.argsort()
                rows = batch.mask.flatten().nonzero().squeeze(1)
                torch.testing.assert_close(batch.masked_indices, rows, rtol=0, atol=0)
                found[batch.epoch] = (batch, order)
            return found

    found = make([0, 1, 2, 3], view_cycle=2)
    for one, two, same in ((0, 2, True), (1, 3, True), (0, 1, False)):
        (a, i), (b, j) = found[one], found[two]
        for name in ("images", "token_images"):
            assert torch.equal(getattr(a, name)[i], getattr(b, name)[j]) is same
        for name in ("mask", "sample_keys", "indices"):
            assert not torch.equal(getattr(a, name)[i] if name != "indices" else a.indices,
                                   getattr(b, name)[j] if name != "indices" else b.indices)  # fmt: skip
    assert torch.equal(make([3])[3][0].mask, found[3][0].mask)

    with TokenStore(tmp_path / "s", num_samples=26, num_tokens=16, cycle=2, settings={}) as store:
        store.write(0, np.arange(20), np.arange(320).reshape(20, 16))
        batch, _ = make([2], view_cycle=2, token_store=store)[2]
        plain, _ = found[2]
        unknown = (batch.indices >= 20).nonzero().squeeze(1)
        assert torch.equal(batch.unknown, unknown)
        assert torch.equal(batch.token_images, plain.token_images[unknown])
        assert torch.equal(batch.images, plain.images)
        known = batch.indices < 20
        wanted = (batch.indices[known] * 16)[:, None] + torch.arange(16)
        assert torch.equal(batch.known_tokens[known].flatten(1), wanted)
        with pytest.raises(ValueError, match="token_store holds 16 tokens per view in a cycle of 2"):
            make([0], view_cycle=3, token_store=store)


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import test_token_cache as t
from beit_fast.cli.train import main
main(t.make_config({images!r}, t.Path({out!r})), t.MaskedImageModeling)
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_losses(config, images, tmp_path, environment):
    """kill -9 at random moments of the training itself, the same command each time."""
    uncached = with_data(config, "uncached", token_cache="off")
    run(uncached)
    program = PROGRAM.format(folder=str(Path(__file__).parent), images=str(images), out=str(tmp_path))
    clock = random.Random(1)
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL)
        log, before = config.output_dir / "metrics.jsonl", time.monotonic()
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and time.monotonic() < before + 60:
            if log.exists() and log.stat().st_size > size:
                break
            time.sleep(0.01)
        time.sleep(clock.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=600)
    assert losses(config) == losses(uncached)
