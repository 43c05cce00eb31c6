"""The token cache's file byte by byte, its limits, and every error with its numbers."""

import errno
import os
import re
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from beit_fast.data import token_store
from beit_fast.data.token_store import RowFile, TokenStore, check_store, create_row_file, require_space

SETTINGS = {"tokenizer": "ab12", "scale": (0.08, 1.0)}
SHAPE = {"num_samples": 3, "num_tokens": 2, "cycle": 2}
TEXT = b'{"num_samples": 3, "num_tokens": 2, "scale": [0.08, 1.0], "tokenizer": "ab12", "view_cycle": 2}'
MEBIBYTE = 2**20


def header_of(text, magic=b"beit_fast tokens 1\n"):
    return (magic + struct.pack("<II", zlib.crc32(text), len(text)) + text).ljust(4096, b"\0")


def record_of(number, tokens):
    data = struct.pack(f"<{len(tokens)}H", *tokens)
    seed = zlib.crc32(struct.pack("<Q", number), zlib.crc32(header_of(TEXT)))
    return data + struct.pack("<I", zlib.crc32(data, seed) or 1)


def opened(path, settings=SETTINGS, **shape):
    return TokenStore(path, **SHAPE | shape, settings=settings)


def free_space(monkeypatch, free):
    monkeypatch.setattr(token_store.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_the_file_is_what_its_description_says(tmp_path):
    """Sample 2 in epoch 5 is record 1 * 3 + 2 of a cycle of two epochs; no other record is touched."""
    path = tmp_path / "two" / "folders" / "tokens"
    with opened(path) as store:
        store.write(5, np.array([2]), np.array([[7, 8191]]))
    written = header_of(TEXT) + bytes(5 * 8) + record_of(5, [7, 8191])
    assert path.read_bytes() == written
    path.write_bytes(header_of(TEXT) + record_of(0, [1, 2]) + bytes(3 * 8) + record_of(4, [3, 4]) + bytes(8))
    with opened(path) as store:
        for epoch, expected in ((0, [[1, 2], [0, 0]]), (3, [[0, 0], [3, 4]])):
            tokens, present = store.read(epoch, np.array([0, 1]))
            assert tokens.tolist() == expected
            assert present.tolist() == [any(row) for row in expected]
        assert (store.note, store.damaged_records) == (None, 0)


def test_a_checksum_of_zero_is_kept_as_one(tmp_path):
    """Tokens made so that their crc32 is 0, which stands for "not written"."""
    seed = zlib.crc32(struct.pack("<Q", 1), zlib.crc32(header_of(TEXT)))
    data = struct.pack("<I", 0x6DD90A9D ^ seed)  # the four bytes of crc32 0, moved by where it starts
    assert zlib.crc32(data, seed) == 0
    tokens = np.frombuffer(data, "<u2")[None]
    with opened(tmp_path / "tokens") as store:
        store.write(0, np.array([1]), tokens)
        found, present = store.read(0, np.array([1]))
    assert present.tolist() == [True]
    np.testing.assert_array_equal(found, tokens)
    assert (tmp_path / "tokens").read_bytes()[4096 + 8 : 4096 + 16] == data + b"\1\0\0\0"


def test_the_order_of_the_settings_does_not_count(tmp_path):
    with opened(tmp_path / "tokens") as store:
        store.write(0, np.array([1]), np.array([[5, 6]]))
    with opened(tmp_path / "tokens", dict(reversed(SETTINGS.items()))) as store:
        assert store.read(0, np.arange(3))[1].tolist() == [False, True, False]


def test_the_largest_and_smallest_values(tmp_path):
    rows = np.array([[0, 0], [65535, 65535], [0, 65535]])
    with opened(tmp_path / "tokens") as store:
        store.write(0, np.arange(3), rows)
        np.testing.assert_array_equal(store.read(0, np.arange(3))[0], rows)
        for wrong, said in (([[-1, 0]], "[-1, 0]"), ([[0, 65536]], "[0, 65536]")):
            with pytest.raises(ValueError, match=re.escape(f"tokens must lie in [0, 65536), got {said}")):
                store.write(0, np.array([0]), np.array(wrong))
        for indices in ([-1, 0], [0, 3]):
            with pytest.raises(ValueError, match=re.escape(f"indices must lie in [0, 3), got {indices}")):
                store.read(0, np.array(indices))
        store.write(1, np.array([0]), np.array([[7, 7]]))
        store.write(0, np.zeros(0, int), np.zeros((0, 2), int))
        assert store.read(0, np.zeros(0, int))[0].shape == (0, 2)


@pytest.mark.parametrize("name", sorted(SHAPE))
def test_every_size_is_at_least_one(tmp_path, name):
    opened(tmp_path / "tokens", **{name: 1}).close()
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        opened(tmp_path / "other", **{name: 0})


def test_sizes_are_given_by_name_alone(tmp_path):
    for function in (TokenStore, check_store):
        with pytest.raises(TypeError):
            function(tmp_path / "tokens", 3, 2, 2, {})
    assert list(tmp_path.iterdir()) == []


def test_settings_may_fill_the_header_and_no_more(tmp_path):
    room = 4096 - len(b"beit_fast tokens 1\n") - 8 - len(TEXT)
    opened(tmp_path / "tokens", SETTINGS | {"tokenizer": "x" * (room + 4)}).close()
    with pytest.raises(ValueError, match="settings of the token cache take 4097 bytes, more than 4096"):
        opened(tmp_path / "other", SETTINGS | {"tokenizer": "x" * (room + 5)})


@pytest.mark.parametrize(
    "header",
    [
        header_of(TEXT, magic=b"beit_fast tokens 2\n"),
        header_of(TEXT)[:2000],
        header_of(TEXT).replace(b"ab12", b"ab13"),
        header_of(TEXT.replace(b", ", b",")),
        header_of(b"[1]"),
        header_of(b'"text"'),
        header_of(b"{"),
        header_of(b"\xff"),
        header_of(b"[" * 2000),
        header_of(b'{"tokenizer": "' + "\u00e9".encode() * 1000 + b'"}'),
    ],
    ids=["version", "short", "changed", "spelled otherwise", "list", "text", "cut", "bytes", "deep", "longer anew"],
)
def test_any_other_header_is_damage(tmp_path, header):
    path = tmp_path / "tokens"
    path.write_bytes(header + bytes(48))
    with opened(path) as store:
        assert store.note == f"token cache {path} is damaged: begun anew, the old file is {path}.damaged"
    assert path.read_bytes() == header_of(TEXT) + bytes(48)


# Space.


def test_a_check_says_what_opening_would_and_writes_nothing(tmp_path, monkeypatch):
    path, size = tmp_path / "tokens", 4096 + 2 * 3 * 8
    free_space(monkeypatch, size)
    check_store(path, **SHAPE, settings=SETTINGS)
    assert list(tmp_path.iterdir()) == []
    opened(path).close()
    free_space(monkeypatch, size - 1)
    check_store(path, **SHAPE, settings=SETTINGS)
    with pytest.raises(ValueError, match="tokenizer ab12, now cd"):
        check_store(path, **SHAPE, settings=SETTINGS | {"tokenizer": "cd"})
    for damage in (lambda: path.write_bytes(b""), path.unlink):
        damage()
        with pytest.raises(OSError, match="needs 0 MiB") as error:
            check_store(path, **SHAPE, settings=SETTINGS)
        assert error.value.errno == errno.ENOSPC


def test_too_little_space_is_named_in_mebibytes(tmp_path, monkeypatch):
    free_space(monkeypatch, 5 * MEBIBYTE)
    with pytest.raises(OSError) as error:
        require_space(tmp_path / "new" / "tokens", 1200 * MEBIBYTE)
    assert error.value.strerror == (
        f"token cache {tmp_path / 'new' / 'tokens'} needs 1,200 MiB, the disk has 5 MiB free; give another "
        "--data.token-cache, a smaller --data.view-cycle, or --data.token-cache off"
    )


def test_space_is_reserved_before_the_name_is_there(tmp_path, monkeypatch):
    reserved, reserve = [], os.posix_fallocate

    def spy(file, start, size):
        assert not (tmp_path / "rows").exists()
        reserved.append((start, size))
        reserve(file, start, size)

    monkeypatch.setattr(token_store.os, "posix_fallocate", spy)
    create_row_file(tmp_path / "rows", b"head", 10_000)
    assert reserved == [(0, 10_000)]
    assert (tmp_path / "rows").read_bytes() == b"head" + bytes(9996)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV, errno.ENOSPC, errno.EIO])
