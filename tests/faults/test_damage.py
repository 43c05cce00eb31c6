"""R3, R4, R12: damaged and hostile files, full disks."""

import json
import os
import pickle
import random
import resource
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from beit_fast.train.checkpoint import format as checkpoint
from beit_fast.train.checkpoint import resharding
from beit_fast.train.checkpoint.async_writer import CheckpointWriter
from beit_fast.train.distributed.world import World

CPU = World(0, 1, torch.device("cpu"))
KINDS = ("truncated", "flipped", "zeroed", "deleted", "swapped", "longer")


@pytest.fixture(scope="module")
def folders(ranks, tmp_path_factory):
    """A run of whole checkpoints and one of split ones, two checkpoints each."""
    root = tmp_path_factory.mktemp("damage")
    how = {"whole": (), "split": ("--parallel", "fsdp2")}
    for name, arguments in how.items():
        assert ranks.run(root / name, 2, *arguments, "--max-steps", 6).code == 0
    return {name: root / name / "checkpoints" for name in how}


def damage(path, kind, rng, others):
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "zeroed":
        start = rng.randrange(len(data))
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
        path.write_bytes(data)
    elif kind == "deleted":
        path.unlink()
    elif kind == "swapped":
        other = rng.choice([o for o in others if o != path])
        kept = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(kept)
    else:
        path.write_bytes(data + b"x")


def content(found):
    return {
        (name, key): tensor.numpy().tobytes()
        for name in ("model", "optimizer")
        for key, tensor in resharding.whole_tensors(found, name)
    }


def detected_or_harmless(root, kind, rng):
    """Damage the newest checkpoint; the older one is taken with a reason, or what is read is what was saved."""
    older, newer = checkpoint.list_checkpoints(root)
    files = sorted(p for p in newer.rglob("*") if p.is_file())
    originals = {path: path.read_bytes() for path in files}
    expected, state = content(checkpoint.read_verified(newer)), (newer / "state.json").read_bytes()
    damage(rng.choice(files), kind, rng, files)
    try:
        found, rejected = checkpoint.newest_checkpoint(root)
        if found.path == older:
            return rejected[0][0] == newer and bool(rejected[0][1])
        return content(found) == expected and (newer / "state.json").read_bytes() == state
    finally:
        for path, data in originals.items():
            path.write_bytes(data)


