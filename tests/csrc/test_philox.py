"""Philox4x32-10 against the known answers published with the Random123 library."""

import numpy as np
import pytest

from beit_fast import _C


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],  # digits of pi
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert list(_C.philox4x32_10(counter, key)) == answer


def test_sample_keys_are_the_documented_block() -> None:
    seed, epoch, sample = 0x0123456789ABCDEF, 77, 0x1_0000_0005
    low, high, _, _ = _C.philox4x32_10([5 << 28, epoch, 5, 1], [seed & 0xFFFFFFFF, seed >> 32])
    key = _C.sample_keys([sample], seed, epoch)[0]
    assert np.uint64(key.astype(np.uint64)) == np.uint64(high << 32 | low)


def test_sample_keys_are_distinct_and_balanced() -> None:
    keys = np.concatenate([_C.sample_keys(np.arange(5000), seed, epoch) for seed in (0, 1) for epoch in (0, 1)])
    assert len(np.unique(keys)) == keys.size
    bits = np.unpackbits(keys.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(keys.size)


def test_sample_keys_do_not_depend_on_the_batch() -> None:
    indices = np.array([9, 3, 2**62, 3])
    together = _C.sample_keys(indices, 5, 6)
    assert together[1] == together[3]
    assert [_C.sample_keys([i], 5, 6)[0] for i in indices] == together.tolist()
