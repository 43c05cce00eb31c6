"""Pre-training batches by hand: the defaults, the token store's part, decoders, what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from beit_fast.data import decoding, pretraining
from beit_fast.data.builtin import render_labelled
from beit_fast.data.decoding import PilDecoder
from beit_fast.data.loader import Request
from beit_fast.data.pretraining import PretrainLoader, resolve_decoder
from beit_fast.data.sampling import BlockwiseMasking, CropSampler, epoch_order
from beit_fast.data.screening import BadImages
from beit_fast.data.sources import ArraySource

PLAIN = CropSampler(scale=(1.0, 1.0), flip_probability=0.0, brightness=0.0, contrast=0.0, saturation=0.0)
MASKING = BlockwiseMasking((2, 4), 3, min_num_patches=1)
SCENES = [render_labelled(index, 0, 48)[0][:40] for index in range(6)]


def loader_of(source=None, masking=MASKING, sampler=None, **options):
    source = ArraySource(SCENES) if source is None else source
    options = {"seed": 3, "image_size": 16, "token_image_size": 8, "threads": 1, "decoder": "pil"} | options
    return PretrainLoader(source, masking, CropSampler() if sampler is None else sampler, **options)


def batches_of(*requests, **options):
    with loader_of(**options) as loader:
        return list(loader.batches(requests))


class Store:
    """Knows the tokens of these samples: eight times the number of the sample."""

    num_tokens = 8

    def __init__(self, *known, cycle=None):
        self.known, self.cycle = known, cycle

    def read(self, epoch, indices):
        tokens = np.repeat(np.asarray(indices)[:, None], 8, 1).astype(np.uint16)
        return tokens, np.isin(indices, self.known)


def test_batches_unless_asked_otherwise():
    """224 and 112 pixels; black is -1 and white 1 for the model, 0 and 1 for the tokenizer; two are made ahead."""
    source = ArraySource([np.zeros((9, 12, 3), np.uint8), np.full((9, 12, 3), 255, np.uint8)])
    with PretrainLoader(source=source, masking=MASKING, sampler=PLAIN, seed=0, threads=1) as loader:
        assert loader.prefetch == 2
        (batch,) = loader.batches([Request(0, np.arange(2))])
    white = batch.indices.float()[:, None, None, None]
    assert torch.equal(batch.images, (white * 2 - 1).expand(2, 3, 224, 224))
    assert torch.equal(batch.token_images, white.expand(2, 3, 112, 112))
    assert (batch.known_tokens, batch.unknown, batch.visual_tokens) == (None, None, None)
    assert len(batch) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.epoch = 3


@pytest.mark.parametrize("token_size", [8, None])
def test_only_views_without_tokens_are_made_for_the_tokenizer(token_size):
    """Of one view, as of two."""
    request = Request(1, np.arange(6))
    (whole,) = batches_of(request, token_image_size=token_size)
    (batch,) = batches_of(request, token_image_size=token_size, token_store=Store(1, 2, 4))
    unknown = [row for row, index in enumerate(batch.indices.tolist()) if index not in (1, 2, 4)]
    assert batch.unknown.tolist() == unknown
    assert torch.equal(batch.images, whole.images)
    assert torch.equal(batch.token_images, whole.token_images[unknown])
    assert whole.token_images.shape[1:] == ((3, 16, 16) if token_size is None else (3, 8, 8))
    assert torch.equal(batch.known_tokens, batch.indices[:, None, None].expand(6, 2, 4))
    if token_size is None:
        torch.testing.assert_close(whole.token_images, whole.images / 2 + 0.5)


def test_what_replaces_an_image_with_tokens_has_none(monkeypatch):
    """Image 2 cannot be decoded, which shows only after its tokens were read."""
    real = PilDecoder.decode

    def decode(decoder, encoded, headers, windows):
        found = real(decoder, encoded, headers, windows)
        return [bad if header.width == 41 else crop for header, crop in zip(headers, found, strict=True)]

    bad = decoding.Rejection("damaged")
    monkeypatch.setattr(PilDecoder, "decode", decode)
    source = ArraySource([*SCENES[:2], SCENES[2][:, :41], *SCENES[3:]])
    order = epoch_order(np.arange(6), 6, 3, 0).tolist()
    row = order.index(2)
    reported = BadImages(6, max_share=1.0)
    (batch,) = batches_of(Request(0, np.arange(6)), source=source, token_store=Store(*range(6)), bad_images=reported)
    assert reported.reasons == {"array:2": "damaged"}
    assert batch.indices[row] == order[(row + 1) % 6]
    assert batch.unknown.tolist() == [row]
    (whole,) = batches_of(Request(0, np.arange(6)), source=source, bad_images=BadImages(6, max_share=1.0))
    assert torch.equal(batch.token_images[0], whole.token_images[row])


def test_views_come_again_after_a_cycle():
    """Views of epoch 5 in a cycle of 3 are those of epoch 2; order and masks are its own."""
    (plain,) = batches_of(Request(2, np.arange(6)))
    (found,) = batches_of(Request(5, np.arange(6)), view_cycle=3)
    own = epoch_order(np.arange(6), 6, 3, 5)
    assert found.indices.tolist() == own.tolist()
    assert torch.equal(found.images[own.argsort()], plain.images[plain.indices.argsort()])
    assert torch.equal(found.mask, MASKING.sample(3, 5, own))


@pytest.mark.parametrize("center", ["view", "image"])
def test_contrast_is_about_the_view_or_the_image(center):
    """Left half black, right half white: a window on one side is moved by the whole image's gray alone."""
    picture = np.repeat([[0] * 20 + [255] * 20], 40, 0).astype(np.uint8)
    source = ArraySource([np.repeat(picture[..., None], 3, 2)] * 6)
    sampler = CropSampler((0.05, 0.05), (1.0, 1.0), 0.0, 0.0, 1.0, 0.0)
    batches = batches_of(
        *(Request(e, np.arange(6)) for e in range(4)), source=source, sampler=sampler, jitter_center=center
    )
    views = torch.cat([batch.token_images for batch in batches]).flatten(1)
    uniform = views[views.std(1) == 0]
    assert len(uniform) > 5
    assert bool(((uniform == 0) | (uniform == 1)).all()) == (center == "view")


