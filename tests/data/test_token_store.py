"""The token cache: what is read is what was written, or nothing, whatever happened to the file in between."""

import inspect
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit_fast.data import token_store
from beit_fast.data.token_store import HEADER_BYTES, TokenStore

SETTINGS = {"seed": 3, "tokenizer_sha256": "ab12", "scale": (0.08, 1.0)}
SAMPLES, TOKENS, CYCLE = 40, 196, 3


def expected(epoch, index, tokens=TOKENS):
    """What the killed writers below write, too."""
    return np.random.default_rng([epoch % CYCLE, index]).integers(0, 8192, tokens).astype(np.uint16)


def opened(path, samples=SAMPLES, tokens=TOKENS, cycle=CYCLE, **changes):
    return TokenStore(path, num_samples=samples, num_tokens=tokens, cycle=cycle, settings=SETTINGS | changes)


def fill(store, epochs=range(CYCLE), indices=range(SAMPLES)):
    for epoch in epochs:
        store.write(epoch, np.array(list(indices)), np.stack([expected(epoch, i) for i in indices]))


def check(store):
    """How many records are there; each has to be right."""
    there = 0
    for epoch in range(store.cycle):
        tokens, present = store.read(epoch, np.arange(store.num_samples))
        for index in range(store.num_samples):
            wanted = expected(epoch, index) if present[index] else np.zeros(store.num_tokens)
            np.testing.assert_array_equal(tokens[index], wanted)
        there += int(present.sum())
    return there


def test_read_what_was_written(tmp_path):
    path = tmp_path / "deep" / "tokens"
    with opened(path) as store:
        assert check(store) == 0
        fill(store, epochs=[0, 4], indices=range(5, 25))  # 4 is epoch 1 of the cycle
        assert check(store) == 40
        tokens, present = store.read(7, np.array([24, 5, 39, 24]))
        assert present.tolist() == [True, True, False, True]
        np.testing.assert_array_equal(tokens[[0, 1, 3]], [expected(1, 24), expected(1, 5), expected(1, 24)])
    with opened(path) as store:
        assert check(store) == 40
        assert store.note is None
    assert path.stat().st_size == HEADER_BYTES + CYCLE * SAMPLES * (2 * TOKENS + 4)


def test_two_writers_share_a_store(tmp_path):
    with opened(tmp_path / "tokens") as one, opened(tmp_path / "tokens") as two:
        fill(one, epochs=[0])
        fill(two, epochs=[1, 2])
        assert check(one) == check(two) == CYCLE * SAMPLES


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 4}, "seed 3, now 4"),
        ({"tokenizer_sha256": "cd"}, "tokenizer_sha256 ab12, now cd"),
        ({"scale": (0.2, 1.0)}, "scale [0.08, 1.0], now [0.2, 1.0]"),
        ({"precision": "bf16"}, "precision None, now bf16"),
        ({"cycle": 2}, "view_cycle 3, now 2"),
        ({"samples": 41, "seed": 5}, "num_samples 40, now 41, seed 3, now 5"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, changes, said):
    opened(tmp_path / "tokens").close()
    with pytest.raises(ValueError, match=f"made with {re.escape(said)};"):
        opened(tmp_path / "tokens", **changes)


def test_too_little_space(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store.shutil, "disk_usage", lambda path: type("U", (), {"free": 50_000})())
    with pytest.raises(OSError, match=r"needs 0 MiB, the disk has 0 MiB free; give another --data\.token-cache"):
        opened(tmp_path / "tokens", samples=100)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("damage", ["magic", "settings", "padding", "truncated", "empty", "longer"])
def test_a_damaged_store_is_begun_anew(tmp_path, damage):
    path = tmp_path / "tokens"
    with opened(path) as store:
        fill(store)
    data = bytearray(path.read_bytes())
    if damage in ("magic", "settings", "padding"):
        data[{"magic": 3, "settings": 40, "padding": 4000}[damage]] ^= 1
    else:
        data = {"truncated": data[:-1], "empty": b"", "longer": data + b"\0"}[damage]
    path.write_bytes(data)
    with opened(path) as store:
        assert "is damaged: begun anew" in store.note
        assert check(store) == 0
        fill(store)
        assert check(store) == CYCLE * SAMPLES
    assert (tmp_path / "tokens.damaged").read_bytes() == data


