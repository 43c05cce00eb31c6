"""Checkpoints: format, damage, interruption, full disks."""

import errno
import os
import random
import resource
import signal
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beit_fast.train.checkpoint import format as checkpoint


def some_tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(33, 17, generator=g),
        "transposed": torch.randn(4, 6, generator=g).t(),
        "half": torch.randn(5, generator=g).bfloat16(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }


def save(root, step, keep=3):
    files = {"model": some_tensors(step), "optimizer": {"m": torch.full((50,), float(step))}}
    return checkpoint.save_checkpoint(root, step, files, {"note": step}, keep)


def test_files_are_what_safetensors_reads(tmp_path):
    tensors = some_tensors()
    crc = checkpoint.write_tensors(tmp_path / "t.safetensors", tensors)
    assert crc == zlib.crc32((tmp_path / "t.safetensors").read_bytes())
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_newest_wins_and_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step_00000015", "step_00000020"]
    found, rejected = checkpoint.newest_checkpoint(tmp_path)
    assert (found.step, found.state["note"], rejected) == (20, 20, [])
    assert torch.equal(dict(found.tensors("model"))["matrix"], some_tensors(20)["matrix"])
    assert list(tmp_path.glob(".tmp*")) == []


def test_everything_is_on_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    """No kill can see this, a power cut would: every file and folder is synced, then renamed, then the folder above."""
    calls = []
    real = {"fsync": os.fsync, "rename": os.rename, "replace": os.replace}

    def fsync(descriptor):
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real["fsync"](descriptor)

    def renaming(name):
        return lambda *paths, **options: calls.append(("rename", *map(str, paths))) or real[name](*paths, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renaming("rename"))
    monkeypatch.setattr(os, "replace", renaming("replace"))
    path = save(tmp_path, 7)
    (last,) = (number for number, call in enumerate(calls) if call[0] == "rename" and call[2] == str(path))
    work = Path(calls[last][1])
    moved = {call[1]: call[2] for call in calls[:last] if call[0] == "rename"}
    synced = [moved.get(call[1], call[1]) for call in calls[:last] if call[0] == "sync"]
    assert {str(work / file.name) for file in path.iterdir()} <= set(synced)
    assert synced[-1] == str(work)
    assert calls[last + 1] == ("sync", str(tmp_path))


def test_an_existing_checkpoint_is_never_written_over(tmp_path):
    path = save(tmp_path, 5)
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    assert checkpoint.save_checkpoint(tmp_path, 5, {"model": some_tensors(1)}, {}, 2) == path
    assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == before


def damage(path, kind, rng):
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "zeroed":
        start = rng.randrange(len(data))
        data[start : start + 64] = bytes(len(data[start : start + 64]))
        path.write_bytes(data)
    elif kind == "longer":
        path.write_bytes(data + b"x")
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "flipped", "zeroed", "longer", "deleted"])
def test_damage_is_found_or_harmless(tmp_path, kind):
    """300 damages over all files: the older checkpoint is taken, or what is loaded is what was saved."""
    rng = random.Random(kind)
    root = tmp_path / "checkpoints"
    save(root, 1)
    newer = save(root, 2)
    originals = {path: path.read_bytes() for path in newer.iterdir()}
    detected = 0
    for _ in range(60):
        victim = rng.choice(sorted(originals))
        damage(victim, kind, rng)
        changed = not victim.exists() or victim.read_bytes() != originals[victim]
        found, rejected = checkpoint.newest_checkpoint(root)
        if found.step == 1:
            assert [path for path, _ in rejected] == [newer]
            assert rejected[0][1]
            detected += 1
        else:
            assert not changed or victim.name == "manifest.json"
            assert torch.equal(dict(found.tensors("model"))["matrix"], some_tensors(2)["matrix"])
        victim.write_bytes(originals[victim])
    assert detected >= 40


def test_swapped_files_are_found(tmp_path):
    newer = save(tmp_path, 2)
    a, b = newer / "model.safetensors", newer / "optimizer.safetensors"
    a.rename(newer / "x"), b.rename(a), (newer / "x").rename(b)
    found, rejected = checkpoint.newest_checkpoint(tmp_path)
    assert found is None
    assert "bytes instead of" in rejected[0][1]


def test_damaged_checkpoint_is_kept_aside(tmp_path):
    path = save(tmp_path, 2)
    assert checkpoint.set_aside(path).name == "damaged-step_00000002"
    assert checkpoint.set_aside(save(tmp_path, 2)).name == "damaged-step_00000002-1"
    assert checkpoint.list_checkpoints(tmp_path) == []


def save_and_die(root, stop_at):
    """In a forked child: two whole saves, then kill -9 before the `stop_at`-th system call of the third."""
    calls = 0

    def dying(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    def save(step):
        checkpoint.save_checkpoint(root, step, {"model": {"w": torch.full((9,), float(step))}}, {}, 2)

    save(1), save(2)
    os.fsync, Path.mkdir, checkpoint.shutil.rmtree = dying(os.fsync), dying(Path.mkdir), dying(checkpoint.shutil.rmtree)
    Path.rename, Path.open = dying(Path.rename), dying(Path.open)
    save(3)


def test_kill_at_every_stage_of_a_save(tmp_path):
    """kill -9 before each system call of the third save: the second or the third checkpoint is whole."""
    status = None
    for stop_at in range(1, 60):
        pid = os.fork()
        if pid == 0:
            try:
                save_and_die(tmp_path / str(stop_at), stop_at)
            except BaseException:
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert status == 0
    steps = []
    for root in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        found, rejected = checkpoint.newest_checkpoint(root)
        assert rejected == []
        assert float(dict(found.tensors("model"))["w"][0]) == found.step
        steps.append(found.step)
        checkpoint.remove_leftovers(root)
        assert all(p.name.startswith("step_") for p in root.iterdir())
    assert len(steps) > 8
    assert set(steps) == {2, 3}
    assert steps == sorted(steps)


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    """A limit on the file size stands for the full disk: the write fails half-way."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="no room for the checkpoint of step 2") as caught:
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert "step_00000001 is intact" in str(caught.value)
    assert os.listdir(tmp_path) == ["step_00000001"]
    assert checkpoint.newest_checkpoint(tmp_path)[0].step == 1


def test_space_is_checked_before_the_run(tmp_path):
    checkpoint.require_space(tmp_path, 1000, keep=2)
    with pytest.raises(OSError, match=r"needs .* MiB for 3 checkpoints of .* the disk has"):
        checkpoint.require_space(tmp_path, 1 << 50, keep=2)


def test_loading_names_what_does_not_fit():
    model = {"w": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"lacks 1 tensors, e\.g\. b"):
        checkpoint.copy_into(model, iter([("w", torch.ones(2))]), "the model")
    with pytest.raises(ValueError, match=r"w has shape \(3,\), the model \(2,\)"):
        checkpoint.copy_into(model, iter([("w", torch.ones(3))]), "the model")
    with pytest.raises(ValueError, match="holds z, which the model lacks"):
        checkpoint.copy_into(model, iter([("z", torch.ones(3))]), "the model")