def test_decoders(monkeypatch):
    """ "auto" is nvJPEG on a GPU, DALI elsewhere, and Pillow where DALI is missing."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    names = ("dali", "dali-gpu", "pil", "auto")
    assert [resolve_decoder(name, cpu) for name in names] == ["dali", "dali-gpu", "pil", "dali"]
    assert [resolve_decoder(name, gpu) for name in names] == ["dali", "dali-gpu", "pil", "dali-gpu"]
    with pytest.raises(ValueError, match="decoder must be auto, dali, dali-gpu or pil, got 'cv2'"):
        resolve_decoder("cv2", gpu)
    with loader_of(decoder="dali-gpu", channels=3) as loader:
        assert loader.decoder == "dali"  # with channels, everything is done on the CPU
    with loader_of(decoder="pil", channels=3) as loader:
        assert loader.decoder == "pil"
    for module in (pretraining, decoding):
        monkeypatch.setattr(module, "has_dali", lambda: False)
    assert [resolve_decoder("auto", device) for device in (cpu, gpu)] == ["pil", "pil"]


def test_a_gpus_decoder_is_refused_where_it_cannot_be(monkeypatch):
    """A GPU is only pretended: its resizer is recorded, with the one on the CPU that takes what it cannot read."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(pretraining, "DaliResizer", lambda device, threads, on_cpu: made.append(on_cpu) or made)
    for options in ({"device": "cpu"}, {"device": "cuda", "jitter_center": "image"}):
        with pytest.raises(ValueError, match="decoder dali-gpu needs device cuda and jitter_center view, got c"):
            loader_of(decoder="dali-gpu", **options)
    assert not made
    with loader_of(decoder="dali-gpu", device="cuda") as loader:
        assert loader._resizer is made
    assert isinstance(made[0].decoder, PilDecoder)
    assert not made[0].whole_image
    with loader_of(decoder="dali", device="cuda", jitter_center="image") as loader:
        assert loader._resizer.whole_image
    assert len(made) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": BlockwiseMasking((1, 1), 1, min_num_patches=1), "image_size": 1, "token_image_size": 1}, None),
        ({"image_size": 18}, r"image_size 18 is not a multiple of the mask's grid \(2, 4\)"),
        ({"image_size": (16, 18)}, r"image_size \(16, 18\) is not a multiple"), ({"image_size": (18, 16)}, None),
        ({"image_size": 0}, "image_size 0 is not"), ({"token_image_size": 0}, "token_image_size 0 is not"),
        ({"token_image_size": (8, 6)}, r"token_image_size \(8, 6\) is not"), ({"token_image_size": None}, None),
        ({"view_cycle": 0}, "view_cycle must be at least 1, got 0"), ({"view_cycle": 1}, None),
        ({"token_store": Store(cycle=2), "view_cycle": 2}, None),
        ({"token_store": Store(cycle=2), "view_cycle": 3},
         r"token_store holds 8 tokens per view in a cycle of 2; the grid is \(2, 4\) and view_cycle 3"),
        ({"token_store": Store(cycle=2), "view_cycle": 2, "masking": BlockwiseMasking((2, 2), 1, min_num_patches=1)},
         r"the grid is \(2, 2\)"),
        ({"jitter_center": "middle"}, "jitter_center must be view or image, got 'middle'"),
    ],
)  # fmt: skip
def test_what_a_loader_takes(options, message):
    if message is None:
        loader_of(**options).close()
        return
    with pytest.raises(ValueError, match=message):
        loader_of(**options)


def test_channels_of_their_own_are_kept():
    """Five values of five channels come through: the tokenizer's as they are, the model's normalised."""
    picture = np.broadcast_to(np.array([0.0, 0.25, 0.5, 0.75, 1.0], np.float32), (12, 12, 5))
    options = {"channels": 5, "mean": (0.5,) * 5, "std": (0.5,) * 5, "value_range": (0.0, 1.0)}
    (batch,) = batches_of(Request(0, np.arange(3)), source=ArraySource([picture] * 3), sampler=PLAIN, **options)
    values = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])[:, None, None]
    torch.testing.assert_close(batch.token_images, values.expand(3, 5, 8, 8))
    torch.testing.assert_close(batch.images, (values * 2 - 1).expand(3, 5, 16, 16))
