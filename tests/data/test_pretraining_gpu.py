"""The GPU's ways to the same batches. Run with `pytest -m gpu` on a machine that has one."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data import ArraySource, BlockwiseMasking, CropSampler, PretrainLoader, Request, open_source

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MASKING = BlockwiseMasking((14, 14), 75)


def make(source, requests, **options):
    with PretrainLoader(source, MASKING, CropSampler(), seed=3, **options) as views:
        return list(views.batches(requests))


def levels(first, second):
    difference = (first.cpu() - second.cpu()).abs()
    return difference.mean().item() * 127.5, difference.max().item() * 127.5


@pytest.mark.parametrize("decoder", ["dali", "dali-gpu"])
def test_batches_are_those_of_the_cpu(tmp_path, photographs, decoder):
    for i, data in enumerate(photographs):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    source = open_source(tmp_path)
    requests = [Request(e, np.arange(8)) for e in range(3)]
    for gpu, cpu in zip(make(source, requests, device="cuda", decoder=decoder), make(source, requests), strict=True):
        assert gpu.images.is_cuda
        assert gpu.mask.is_cuda
        assert torch.equal(gpu.mask.cpu(), cpu.mask)
        assert torch.equal(gpu.indices, cpu.indices)
        assert torch.equal(gpu.sample_keys.cpu(), cpu.sample_keys)
        # nvJPEG's inverse transform and chroma upsampling round otherwise than libjpeg-turbo's.
        mean, largest = levels(gpu.images, cpu.images)
        assert mean < (0.01 if decoder == "dali" else 2)
        assert largest < (0.1 if decoder == "dali" else 64)
        assert levels(gpu.token_images, cpu.token_images)[0] < (0.01 if decoder == "dali" else 2)


def test_split_does_not_matter_and_damage_is_replaced(tmp_path, photographs, good_files, damaged_files):
    """A JPEG that nvJPEG refuses must cost one image, not the batch."""
    files = {f"a{i}.jpg": data for i, data in enumerate(photographs)} | {f"{k}.jpg": v for k, v in good_files.items()}
    files["z.jpg"] = damaged_files["jpeg_damaged_tables"]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    source = open_source(tmp_path)
    length = len(source)
    whole = make(source, [Request(0, np.arange(length))], device="cuda")
    parts = make(source, [Request(0, part) for part in np.array_split(np.arange(length), 5)], device="cuda")
    assert torch.equal(whole[0].indices, torch.cat([part.indices for part in parts]))
    assert not any(source.name(i).endswith("z.jpg") for i in whole[0].indices.tolist())
    mean, _ = levels(whole[0].images, torch.cat([part.images for part in parts]))
    assert mean < 1e-3


def test_consumer_streams_wait(photographs):
    """Batches are made on a side stream; reading them at once must not see unfinished work."""
    decoded = [np.asarray(Image.open(io.BytesIO(data))) for data in photographs]
    source = ArraySource(decoded)
    requests = [Request(e, np.arange(8)) for e in range(20)]
    sums = [batch.images.double().sum().item() for batch in make(source, requests, device="cuda", decoder="dali")]
    expected = [batch.images.double().sum().item() for batch in make(source, requests, device="cpu")]
    assert np.allclose(sums, expected, rtol=1e-4)


def test_batches_in_flight_leave_each_other_alone(tmp_path, photographs):
    """The producer never waits for the device: outputs of DALI that are taken back too early would show here."""
    for i, data in enumerate(photographs):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    source = open_source(tmp_path)
    requests = [Request(e, np.arange(8)) for e in range(20)]
    ahead = make(source, requests, device="cuda", decoder="dali-gpu", prefetch=4)
    for batch, request in zip(ahead, requests, strict=True):
        alone = make(source, [request], device="cuda", decoder="dali-gpu")[0]
        torch.cuda.synchronize()
        assert torch.equal(batch.images, alone.images)
        assert torch.equal(batch.token_images, alone.token_images)