def test_file_systems_that_cannot_reserve_and_disks_that_are_full(tmp_path, monkeypatch, code):
    def refuse(file, start, size):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(token_store.os, "posix_fallocate", refuse)
    free_space(monkeypatch, 3 * MEBIBYTE // 2)
    if code in (errno.ENOSPC, errno.EIO):
        said = f"cannot write {tmp_path / 'rows'}: {os.strerror(code)}; 0.01 MiB are needed, 1.50 MiB free: free some"
        with pytest.raises(OSError, match=re.escape(said)):
            create_row_file(tmp_path / "rows", b"head", 10_000)
        assert list(tmp_path.iterdir()) == []
    else:
        create_row_file(tmp_path / "rows", b"head", 10_000)
        assert (tmp_path / "rows").read_bytes() == b"head" + bytes(9996)


# Rows.


def test_a_full_disk_is_named_with_what_is_needed(monkeypatch, tmp_path):
    free_space(monkeypatch, 7 * MEBIBYTE // 2)
    full = RowFile(token_store.Path("/dev/full"), 0, 5 * MEBIBYTE // 4)
    with pytest.raises(OSError) as error:
        full.write(0, bytes(5 * MEBIBYTE // 4))
    said = "No space left on device; 1.25 MiB are needed, 3.50 MiB free: free some space or put it on another disk"
    assert str(error.value) == f"cannot write /dev/full: {said}"
    full.close()
    (tmp_path / "rows").write_bytes(bytes(8))
    cut_short = RowFile(tmp_path / "rows", 0, 4)
    monkeypatch.setattr(token_store.os, "pwrite", lambda file, data, place: len(data) - 1)
    with pytest.raises(OSError, match=r"No space left on device; 0\.00 MiB are needed"):
        cut_short.write(1, b"four")
    cut_short.close()


def test_a_row_that_is_not_whole_is_zeros(tmp_path):
    (tmp_path / "rows").write_bytes(b"head" + b"abcd" + b"ef")
    rows = RowFile(tmp_path / "rows", 4, 4)
    found, whole = rows.read(np.array([1, 0, 2]))
    assert whole.tolist() == [False, True, False]
    assert found.tolist() == [[0] * 4, list(b"abcd"), [0] * 4]
    rows.close()


def test_a_disk_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "rows").write_bytes(bytes(8))
    rows = RowFile(tmp_path / "rows", 0, 4)

    def broken(file, buffers, place):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(token_store.os, "preadv", broken)
    with pytest.raises(OSError) as error:
        rows.read(np.array([0]))
    assert error.value.errno == errno.EIO
    said = f"cannot read {tmp_path / 'rows'}: Input/output error; mend the disk, or delete it"
    assert error.value.strerror == said
    rows.close()


def test_a_file_is_closed_once_whatever_its_number(tmp_path, monkeypatch):
    """Number 0 is a file like any other, where standard input is closed; what was never opened is not closed."""
    closed = []
    (tmp_path / "rows").write_bytes(bytes(8))
    with monkeypatch.context() as patched:
        patched.setattr(token_store.os, "open", lambda path, flags: 0)
        patched.setattr(token_store.os, "close", closed.append)
        rows = RowFile(tmp_path / "rows", 0, 4)
        rows.close()
        rows.close()
        del rows
        assert closed == [0]
    monkeypatch.setattr(token_store.os, "close", closed.append)
    with pytest.raises(FileNotFoundError):
        RowFile(tmp_path / "missing", 0, 4)
    assert closed == [0]


def test_a_file_that_may_only_be_read_is_read(tmp_path, monkeypatch):
    (tmp_path / "rows").write_bytes(b"abcd")
    monkeypatch.setattr(token_store.os, "access", lambda path, mode: False)
    rows = RowFile(tmp_path / "rows", 0, 4)
    assert rows.read(np.array([0]))[0].tolist() == [list(b"abcd")]
    with pytest.raises(OSError, match="Bad file descriptor"):
        rows.write(0, b"efgh")
    rows.close()
