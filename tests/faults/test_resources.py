"""R20 and what a run does when the machine runs out: disk, inodes, descriptors, files cut off under it."""

import builtins
import contextlib
import dataclasses
import errno
import io
import os
import re
import resource
import subprocess
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from beit_fast.data.token_store import HEADER_BYTES, TokenStore
from beit_fast.train import engine
from beit_fast.train.checkpoint import artefacts
from beit_fast.train.checkpoint.format import list_checkpoints
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.distributed.world import World
from beit_fast.train.tasks.feature_cache import FeatureCache
from tests.images import write_scenes

CPU = World(0, 1, torch.device("cpu"))


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    """The files that Python code opens to write, of which one is on a full disk: what is written there is lost."""

    def __init__(self, monkeypatch, root, full=None, create=False):
        self.root, self.full, self.create, self.written = str(root), full, create, set()
        self.open, self.os_open, self.mkdir, self.pwrite = builtins.open, os.open, os.mkdir, os.pwrite
        self.allocate, self.save_file = os.posix_fallocate, safetensors.torch.save_file
        self.descriptors = set()
        monkeypatch.setattr(builtins, "open", self.opened)
        monkeypatch.setattr(io, "open", self.opened)
        monkeypatch.setattr(os, "open", self.os_opened)
        monkeypatch.setattr(os, "mkdir", self.made)
        monkeypatch.setattr(os, "pwrite", self.written_at)
        monkeypatch.setattr(os, "posix_fallocate", self.allocated)
        monkeypatch.setattr(safetensors.torch, "save_file", self.saved)

    def name(self, file):
        """The path below the root, without what is another one each time."""
        return re.sub(r"\d{4,}", "N", os.path.relpath(os.fspath(file), self.root))

    def is_full(self, file):
        if not isinstance(file, (str, os.PathLike)) or not str(file).startswith(self.root):
            return False
        if self.create and os.path.exists(file):
            return False
        self.written.add(self.name(file))
        return self.name(file) == self.full

    def opened(self, file, mode="r", *arguments, **options):
        if set(mode) & set("wax+") and self.is_full(file):
            self.refuse(file)
            self.open(file, "ab").close()  # it is there, and empty
            return self.open("/dev/full", mode.replace("x", "w"), *arguments, **options)
        return self.open(file, mode, *arguments, **options)

    def os_opened(self, file, flags, *arguments, **options):
        if not flags & (os.O_WRONLY | os.O_RDWR) or not self.is_full(file):
            return self.os_open(file, flags, *arguments, **options)
        self.refuse(file)
        if flags & os.O_APPEND:
            return self.os_open("/dev/full", os.O_WRONLY, *arguments, **options)
        descriptor = self.os_open(file, flags, *arguments, **options)  # a file of rows, or one that is only made
        self.descriptors |= {descriptor} if flags & os.O_RDWR and not self.create else set()
        return descriptor

    def written_at(self, descriptor, *arguments):
        return full_disk() if descriptor in self.descriptors else self.pwrite(descriptor, *arguments)

    def allocated(self, descriptor, *arguments):
        device = os.path.realpath(f"/proc/self/fd/{descriptor}")
        return full_disk() if device == "/dev/full" else self.allocate(descriptor, *arguments)

    def saved(self, tensors, path, **options):
        if self.is_full(path) and not self.create:
            raise SafetensorError("I/O error: No space left on device (os error 28)")  # what it says on a full tmpfs
        return self.save_file(tensors, path, **options)

    def made(self, path, *arguments, **options):
        if self.create and self.is_full(path):
            self.refuse(path)
        return self.mkdir(path, *arguments, **options)

    def refuse(self, file):
        """Where inodes are what is missing, a file cannot even be made."""
        if self.create:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def files_written(make, folder, create=False):
    """The files that an undisturbed run in the folder `watched` writes; with `create` the folders that it makes too."""
    disks = []
    error, _ = attempt(make, folder / "watched", lambda p: disks.append(Disk(p, folder / "watched", create=create)))
    assert error is None
    return sorted(disks[0].written)


def on_a_full_disk(make, folder, weights, names, create):
    """A trial per file."""
    for name in names:
        run = folder / re.sub("[/.]", "_", name)
        yield name, survives(make, run, weights, lambda patch, run=run, name=name: Disk(patch, run, name, create))


