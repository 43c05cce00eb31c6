"""Reconstructions: every part by its definition, and a trained model against random tokens and the mode."""

import numpy as np
import pytest
import torch

from beit_fast.models import BeitConfig, BeitForMaskedImageModeling
from beit_fast.tokenizers import load_tokenizer
from beit_fast.visualize.reconstructions import guesses, reconstruct, reconstruction_sheet

SMALL = {"width": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "image_size": 32}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


def stripes(count, seed):
    """Images of two of five greys whose every patch is the same: the visible ones tell what is hidden."""
    generator = torch.Generator().manual_seed(seed)
    greys = torch.randint(0, 5, (count, 1, 2), generator=generator) / 4
    kind = (torch.arange(32) // 4 % 2).expand(32, 32)
    return torch.where(kind.bool(), greys[..., :1, None], greys[..., 1:, None]).expand(-1, 3, -1, -1).contiguous()


def half_masked(count, seed):
    order = torch.rand(count, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return (order < 6).view(count, 4, 4)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Trained on stripes for a few seconds."""
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(
        BeitConfig.from_preset("tiny", "plain", init_std=0.1, vocab_size=tokenizer.vocab_size, **SMALL)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images = stripes(256, seed=0)
    tokens = tokenizer.encode(images)
    for step in range(60):
        part = torch.arange(step * 32, step * 32 + 32) % 256
        loss = model(images[part] * 2 - 1, half_masked(32, step), tokens[part]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_parts_are_what_they_say(model, tokenizer):
    images, mask = stripes(3, seed=1), half_masked(3, seed=2)
    found = reconstruct(model, tokenizer, images * 2 - 1, images, mask)
    assert torch.equal(found.tokens, tokenizer.encode(images))
    assert torch.equal(found.predicted[~mask], found.tokens[~mask])
    assert torch.equal(found.predicted[mask], model.predict_tokens(images * 2 - 1, mask).argmax(1))
    torch.testing.assert_close(found.true_tokens, tokenizer.decode(found.tokens))
    torch.testing.assert_close(found.predicted_tokens, tokenizer.decode(found.predicted))
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
    for image, masked, place in zip(images, found.masked, hidden, strict=True):
        assert (masked[:, place] == 0.5).all()
        assert torch.equal(masked[:, ~place], image[:, ~place])
    sheet = np.asarray(reconstruction_sheet(found)).astype(int)
    assert sheet.shape[1] > sheet.shape[0] > 3 * 96
    assert sheet.std() > 20


def test_predictions_beat_random_tokens_and_the_mode(model, tokenizer):
    """On images it has not seen, whose hidden patches the visible ones tell."""
    images, mask = stripes(64, seed=3), half_masked(64, seed=4)
    parts = [reconstruct(model, tokenizer, images[i : i + 16] * 2 - 1, images[i : i + 16], mask[i : i + 16])
             for i in range(0, 64, 16)]  # fmt: skip
    found = guesses(parts, tokenizer)
    assert found["true"].accuracy == 1.0
    assert found["true"].mean_absolute_error < found["predicted"].mean_absolute_error
    for other in ("random", "mode"):
        assert found["predicted"].mean_absolute_error < 0.75 * found[other].mean_absolute_error
        assert found["predicted"].accuracy > 2 * found[other].accuracy


def test_guesses_by_hand(model, tokenizer):
    images, mask = stripes(4, seed=5), half_masked(4, seed=6)
    part = reconstruct(model, tokenizer, images * 2 - 1, images, mask)
    found = guesses([part], tokenizer)
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
    errors = (part.predicted_tokens - images).abs().permute(0, 2, 3, 1)[hidden]
    assert found["predicted"].mean_absolute_error == pytest.approx(float(errors.mean()), rel=1e-5)
    assert found["predicted"].accuracy == pytest.approx(float((part.predicted == part.tokens)[mask].float().mean()))
    mode = np.bincount(part.tokens.flatten().numpy()).argmax()
    assert found["mode"].accuracy == pytest.approx(float((part.tokens == int(mode))[mask].float().mean()))
    assert guesses([part], tokenizer) == found


def test_what_cannot_be_decoded_is_said(tokenizer):
    model = BeitForMaskedImageModeling(BeitConfig(mim_target="pixels", **SMALL))
    images = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match="predicts pixels"):
        reconstruct(model, tokenizer, images, images, torch.ones(1, 4, 4, dtype=torch.bool))
    model = BeitForMaskedImageModeling(BeitConfig(**SMALL))
    with pytest.raises(ValueError, match=r"mask must be \(1, 4, 4\)"):
        reconstruct(model, tokenizer, images, images, torch.ones(1, 16, dtype=torch.bool))
