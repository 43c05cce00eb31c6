"""The same data at any batch size, number of processes, threads and batches made ahead (hypothesis)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit_fast.data import BlockwiseMasking
from beit_fast.data.pretraining import PretrainLoader
from beit_fast.data.sampling import CropSampler
from beit_fast.data.sources import open_source
from beit_fast.train.config import RunConfig
from beit_fast.train.schedules import requests_of

MASKING = BlockwiseMasking((2, 2), 2, min_num_patches=1)
SPLITS = [(batch, size) for batch in (2, 4, 6, 8, 12, 24) for size in (1, 2, 3, 4) if not batch % size]
FIELDS = ("images", "token_images", "mask", "sample_keys")


@pytest.fixture(scope="module")
def source(tmp_path_factory, photographs):
    root = tmp_path_factory.mktemp("photographs")
    for number in range(24):
        (root / f"{number:02d}.jpg").write_bytes(photographs[number % len(photographs)])
    return open_source(root)


def samples_of(source, batch, per_device, size, threads, prefetch):
    """(epoch, place in the data) -> the tensors of two epochs of 24 images, over all ranks; all are met once."""
    config = RunConfig(batch_size=batch, batch_per_device=per_device)
    samples = {}
    for rank in range(size):
        requests = list(requests_of(0, 2 * (24 // batch), 24 // batch, config, rank, size))
        sizes = {"image_size": 32, "token_image_size": 16, "threads": threads, "prefetch": prefetch}
        with PretrainLoader(source, MASKING, CropSampler(), seed=3, decoder="pil", **sizes) as loader:
            for request, made in zip(requests, loader.batches(requests), strict=True):
                for row, index in enumerate(made.indices.tolist()):
                    values = tuple(getattr(made, field)[row].numpy().tobytes() for field in FIELDS)
                    assert (request.epoch, index) not in samples
                    samples[request.epoch, index] = values
    assert len(samples) == 48
    return samples


@pytest.fixture(scope="module")
def expected(source):
    return samples_of(source, 24, 24, 1, 1, 1)


@settings(max_examples=6, deadline=None)
@given(
    split=st.sampled_from(SPLITS), per_device=st.integers(1, 9), threads=st.integers(1, 3), prefetch=st.integers(1, 4)
)
def test_every_split_gives_every_sample_the_same_data(source, expected, split, per_device, threads, prefetch):
    batch, size = split
    assert samples_of(source, batch, per_device, size, threads, prefetch) == expected