@dataclasses.dataclass
class Trial:
    """One file that could not be written, and the same command after it."""

    passed: bool
    error: str | None
    """What ended the run; None where it went on."""
    lost: int
    """Steps done that the same command had to do again."""
    seconds: float
    """From the error to the end of the same command."""


def attempt(make, folder, change=lambda patch: None):
    """Run once, with `change(patch)` in force; what ended it (None where it came to its end), and the steps it did."""
    error, steps, step = None, [0], engine.TrainingRun.train_step

    def counted(run, batches):
        step(run, batches)
        steps.append(run.step + 1)

    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        patch.setattr(engine.TrainingRun, "train_step", counted)
        try:
            assert engine.run(make(folder)).exit_code == 0
        except (OSError, ValueError) as stop:
            error = stop.strerror if isinstance(stop, OSError) and not stop.filename and stop.strerror else str(stop)
    return error, steps[-1]


def survives(make, folder, weights, change):
    """Whether a run with a fault ends in one line that names the way out, or goes on; and is whole after its command.

    The whole run to compare with lies in the folder `watched` beside it.
    """
    error, reached = attempt(make, folder, change)
    saved = [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder / "checkpoints")]
    clear = error is None or ("\n" not in error and str(folder) in error and any(word in error for word in WAY_OUT))
    began = time.monotonic()
    again = engine.run(make(folder))
    whole = again.exit_code == 0 and artefacts.completed(folder, again.step) is not None
    same = weights(folder) == weights(folder.with_name("watched"))
    return Trial(clear and whole and same, error, max(reached - max(saved, default=0), 0), time.monotonic() - began)


WAY_OUT = ("free some space", "remove some files", "choose another", "another disk", "the disk has")


@pytest.fixture
def make_tiny(tiny):
    return lambda folder: tiny.TinyTask(dataclasses.replace(tiny.RECIPE, output_dir=folder, eval_every=6))


KINDS = pytest.mark.parametrize("create", [False, True], ids=["disk", "inodes"])


@KINDS
def test_a_full_disk_in_some_files(make_tiny, tmp_path, weights, create):
    names = files_written(make_tiny, tmp_path, create)
    assert len(names) > 10
    for name, trial in on_a_full_disk(make_tiny, tmp_path, weights, names[::8], create):
        assert trial.passed, (name, trial.error)


LOG = LogConfig(every_steps=2, progress="none")


def make_pretrain(folder):
    """With repeated views, a token cache, a picture, and one image that cannot be used."""

    from beit_fast.train.tasks import pretrain

    images = folder.parent / "images"
    if not images.exists():
        write_scenes(images, 25)
        (images / "bad.jpg").write_bytes(b"no image")
    return pretrain.MaskedImageModeling(pretrain.PretrainConfig(
        output_dir=folder, steps=8, batch_size=6, batch_per_device=6, log=LOG,
        checkpoint=CheckpointConfig(every_steps=3),
        data=pretrain.DataConfig(path=str(images), threads=1, view_cycle=2, max_bad_share=0.5, prefetch=1),
        model=pretrain.ModelConfig(width=32, depth=2, num_heads=2, image_size=32, patch_size=8),
        masking=pretrain.MaskingConfig(num_masked=6, min_num_patches=2), optim=OptimConfig(warmup_steps=1),
        tokenizer=pretrain.TokenizerConfig(name="random"),
        evaluation=pretrain.EvaluationConfig(path=str(images)),
    ))  # fmt: skip


def make_probe(folder):
    """On built-in images, kept in the run folder, with cached features."""
    from beit_fast.train.tasks import finetune, probe

    return probe.LinearProbe(probe.ProbeConfig(
        output_dir=folder, scratch=True, steps=4, batch_size=16, batch_per_device=16, augment=False, log=LOG,
        data=finetune.LabelledDataConfig(
            builtin_images=24, builtin_validation_images=8, builtin_size=32, cache_dir=str(folder / "cache"), threads=1
        ),
        model=finetune.ClassifierModelConfig(
            size="tiny", width=32, depth=2, num_heads=2, image_size=32, patch_size=8, init_std=0.1
        ),
        optim=OptimConfig(lr=4e-3, min_lr=0.0, warmup_steps=0, clip_grad=None),
    ))  # fmt: skip