def damages(folders, count):
    """How many of so many damages are found, or harmless."""
    rng = random.Random(3)
    trials = [(folders[("whole", "split")[i % 2]], KINDS[(i // 2) % len(KINDS)]) for i in range(count)]
    return sum(detected_or_harmless(folder, kind, rng) for folder, kind in trials)


def test_damages(folders):
    assert damages(folders, 100) == 100


@pytest.mark.slow
def test_three_hundred_damages(folders, outcome):
    outcome("R3", "one file of the newest checkpoint truncated, flipped, zeroed, deleted, swapped or longer: found, or "
            "read as it was saved", 300, damages(folders, 300), "300, none silently")  # fmt: skip


def test_a_damaged_split_checkpoint_falls_back(ranks, folders, tmp_path):
    shutil.copytree(folders["split"].parent, tmp_path / "run")
    newest = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    path = newest / "optimizer" / "shard-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = ranks.run(tmp_path / "run", 2, "--parallel", "fsdp2")
    assert done.code == 0
    assert "shard-00002-of-00002.safetensors does not match its crc32" in done.log
    assert "continuing from step_00000003" in done.log


def test_a_manifest_cannot_lead_out_of_its_folder(folders, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(folders["whole"], root)
    newest = checkpoint.list_checkpoints(root)[-1]
    for name in ("../../secret", "/etc/hostname"):
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": 1, "crc32": 0}
        (newest / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(checkpoint.DamagedCheckpoint, match="outside of the checkpoint"):
            checkpoint.verify(newest)


def test_a_failed_save_in_the_background_surfaces(tmp_path):
    """The file size is limited while the thread writes: the failure is there at the next look, the old one intact."""
    lines = []
    writer = CheckpointWriter(tmp_path, 2, CPU, True, False, lines.append)
    files = {"model": {"w": torch.zeros(5000)}}
    writer.save(1, files, {})
    files["model"]["w"] += 1  # the copy was taken before: the training may go on at once
    writer.join()
    assert torch.equal(dict(checkpoint.newest_checkpoint(tmp_path)[0].tensors("model"))["w"], torch.zeros(5000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        writer.save(2, files, {})
        writer.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no room for the checkpoint of step 2" in str(writer.failure)
    assert [line.split(" (")[0] for line in lines] == ["saved step_00000001"]
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step_00000001"]


FULL = [(1, "off", ()), (1, "on", ()), (2, "off", ()), (2, "on", ("--parallel", "fsdp2"))]


def fill_a_disk(ranks, folder, count, background, how):
    """The run on a 1.5 MiB file system of its own, which fills up; None where this machine mounts none."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        width = ("--width", 1000)  # a checkpoint of 0.25 MiB: the preflight finds room for three
        arguments = (*how, *width, "--checkpoint.background", background)
        assert ranks.run(folder / "run", count, *arguments, "--max-steps", 3).code == 0
        ballast = folder / "ballast"
        free = shutil.disk_usage(folder).free
        done = ranks.run(
            folder / "run", count, *arguments, "--step-s", 0.2, environment={"BALLAST": f"{ballast},{free - 60_000}"},
        )  # fmt: skip
        found, rejected = checkpoint.newest_checkpoint(folder / "run" / "checkpoints")
        clear = "no room for the checkpoint of step" in done.log or "the run needs" in done.log
        return done.code == 1 and clear and found is not None and not rejected and not done.hung
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.long
def test_full_disks(ranks, tmp_path, outcome):
    results = [fill_a_disk(ranks, tmp_path / str(i), *case) for i, case in enumerate(FULL)]
    if None in results:
        pytest.skip("needs the right to mount a tmpfs")
    outcome("R4", "the disk fills up during a run (tmpfs): one line with the MiB, the last checkpoint loads",
            len(results), sum(results), "all")  # fmt: skip


class Hostile:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["BEIT_FAST_HOSTILE_MARK"],)


def hostile_files(folder):
    """(file, what its refusal says)."""
    weights = {"w": torch.ones(2)}
    torch.save({"model": weights, "args": Hostile()}, folder / "zip.pth")
    torch.save(Hostile(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    (folder / "plain.pkl").write_bytes(pickle.dumps(Hostile()))
    (folder / "header.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    header = b'{"w":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}'
    (folder / "short.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}'
    (folder / "negative.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return sorted(p for p in folder.iterdir() if p.suffix in (".pth", ".pkl", ".safetensors"))


def test_hostile_files_are_refused_and_not_run(tmp_path, monkeypatch, outcome):
    from beit_fast.models.reading import CheckpointError, read_state_dict
    from beit_fast.tokenizers import load_tokenizer
    from beit_fast.tokenizers.base import TokenizerError

    mark = tmp_path / "executed"
    monkeypatch.setenv("BEIT_FAST_HOSTILE_MARK", str(mark))
    folder = tmp_path / "files"
    folder.mkdir()
    files, passed = hostile_files(folder), 0
    for path in files:
        with pytest.raises(CheckpointError) as model:
            read_state_dict(path)
        with pytest.raises(TokenizerError) as tokenizer:
            load_tokenizer(path)
        passed += all(str(e.value).count("\n") == 0 and path.name in str(e.value) for e in (model, tokenizer))
    # the harmless control: the same pickle does run where pickles are run
    pickle.loads(pickle.dumps(Hostile()))
    assert mark.exists()
    mark.unlink()
    for path in files:
        with pytest.raises(CheckpointError):
            read_state_dict(path)
    assert not mark.exists()
    outcome("R12", "pickles that run commands, safetensors whose header lies: refused in one line, nothing executed",
            len(files), passed, "all")  # fmt: skip


def test_checkpoints_with_foreign_tensors_are_named(ranks, tmp_path):
    """A checkpoint that verifies but does not fit: a name, a shape."""
    assert ranks.run(tmp_path / "run", 1, "--max-steps", 3).code == 0
    newest = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    tensors = dict(checkpoint.read_verified(newest).tensors("model"))
    for change, message in (
        (lambda t: t.update(surplus=torch.ones(1)), "holds surplus, which the model lacks"),
        (lambda t: t.pop("0.bias"), "lacks 1 tensors, e.g. 0.bias"),
        (lambda t: t.update({"0.bias": torch.ones(3)}), "0.bias has shape (3,), the model (16,)"),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, newest / "model.safetensors")
        manifest = json.loads((newest / "manifest.json").read_text())
        size, crc = (newest / "model.safetensors").stat().st_size, checkpoint.file_crc32(newest / "model.safetensors")
        manifest["files"]["model.safetensors"] = {"bytes": size, "crc32": crc}
        (newest / "manifest.json").write_text(json.dumps(manifest))
        done = ranks.run(tmp_path / "run", 1)
        assert done.code == 1
        assert message in done.log, done.log


def test_no_pickle_is_written(folders):
    """The only files of a checkpoint are safetensors and JSON; torch.distributed's pickled index is not among them."""
    for root in folders.values():
        files = [p for p in root.rglob("*") if p.is_file()]
        assert {p.suffix for p in files} == {".safetensors", ".json"}
        for path in files:
            assert path.read_bytes()[:1] != b"\x80"


def test_checkpoints_of_earlier_versions_are_read(ranks, tmp_path, state_of):
    """A state written before anomalies were kept: it continues, and ends as any other."""
    assert ranks.run(tmp_path / "whole", 1).code == 0
    assert ranks.run(tmp_path / "run", 1, "--max-steps", 4).code == 0
    newest = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    del state["anomalies"]
    crc = checkpoint.write_json(newest / "state.json", state)
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["format"] == 1
    manifest["files"]["state.json"] = {"bytes": (newest / "state.json").stat().st_size, "crc32": crc}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert ranks.run(tmp_path / "run", 1).code == 0
    ends = [
        checkpoint.read_verified(checkpoint.list_checkpoints(tmp_path / n / "checkpoints")[-1])
        for n in ("whole", "run")
    ]
    assert content(ends[0]) == content(ends[1])
