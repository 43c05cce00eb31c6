"""Every file of a checkpoint by hand, and each way in which one is refused, cannot be written, or makes room."""

import dataclasses
import errno
import json
import os
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from beit_fast.train.checkpoint import format as checkpoint
from beit_fast.train.checkpoint.format import Checkpoint, DamagedCheckpoint

MIB = 1 << 20


def saved(root, *steps, keep=99, **state):
    for step in steps:
        checkpoint.save_checkpoint(root, step, {"model": {"w": torch.full((2,), float(step))}}, state, keep)
    return root / f"step_{steps[-1]:08d}"


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_a_file_of_tensors_by_the_bytes(tmp_path):
    """safetensors: length, header padded to eight, data; the widest type first, then by name."""
    tensors = {
        "b": torch.tensor([1, 2, 3], dtype=torch.int8), "z": torch.tensor([[1.0], [2.0]]).bfloat16(),
        "c": torch.tensor([7], dtype=torch.int16), "a": torch.tensor(5, dtype=torch.int64),
    }  # fmt: skip
    header = (
        b'{"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"c":{"dtype":"I16","shape":[1],"data_offsets":[8,10]},'
        b'"z":{"dtype":"BF16","shape":[2,1],"data_offsets":[10,14]},"b":{"dtype":"I8","shape":[3],"data_offsets":[14,17]}}'
    )
    for padding in range(8):  # a name that is longer by one each time
        name = "b" * (padding + 1)
        text = header.replace(b'"b"', f'"{name}"'.encode())
        text += b" " * ((8 - len(text)) % 8)
        data = b"\5" + bytes(7) + b"\7\0" + b"\x80\x3f\x00\x40" + b"\1\2\3"
        expected = len(text).to_bytes(8, "little") + text + data
        crc = checkpoint.write_tensors(tmp_path / "t", {name if n == "b" else n: t for n, t in tensors.items()})
        assert (tmp_path / "t").read_bytes() == expected
        assert crc == zlib.crc32(expected) == checkpoint.file_crc32(tmp_path / "t")
    assert checkpoint.tensor_bytes(tensors) == 17
    with safe_open(str(tmp_path / "t"), framework="pt") as file:
        assert file.metadata() is None


def test_a_part_says_where_it_begins(tmp_path):
    """As torch.distributed.checkpoint reads it."""
    checkpoint.write_tensors(tmp_path / "t", {"w": torch.ones(2, 3)}, {"w": (4, 0)})
    with safe_open(str(tmp_path / "t"), framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop("DCP_SHARDING_INFO")) == {"w": {"saved_offsets": [4, 0]}}
    assert metadata == {"format": "pt", "DCP_VERSION": "1.0"}


def test_a_folder_by_its_files(tmp_path):
    path = saved(tmp_path / "not" / "there", 7, note="x")
    assert names(path) == ["manifest.json", "model.safetensors", "state.json"]
    assert (path / "state.json").read_text() == '{\n "note": "x",\n "step": 7\n}\n'
    files = {
        name: {"bytes": (path / name).stat().st_size, "crc32": zlib.crc32((path / name).read_bytes())}
        for name in ("model.safetensors", "state.json")
    }
    assert json.loads((path / "manifest.json").read_text()) == {"format": 1, "step": 7, "files": files}
    found = checkpoint.verify(path)
    assert found == Checkpoint(path, 7, {"note": "x", "step": 7})
    assert found.names("model") == ["w"]
    (path / "optimizer").mkdir()
    assert [found.has(name) for name in ("model", "optimizer", "average")] == [True, True, False]
    assert [found.is_sharded(name) for name in ("model", "optimizer", "average")] == [False, True, False]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.step = 8