def make_tokenizer(folder):
    """On built-in images, with its weights and pictures."""
    from beit_fast.train.tasks import tokenizer

    return tokenizer.TrainTokenizer(tokenizer.TrainTokenizerConfig(
        output_dir=folder, steps=6, batch_size=4, batch_per_device=4, hidden_dim=8, codebook_dim=4, vocab_size=100,
        held_out_images=2, optim=OptimConfig(lr=2e-3, warmup_steps=1), log=LOG,
        data=tokenizer.TokenizerDataConfig(builtin_images=16, cache_dir=folder / "cache", view_sizes=(32,)),
        quantizer=tokenizer.QuantizerConfig(live_codes=32, init_latents=128, autoencoder_steps=3),
    ))  # fmt: skip


REAL = {"pretrain": make_pretrain, "probe": make_probe, "tokenizer": make_tokenizer}


@pytest.mark.slow
@pytest.mark.long
@KINDS
@pytest.mark.parametrize("kind", ["tiny", "pretrain", "probe", "tokenizer"])
def test_r20_a_full_disk_in_every_file(make_tiny, tmp_path, weights, outcome, create, kind):
    make = make_tiny if kind == "tiny" else REAL[kind]
    names = files_written(make, tmp_path, create)
    trials = dict(on_a_full_disk(make, tmp_path, weights, names, create))
    for name, trial in trials.items():
        print(name, trial)
    what = "no inode for a file or folder" if create else "disk full in a file"
    count(outcome, f"{what} that a run writes, each in turn: a line that names it, or the run goes on", trials.values())


def count(outcome, what, trials):
    """A row of the record, with what the faults cost."""
    passed = sum(trial.passed for trial in trials)
    cost = max(trial.lost for trial in trials), max(trial.seconds for trial in trials), len(trials) - passed
    outcome("R20", what, len(trials), passed, "whole after the same command", cost=cost)


