"""The committed demo tokenizer: its model card's numbers, measured again."""

import hashlib
import re
from functools import cache

import pytest
import torch

from beit_fast.tokenizers import load_tokenizer
from beit_fast.tokenizers.load import DEMO_PATH
from beit_fast.train.tasks.tokenizer import held_out_images, reconstruction_metrics

CARD = DEMO_PATH.parent / "MODEL_CARD.md"
COLUMNS = ("mae", "psnr_db", "perplexity", "used_codes")


def card_row(name: str) -> dict[str, float]:
    match = re.search(rf"^\| {re.escape(name)} \|(.+)\|$", CARD.read_text(), re.MULTILINE)
    assert match, f"the card has no row {name!r}"
    return dict(zip(COLUMNS, (float(cell.replace(",", "")) for cell in match[1].split("|")), strict=True))


@cache
def measured(size: int) -> dict[str, float]:
    return reconstruction_metrics(load_tokenizer("demo"), held_out_images(48, size))


@pytest.mark.parametrize("size", [64, 112])
def test_card_holds(size: int) -> None:
    """Same images, same weights: only the order of floating-point sums may differ between machines."""
    assert measured(size) == pytest.approx(card_row(f"48 images at {size} px"), rel=0.01)


def test_vocabulary_is_in_use() -> None:
    assert measured(112)["perplexity"] >= 300
    assert card_row("200 images at 112 px")["perplexity"] >= 300
    assert card_row("200 images at 64 px")["perplexity"] >= 300


def test_file() -> None:
    assert DEMO_PATH.stat().st_size <= 5_000_000
    tokenizer = load_tokenizer("demo")
    digest = hashlib.sha256(DEMO_PATH.read_bytes()).hexdigest()
    assert tokenizer.sha256 == digest
    assert DEMO_PATH.with_name("demo.safetensors.sha256").read_text().split()[0] == digest
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.stride) == ("demo", 8192, 8)


def test_tokens_tell_images_apart_and_survive_half_precision() -> None:
    images = held_out_images(48, 112)[:8]
    ids = load_tokenizer("demo").encode(images)
    assert ids.shape == (8, 14, 14)
    assert int(ids.max()) < 1024
    assert (ids[0] == ids[1]).float().mean() < 0.1
    half = load_tokenizer("demo", dtype=torch.bfloat16).encode(images)
    assert (half == ids).float().mean() > 0.5