def test_the_folder_of_parts_is_on_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    """A power cut leaves no checkpoint whose parts have no names; no kill can see it, so calls are recorded."""
    calls, real, work = [], os.fsync, tmp_path / ".tmp-work"
    entries = checkpoint.write_entry(work, "model/shard-00001-of-00001.safetensors", {"w": torch.ones(2)})

    def fsync(descriptor):
        calls.append((os.readlink(f"/proc/self/fd/{descriptor}"), work.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.commit(work, tmp_path / "step_00000003", entries, {"step": 3})
    assert {(str(work / "model"), True), (str(work), True)} <= set(calls)
    assert calls[-1] == (str(tmp_path), False)
    assert checkpoint.verify(tmp_path / "step_00000003").is_sharded("model")


def test_what_counts_as_a_checkpoint(tmp_path):
    steps = {
        "step_00000012": 12,
        "step_3": 3,
        "12": None,
        "other_12": None,
        "step_x": None,
        "damaged-step_00000012": None,
    }
    assert {name: checkpoint.step_of(tmp_path / name) for name in steps} == steps
    for name in steps:
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000020").write_text("no folder")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_3", "step_00000012"]
    assert checkpoint.list_checkpoints(tmp_path / "12" / "missing") == []


GOOD = {"bytes": 0, "crc32": 0}


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "manifest.json is missing"), ("{", "manifest.json is unreadable (JSONDecodeError)"),
        ("{}", "manifest.json is unreadable (KeyError)"), ("[]", "manifest.json is unreadable (TypeError)"),
        ("[" * 100_000, "manifest.json is unreadable (RecursionError)"),
        ('{"step": 1e999, "files": {}}', "manifest.json is unreadable (OverflowError)"),
        ({"step": 4}, "manifest.json does not describe this folder"),
        ({"files": {"model.safetensors": GOOD}}, "manifest.json does not describe this folder"),
        ({"../a": GOOD, "../b": GOOD}, "manifest.json names ../a, which lies outside of the checkpoint"),
        ({"x/../../a": GOOD}, "manifest.json names x/../../a, which lies outside of the checkpoint"),
        ({"/etc/hostname": GOOD}, "manifest.json names /etc/hostname, which lies outside of the checkpoint"),
        ({"model.safetensors": GOOD}, "model.safetensors has 72 bytes instead of 0"),
        ({"model.safetensors": {"bytes": 72, "crc32": 1}}, "model.safetensors does not match its crc32"),
        ({"lost": GOOD}, "lost: No such file or directory"), ({"state.json/x": GOOD}, "state.json/x: Not a directory"),
        ({"folder": "its size"}, "folder: Is a directory"),
    ],
)  # fmt: skip
def test_what_a_manifest_must_say(tmp_path, manifest, message):
    path = saved(tmp_path, 3)
    (path / "folder").mkdir()
    if manifest is None:
        (path / "manifest.json").unlink()
    elif isinstance(manifest, str):
        (path / "manifest.json").write_text(manifest)
    else:
        value = json.loads((path / "manifest.json").read_text())
        if "folder" in manifest:
            manifest = {"folder": {"bytes": (path / "folder").stat().st_size, "crc32": 0}}
        if not {"step", "files"} & manifest.keys():
            manifest = {"files": value["files"] | manifest}
        value |= manifest
        (path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(DamagedCheckpoint) as caught:
        checkpoint.verify(path)
    assert str(caught.value) == message
    assert checkpoint.newest_checkpoint(tmp_path) == (None, [(path, message)])


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError("odd")])
def test_what_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch, error):
    path = saved(tmp_path, 3)

    def broken(path):
        raise error

    monkeypatch.setattr(checkpoint, "file_crc32", broken)
    with pytest.raises(OSError, match="nothing was changed: mend what keeps it from being read") as caught:
        checkpoint.newest_checkpoint(tmp_path)
    assert f"cannot read the checkpoint {path} now ({error.strerror or 'odd'}); " in str(caught.value)
    assert caught.value.errno == error.errno


STATE = {"total_steps": 9, "skipped": 0, "identity": {}, "interval": {}, "scaler": {}, "metrics": {}}