@contextlib.contextmanager
def small_disk(folder, options):
    """A tmpfs of its own; skips where this machine mounts none."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,{more}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def on_a_small_disk(make, folder, weights, options, more):
    """A run on a disk that is too small for it, the disk enlarged, the same command."""
    with small_disk(folder, options) as remount:
        error, reached = attempt(make, folder / "run")
        remount(more)
        saved = [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder / "run" / "checkpoints")]
        clear = error is None or ("\n" not in error and str(folder) in error and any(w in error for w in WAY_OUT))
        began = time.monotonic()
        again = engine.run(make(folder / "run"))
        whole = again.exit_code == 0 and artefacts.completed(folder / "run", again.step) is not None
        same = weights(folder / "run") == weights(folder.with_name("watched"))
        lost = max(reached - max(saved, default=0), 0)
        return Trial(clear and whole and same, error, lost, time.monotonic() - began)


def test_a_file_system_without_inodes_is_named(make_tiny, tmp_path, weights):
    files_written(make_tiny, tmp_path)
    trial = on_a_small_disk(make_tiny, tmp_path / "disk", weights, "size=8m,nr_inodes=12", "nr_inodes=200")
    assert trial.passed, trial.error
    assert "no inodes left" in trial.error


@pytest.mark.slow
@pytest.mark.long
def test_r20_inodes_run_out_at_every_file(make_tiny, tmp_path, weights, outcome):
    files_written(make_tiny, tmp_path)
    trials = [
        on_a_small_disk(make_tiny, tmp_path / str(n), weights, f"size=8m,nr_inodes={n}", "nr_inodes=200")
        for n in range(2, 42)
    ]
    for trial in trials:
        print(trial)
    count(outcome, "a file system (tmpfs) with 2 to 41 inodes, then with enough", trials)


def features(folder, rows=6):
    cache = FeatureCache(folder, {"model": "m"}, (rows, 2, 3), CPU)
    if not cache.complete:
        numbers = torch.arange(rows)
        cache.fill(iter([(numbers, torch.randn(rows, 2, 3), numbers % 2)]))
    return cache


def test_a_feature_cache_cut_off_under_the_run_is_an_error(tmp_path):
    """In place of SIGBUS: the file, its size, and what to do; a label file likewise."""
    cache = features(tmp_path / "f")
    path = tmp_path / "f" / "features.npy"
    expected = np.load(path)
    np.testing.assert_array_equal(cache.take(np.array([4, 1]))[0].numpy(), expected[[4, 1]])
    os.truncate(path, 128 + 4 * 24)
    np.testing.assert_array_equal(cache.take(np.array([3]))[0].numpy(), expected[[3]])
    with pytest.raises(OSError, match=rf"{path} was cut off: it has 0.00 MiB and lacks row 4; delete the folder"):
        cache.take(np.array([3, 4]))
    os.truncate(tmp_path / "f" / "labels.npy", 130)
    with pytest.raises(OSError, match=r"labels.npy was cut off"):
        features(tmp_path / "f")


def test_r20_truncation_under_a_cache(tmp_path, outcome):
    """At forty sizes each: what is read is what was written, or absent (tokens), or one line (features)."""
    cache, rows, passed = features(tmp_path / "f", 1000), np.arange(1000), 0
    path, expected = tmp_path / "f" / "features.npy", np.load(tmp_path / "f" / "features.npy")
    for size in np.linspace(path.stat().st_size - 1, 0, 40).astype(int).tolist():
        os.truncate(path, size)
        whole = max(size - 128, 0) // 24
        right = np.array_equal(cache.take(rows[:whole])[0].numpy(), expected[:whole])
        with pytest.raises(OSError, match=rf"{path} was cut off: .* lacks row {whole}; delete"):
            cache.take(rows)
        passed += right
    store, tokens = (
        TokenStore(tmp_path / "s", num_samples=1000, num_tokens=16, cycle=1, settings={}),
        np.arange(1000 * 16).reshape(1000, 16),
    )
    for size in np.linspace(HEADER_BYTES + 1000 * 36 - 1, 0, 40).astype(int).tolist():
        store.write(0, rows, tokens)
        os.truncate(tmp_path / "s", size)
        found, present = store.read(0, rows)
        whole = max(size - HEADER_BYTES, 0) // 36
        passed += present.tolist() == [row < whole for row in range(1000)] and np.array_equal(
            found[:whole], tokens[:whole]
        )
    outcome("R20", "a feature or token cache cut off under the run, at 40 sizes each", 80, passed,
            "right, absent, or one line that names the file", cost=(0, 0.0, 0))  # fmt: skip


def test_a_feature_cache_on_a_full_disk_is_an_error(tmp_path):
    with small_disk(tmp_path / "disk", "size=64k"):
        with pytest.raises(OSError, match=r"cannot write .*features.npy: No space left .* MiB free: free some"):
            features(tmp_path / "disk" / "f", rows=20_000)
        assert features(tmp_path / "disk" / "f", rows=100).complete


def test_a_token_store_cut_off_under_the_run_is_computed_again(tmp_path):
    """By many pages, so that a memory map would end the process."""
    store = TokenStore(tmp_path / "s", num_samples=1000, num_tokens=16, cycle=1, settings={})
    tokens, rows = np.arange(1000 * 16).reshape(1000, 16), np.arange(1000)
    store.write(0, rows, tokens)
    os.truncate(tmp_path / "s", HEADER_BYTES + 3 * 36 + 5)
    found, present = store.read(0, rows)
    assert present.tolist() == [True] * 3 + [False] * 997
    np.testing.assert_array_equal(found[:3], tokens[:3])
    store.write(0, rows[3:], tokens[3:])
    np.testing.assert_array_equal(store.read(0, rows)[0], tokens)


def test_a_token_store_on_a_full_disk_names_it(tmp_path):
    with small_disk(tmp_path / "disk", "size=64k"):
        path = tmp_path / "disk" / "s"
        store = TokenStore(path, num_samples=8, num_tokens=16, cycle=1, settings={})
        os.truncate(path, HEADER_BYTES)
        (tmp_path / "disk" / "ballast").write_bytes(bytes(60 << 10))
        with pytest.raises(OSError, match=rf"cannot write {path}: No space left"):
            store.write(0, np.arange(8), np.zeros((8, 16), int))


def test_a_run_without_descriptors_saves_what_it_did(tiny, tmp_path):
    """Every descriptor is taken at step 8: the run ends with that error, its last save whole."""
    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run", checkpoint=CheckpointConfig(every_steps=100))
    taken, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)

    class Hungry(tiny.TinyTask):
        def prepare(self, batch, step):
            if step == 8:
                resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))  # ends in EMFILE
            return super().prepare(batch, step)

    try:
        with pytest.raises(OSError, match="Too many open files"):
            engine.run(Hungry(config))
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [path.name for path in list_checkpoints(config.output_dir / "checkpoints")] == ["step_00000008"]
    assert engine.run(tiny.TinyTask(config)).step == 12