def test_wrong_arguments(tmp_path):
    with opened(tmp_path / "tokens") as store:
        with pytest.raises(ValueError, match="indices must lie in"):
            store.read(0, np.array([SAMPLES]))
        with pytest.raises(ValueError, match="tokens must be"):
            store.write(0, np.array([0]), np.zeros((1, 5), int))
        with pytest.raises(ValueError, match="tokens must lie in"):
            store.write(0, np.array([0]), np.full((1, TOKENS), 1 << 16))
    with pytest.raises(ValueError, match="is not a file"):
        opened(tmp_path)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_record_is_absent(tmp_path_factory, data):
    """Bits flipped, bytes lost, a record at another's place: never a wrong token."""
    path = tmp_path_factory.mktemp("store") / "tokens"
    with opened(path, samples=4, tokens=9, cycle=1) as store:
        rows = np.stack([expected(0, i, 9) for i in range(4)])
        store.write(0, np.arange(4), rows)
        size = store.record_bytes
        raw = bytearray(path.read_bytes())
        record = data.draw(st.integers(0, 3))
        start = HEADER_BYTES + record * size
        kind = data.draw(st.sampled_from(["flip", "tail", "head", "moved", "noise"]))
        cut = data.draw(st.integers(0, size - 1))
        old = bytes(raw[start : start + size])
        if kind == "flip":
            raw[start + cut] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "tail":
            raw[start + cut : start + size] = bytes(size - cut)
        elif kind == "head":
            raw[start : start + cut + 1] = bytes(cut + 1)
        elif kind == "moved":
            other = HEADER_BYTES + (record + 1) % 4 * size
            raw[start : start + size] = raw[other : other + size]
        else:
            raw[start : start + size] = data.draw(st.binary(min_size=size, max_size=size))
        path.write_bytes(raw)  # the same file: the map sees it
        tokens, present = store.read(0, np.arange(4))
        intact = bytes(raw[start : start + size]) == old
        assert present.tolist() == [intact or i != record for i in range(4)]
        np.testing.assert_array_equal(tokens[present], rows[present])
        assert store.damaged_records in (0, int(not intact))
        store.write(0, np.array([record]), rows[record : record + 1])
        assert store.read(0, np.arange(4))[1].all()


LAUNCHER = f"""
import importlib.util, os, pathlib, signal, sys, time
import numpy as np

# the file alone: the package would first import torch
spec = importlib.util.spec_from_file_location("token_store", {token_store.__file__!r})
token_store = importlib.util.module_from_spec(spec)
spec.loader.exec_module(token_store)
CYCLE, TOKENS = {CYCLE}, {TOKENS}
{inspect.getsource(expected)}
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for number, line in enumerate(sys.stdin):
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    path = pathlib.Path(line.rstrip())
    store = token_store.TokenStore(path, num_samples=400, num_tokens=TOKENS, cycle=CYCLE, settings={SETTINGS})
    order = np.random.default_rng(number)
    end = time.monotonic() + 600  # should it not be killed
    while time.monotonic() < end:
        epoch, indices = int(order.integers(3)), order.integers(0, 400, 8)
        store.write(epoch, indices, np.stack([expected(epoch, int(i)) for i in indices]))
    os._exit(0)
"""


def count_of(path):
    """How many records are there while they are written."""
    if not path.exists():
        return 0
    with opened(path, samples=400) as store:
        return check(store)


def kill_writers_and_check(path, times, writers):
    """Writers killed at random moments, from the creation of the file on: each record is then right or absent."""
    clock = random.Random(0)
    counts = []
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        for turn in range(times):
            running = []
            for _ in range(writers):
                launcher.stdin.write(f"{path}\n")
                launcher.stdin.flush()
                running.append(int(launcher.stdout.readline()))
            while (turn % 2 and not path.exists()) or (turn == times - 1 and count_of(path) <= 20):
                time.sleep(0.01)
            time.sleep(clock.uniform(0, 0.4))
            for process in running:
                os.kill(process, signal.SIGKILL)
            if path.exists():
                with opened(path, samples=400) as store:
                    counts.append(check(store))
                    assert store.note is None
    finally:
        launcher.kill()
        launcher.wait()
        launcher.stdin.close()
        launcher.stdout.close()
    assert counts == sorted(counts)
    assert counts[-1] > 20


def test_killed_writers_leave_no_wrong_token(tmp_path):
    kill_writers_and_check(tmp_path / "tokens", times=3, writers=2)


@pytest.mark.slow
def test_writers_killed_twenty_times_leave_no_wrong_token(tmp_path):
    kill_writers_and_check(tmp_path / "tokens", times=20, writers=3)