@pytest.mark.parametrize("name", sorted(STATE))
def test_what_a_state_must_hold(tmp_path, name):
    checkpoint.check_state(Checkpoint(tmp_path, 3, STATE))
    with pytest.raises(ValueError, match=rf"state.json is no state of a run \(KeyError: '{name}'\); continue from"):
        checkpoint.check_state(Checkpoint(tmp_path, 3, {n: v for n, v in STATE.items() if n != name}))
    with pytest.raises(ValueError, match=rf"\(TypeError: {name} is 'x'\); continue from another"):
        checkpoint.check_state(Checkpoint(tmp_path, 3, STATE | {name: "x"}))


def test_the_first_wrong_part_of_a_state_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"\(TypeError: skipped is None\)"):
        checkpoint.check_state(Checkpoint(tmp_path, 3, STATE | {"scaler": 1, "skipped": None}))


@pytest.mark.parametrize(
    "kind", [ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError]
)
def test_an_odd_state_is_one_short_line(tmp_path, kind):
    with (
        pytest.raises(ValueError, match="is no state of a run") as caught,
        checkpoint.understood(tmp_path),
    ):
        raise kind("a\n b" + "c" * 300)
    words = str(kind("a\n b" + "c" * 300)) if kind is KeyError else "a b" + "c" * 300
    assert str(caught.value) == (
        f"{tmp_path}/state.json is no state of a run ({kind.__name__}: {words[:200]}); continue from another "
        "checkpoint with --resume-from, or start anew with --fresh"
    )


def disk(blocks, files=10, free_files=10):
    return SimpleNamespace(f_bavail=blocks, f_frsize=4096, f_files=files, f_favail=free_files)


@pytest.mark.parametrize(
    ("error", "disk", "message"),
    [
        (OSError(errno.ENOSPC, ""), disk(512), "no room for the checkpoint of step 9 in {}: it takes 3.00 MiB, the "
         "disk has 2.00 MiB free (No space left on device): free some space; {}"),
        (OSError(errno.EDQUOT, ""), disk(512, 0, 0), "no room for the checkpoint of step 9 in {}: it takes 3.00 MiB, "
         "the disk has 2.00 MiB free (Disk quota exceeded): free some space; {}"),  # does not count files
        (OSError(errno.ENOSPC, ""), disk(512, 10, 0), "no room for the checkpoint of step 9 in {}: it takes 3.00 MiB, "
         "the file system has no inodes left: remove some files; {}"),
        (OSError(errno.EIO, "Input/output error"), disk(0),
         "cannot write the checkpoint of step 9 in {}: Input/output error; {}"),
        (OSError("odd"), disk(0), "cannot write the checkpoint of step 9 in {}: odd; {}"),
    ],
)  # fmt: skip
def test_what_a_failed_save_says(tmp_path, monkeypatch, error, disk, message):
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    found = checkpoint.disk_error(error, tmp_path, 9, 3 * MIB)
    assert str(found).endswith(message.format(tmp_path, "there is no earlier checkpoint"))
    saved(tmp_path, 1, 2, 3)
    found = checkpoint.disk_error(error, tmp_path, 9, 3 * MIB)
    assert str(found).endswith(message.format(tmp_path, "the checkpoint step_00000003 is intact"))
    assert found.errno == error.errno


def test_a_save_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"cannot write the checkpoint of step 3 in .*/file: Not a directory; there is no"
    ):
        saved(tmp_path / "file", 3)


def test_a_small_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    assert checkpoint.write_json(path, [1]) == zlib.crc32(b"[\n 1\n]\n")

    def full(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*/config\.json: Input/output error"):
        checkpoint.write_json(path, [2])
    assert path.read_text() == "[\n 1\n]\n"
    assert names(tmp_path) == ["config.json"]


@pytest.mark.parametrize(
    ("diverged", "kept"),
    [
        ({}, [4, 5]), ({5}, [4, 5]), ({4}, [4, 5]), ({4, 5}, [3, 4, 5]), ({3, 4, 5}, [2, 4, 5]), ({1, 2, 4}, [4, 5]),
        ({1, 2, 3, 4, 5}, [4, 5]),
    ],
)  # fmt: skip
def test_the_last_good_one_is_kept_while_the_newest_diverge(tmp_path, diverged, kept):
    for step in range(1, 6):
        saved(tmp_path, step, diverged=step in diverged)
    checkpoint.drop_old(tmp_path, 2)
    assert names(tmp_path) == [f"step_{step:08d}" for step in kept]


@pytest.mark.parametrize("state", [None, "{", "[]", "[" * 100_000, "{}"])
def test_what_cannot_be_told_counts_as_good(tmp_path, state):
    for step in range(1, 4):
        saved(tmp_path, step, diverged=step == 3)
    path = tmp_path / "step_00000002" / "state.json"
    path.unlink() if state is None else path.write_text(state)
    checkpoint.drop_old(tmp_path, 1)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_what_cannot_be_removed_stays(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)
    (tmp_path / ".tmp-file").write_text("no folder")
    (tmp_path / ".tmp-00000003-1").mkdir()
    checkpoint.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".tmp-file", "step_00000001", "step_00000002"]

    def busy(path, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    checkpoint.drop_old(tmp_path, 1)
    assert names(tmp_path) == [".tmp-file", "step_00000001", "step_00000002"]


def test_what_is_set_aside_is_numbered(tmp_path):
    found = [checkpoint.set_aside(saved(tmp_path, 3), reason="superseded").name for _ in range(4)]
    assert found == ["superseded-step_00000003", *(f"superseded-step_00000003-{n}" for n in (1, 2, 3))]


def test_room_for_those_that_are_to_come(tmp_path, monkeypatch):
    """One is written before the oldest goes; those that are there have their room, but for the one being written."""
    free = 0
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    for existing, missing in ((0, 3), (1, 2), (2, 1), (3, 1), (4, 1)):
        if existing:
            saved(tmp_path, existing)
        free = missing * 20 * MIB
        checkpoint.require_space(tmp_path, 20 * MIB, keep=2)
        free -= 1
        with pytest.raises(
            OSError, match=rf"the run needs {missing * 20} MiB for {missing} checkpoints of 20 MiB, "
        ) as e:
            checkpoint.require_space(tmp_path, 20 * MIB, keep=2)
        assert e.value.errno == errno.ENOSPC


def test_missing_tensors_are_counted_and_the_first_is_named():
    targets = {name: torch.zeros(1) for name in ("d", "b", "c", "a")}
    with pytest.raises(ValueError, match=r"^the optimizer of the checkpoint lacks 3 tensors, e\.g\. a$"):
        checkpoint.compare({"b": (1,)}, targets, "the optimizer")


class Split:
    """A tensor (5, 3) of which this rank holds rows 2 and 3, as DTensor shows itself."""

    shape, ndim = torch.Size((5, 3)), 2

    def __init__(self):
        self.local = torch.zeros(2, 3)

    def to_local(self):
        return self.local

    def __create_chunk_list__(self):
        return [SimpleNamespace(offsets=torch.Size((2, 0)))]


def test_a_rank_takes_its_part_of_a_whole_tensor():
    whole, split, scalar = torch.arange(15.0).view(5, 3), Split(), torch.zeros(())
    targets = {"w": split, "whole": torch.zeros(5, 3), "scalar": scalar}
    saved = {"w": whole, "whole": whole, "scalar": torch.tensor(4.0)}
    checkpoint.copy_into(targets, iter(saved.items()), "the model")
    assert split.local.tolist() == [[6, 7, 8], [9, 10, 11]]
    assert torch.equal(targets["whole"], whole)
    assert scalar == 4
    assert checkpoint.part_of(whole)[1] == (0, 0)
