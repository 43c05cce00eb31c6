"""Who may write into a run folder and go on from it: each rule, each message, by files that are laid there by hand."""

import errno
import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from beit_fast import __version__
from beit_fast.train.checkpoint import run_folder
from beit_fast.train.checkpoint.format import list_checkpoints, save_checkpoint
from beit_fast.train.checkpoint.run_folder import FORMAT, RunFolder
from beit_fast.train.config import OptimConfig, RunConfig, flat, to_plain
from beit_fast.train.distributed.world import World
from beit_fast.train.tasks.pretrain import PretrainConfig

STATE = {"total_steps": 9, "skipped": 0, "identity": {}, "interval": {}, "scaler": {}, "metrics": {}}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    return RunConfig(output_dir=tmp_path / "run")


def claimed(config, task="t", **changes):
    """The folder, claimed and released."""
    folder = RunFolder(config.output_dir)
    try:
        folder.claim(replace(config, **changes), task)
    finally:
        folder.release()
    return folder


def with_checkpoints(config, *steps):
    folder = claimed(config)
    for step in steps:
        save_checkpoint(folder.checkpoints, step, {"model": {"w": torch.full((2,), float(step))}}, STATE, 9)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_claim_leaves_the_configuration_and_nothing_of_earlier_tries(config):
    folder = with_checkpoints(config, 3)
    (folder.checkpoints / ".tmp-00000006-1").mkdir()
    (folder.path / "traceback.txt").write_text("of an earlier try")
    claimed(config)
    assert names(folder.path) == [".lock", "checkpoints", "config.json"]
    assert names(folder.checkpoints) == ["step_00000003"]
    saved = json.loads((folder.path / "config.json").read_text())
    assert saved == {"format": FORMAT, "version": __version__, "task": "t", "config": to_plain(config)}


def test_a_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*/file/run \(Not a directory\); choose another --output-dir"):
        claimed(replace(config, output_dir=tmp_path / "file" / "run"))


def test_a_folder_in_use_is_waited_for_three_seconds(config, monkeypatch):
    """By a clock that goes on a second at every look."""
    first, naps, clock = RunFolder(config.output_dir), [], iter(range(1000))
    first.claim(config, "t")
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=clock.__next__, sleep=naps.append))
    with pytest.raises(ValueError, match=r"another process is training in .*; stop it, or choose another --output-dir"):
        claimed(config)
    assert naps == [0.05] * 3

    def until_it_is_free(seconds):
        naps.append(seconds)
        first.release()

    monkeypatch.setattr(run_folder.time, "sleep", until_it_is_free)
    claimed(config)
    assert naps == [0.05] * 4


def test_a_file_system_without_locks(config, monkeypatch):
    def missing(file, how):
        assert how == fcntl.LOCK_EX | fcntl.LOCK_NB
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", missing)
    claimed(config)


def test_fresh_moves_aside_what_is_there(config, capsys, monkeypatch):
    for number in (1, 2, 3):
        folder = with_checkpoints(config, number)
        claimed(config, fresh=True)
        aside = config.output_dir.with_name(f"run.{number}")
        assert capsys.readouterr().out == f"--fresh: the run found in {folder.path} was moved to {aside}\n"
        assert names(aside / "checkpoints") == [f"step_{number:08d}"]
        assert names(folder.checkpoints) == []
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    claimed(config, fresh=True)
    assert config.output_dir.with_name("run.4").exists()
    for count in ("1", "2"):  # torchrun starts the ranks again: the run goes on
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        claimed(config, fresh=True)
        assert not config.output_dir.with_name("run.5").exists()


def test_fresh_of_a_link_moves_what_it_leads_to(config, tmp_path):
    (tmp_path / "disk").mkdir()
    config.output_dir.symlink_to(tmp_path / "disk")
    with_checkpoints(config, 3)
    claimed(config, fresh=True)
    assert names(tmp_path / "disk.1" / "checkpoints") == ["step_00000003"]
    assert config.output_dir.is_symlink()
    assert names(tmp_path / "disk" / "checkpoints") == []


def test_what_fresh_cannot_move(config, monkeypatch):
    folder = with_checkpoints(config, 3)
    (folder.path / "below").mkdir()
    for inside in (folder.path, folder.path / "below"):
        monkeypatch.chdir(inside)
        with pytest.raises(
            ValueError, match=r"--fresh: .*/run is the folder you are in, which cannot be moved aside; "
        ):
            claimed(config, fresh=True)
    monkeypatch.chdir(folder.path.parent)

    def busy(path, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    message = r"--fresh: cannot move .*/run aside \(Device or resource busy\); choose another --output-dir"
    with pytest.raises(OSError, match=message) as caught:
        claimed(config, fresh=True)
    assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "3", "null", '{"config": {}}', f'{{"format": "{FORMAT}"}}', f'{{"format": "{FORMAT}", "config": 1}}',
     '{"format": "another", "config": {}}', "[" * 100_000],
)  # fmt: skip
def test_a_folder_of_another_program(config, text):
    folder = claimed(config)
    (folder.path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="was not written by this program's runs; choose another --output-dir"):
        claimed(config)


def test_a_configuration_that_cannot_be_read_now(config, monkeypatch):
    folder = claimed(config)
    assert folder.saved()["task"] == "t"

    def broken(path, *arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", broken)
    with pytest.raises(OSError, match=r"cannot read .*/config.json now \(Input/output error\)") as caught:
        folder.saved()
    assert caught.value.errno == errno.EIO


def test_a_run_is_continued_by_its_own_settings(config):
    with pytest.raises(ValueError, match=r"there is no run in .*/run; name its --output-dir"):
        RunFolder(config.output_dir).compare(config, "t")
    claimed(config)
    claimed(config, seed=1)  # nothing was saved yet
    folder = with_checkpoints(config, 3)
    claimed(config, max_steps=7)  # may differ
    with pytest.raises(ValueError) as caught:
        claimed(config, task="u", seed=1, batch_size=64)
    assert str(caught.value) == (
        f"{folder.path} holds a run with other settings (task: t in that run, u now; batch_size: 2048 in that run, 64 "
        "now; seed: 0 in that run, 1 now); repeat its settings to continue it, or start another with --fresh or "
        "another --output-dir"
    )
    folder.compare(config, "t")


RATE = OptimConfig(lr=1e-4)


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"epochs": 900.0}, "--extend"), ({"steps": 9}, "--extend"), ({"batch_size": 64}, "--change-batch-size"),
        ({"batch_size": 64, "steps": 9}, "--change-batch-size --extend"), ({"optim": RATE}, "--resume-from STEP"),
        ({"optim": RATE, "steps": 9}, "--extend"), ({"seed": 1, "steps": 9}, None), ({"seed": 1}, None),
        ({"optim": OptimConfig(lr=1e-4, min_lr=1e-6, warmup_lr=1e-7), "epochs": 9.0, "steps": 9, "batch_size": 64},
         "--change-batch-size --extend"),
    ],
)  # fmt: skip
def test_what_an_option_would_allow_is_named(config, changes, way):
    with_checkpoints(config, 3)
    with pytest.raises(ValueError, match="holds a run with other settings") as caught:
        claimed(config, **changes)
    assert (f"); {way} continues it so; or repeat its settings" in str(caught.value)) == (way is not None)
    assert ("continues it so" in str(caught.value)) == (way is not None)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 900.0, "extend": True}, {"steps": 9, "extend": True, "optim": RATE},
        {"batch_size": 64, "change_batch_size": True}, {"batch_size": 64, "change_batch_size": True, "optim": RATE},
        {"optim": RATE, "resume_from": 3},
    ],
)  # fmt: skip
def test_what_an_option_allows(config, changes):
    with_checkpoints(config, 3)
    claimed(config, **changes)


@pytest.mark.parametrize(
    ("changes", "own"),
    [({"batch_size": 64, "extend": True}, "batch_size"), ({"steps": 9, "change_batch_size": True}, "steps"),
     ({"steps": 9, "resume_from": 3}, "steps"), ({"batch_size": 64, "resume_from": 3}, "batch_size")],
)  # fmt: skip
def test_an_option_allows_its_own_alone(config, changes, own):
    with_checkpoints(config, 3)
    with pytest.raises(ValueError, match=rf"other settings \({own}: "):
        claimed(config, **changes)


def rewritten(folder, **values):
    path = folder.path / "config.json"
    saved = json.loads(path.read_text())
    saved["config"] |= values.pop("config", {})
    for name in values.pop("without", ()):
        del saved["config"][name]
    path.write_text(json.dumps(saved | values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "99.0"}, "holds a run of beit_fast 99.0, this is {}; continue it with that version"),
        ({"config": {"new": 1, "also": 2}}, "of beit_fast {}, this is {}: also, new are not known to both; continue"),
        ({"without": ["seed"]}, "of beit_fast {}, this is {}: seed are not known to both; continue it with that"),
        ({"version": "0.0.1"}, None), ({"config": {"layer_decay": None}}, None),
        ({"without": ["max_steps"]}, None),  # may differ
    ],
)  # fmt: skip
def test_runs_of_other_versions(config, changes, message):
    folder = with_checkpoints(config, 3)
    rewritten(folder, **changes)
    if message is None:
        claimed(config)
        return
    with pytest.raises(ValueError) as caught:
        claimed(config)
    assert message.format(*[__version__] * message.count("{}")) in str(caught.value)


def test_versions_are_compared_by_three_numbers():
    numbers = {"1.2.3": [1, 2, 3], "0.10": [0, 10], "2.0.1rc4": [2, 0, 1], "None": [], "1.2.3.4": [1, 2, 3]}
    assert {version: run_folder._numbers(version) for version in numbers} == numbers


def test_going_back_sets_the_later_checkpoints_aside(config, capsys, monkeypatch):
    folder = with_checkpoints(config, 3, 6, 9, 12)
    with pytest.raises(
        ValueError, match=r"--resume-from 5: .*/checkpoints keeps the checkpoints of steps 3, 6, 9, 12$"
    ):
        claimed(config, resume_from=5)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    claimed(config, resume_from=6)
    assert len(list_checkpoints(folder.checkpoints)) == 4
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    claimed(config, resume_from=6)
    assert names(folder.checkpoints) == [
        "step_00000003", "step_00000006", "superseded-step_00000009", "superseded-step_00000012"
    ]  # fmt: skip
    lines = [f"--resume-from 6: step_{n:08d} is kept as superseded-step_{n:08d}" for n in (9, 12)]
    assert capsys.readouterr().out.splitlines() == lines
    with pytest.raises(ValueError, match=r"--resume-from 1: .* of steps none"):
        claimed(replace(config, output_dir=config.output_dir.with_name("empty")), resume_from=1)


def test_other_data_is_named(config):
    folder = RunFolder(config.output_dir)
    folder.check_identity({"data": "a"}, {"data": "a", "new": 1})
    with pytest.raises(ValueError) as caught:
        folder.check_identity({"data": "a", "tokenizer": "x", "same": 1}, {"data": "b", "same": 1})
    assert str(caught.value) == (
        f"the run in {folder.path} began with data a, now b, tokenizer x, now None; restore what it was trained on, or "
        "start anew with --fresh"
    )


def test_damaged_checkpoints_are_passed_over_and_kept(config):
    folder = claimed(config)
    assert folder.newest() == (None, [])
    folder = with_checkpoints(config, 3, 6, 9)
    for step in (6, 9):
        (folder.checkpoints / f"step_{step:08d}" / "state.json").unlink()
    newest, notes = folder.newest()
    assert newest.step == 3
    assert notes == [
        f"checkpoint step_{n:08d} is damaged: state.json: No such file or directory; kept as damaged-step_{n:08d}; "
        "continuing from step_00000003" for n in (9, 6)
    ]  # fmt: skip
    assert folder.newest()[1] == []
    (folder.checkpoints / "step_00000003" / "manifest.json").unlink()
    with pytest.raises(ValueError) as caught:
        folder.newest()
    assert str(caught.value) == (
        f"no checkpoint in {folder.checkpoints} is sound (step_00000003: manifest.json is missing; "
        "damaged-step_00000006; damaged-step_00000009); put one back, or start anew with --fresh, which keeps this run "
        "aside"
    )
    (folder.checkpoints / "step_00000003").rename(folder.checkpoints / "elsewhere")
    with pytest.raises(ValueError, match=r"is sound \(damaged-step_00000006; damaged-step_00000009\); put"):
        folder.newest()


class Rank(World):
    """A rank that hears `step` from rank 0."""

    def __init__(self, rank, step=None):
        super().__init__(rank, 2, torch.device("cpu"))
        object.__setattr__(self, "step", step)

    def agree(self, value):
        object.__setattr__(self, "said", value)
        return value if self.step is None else self.step


def test_all_ranks_go_on_from_what_rank_0_has_found(config):
    folder = claimed(config)
    first = Rank(0)
    assert folder.newest_for_all(first) == (None, [])
    assert first.said == -1
    assert folder.newest_for_all(Rank(1, -1)) == (None, [])
    with_checkpoints(config, 0, 3, 6)
    assert folder.newest_for_all(first)[0].step == first.said == 6
    other = Rank(1, 3)
    assert folder.newest_for_all(other)[0].step == 3
    assert other.said == -1
    assert folder.newest_for_all(Rank(1, 0))[0].step == 0
    (folder.checkpoints / "step_00000003" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="is no state of a run"):
        folder.newest_for_all(Rank(1, 3))


def test_checkpoints_are_kept_for_a_replay(config, capsys, monkeypatch):
    folder = with_checkpoints(config, 3, 6, 9, 12)
    assert folder.keep_for_replay(3) is None
    assert not folder.replay.exists()
    for before, kept in ((4, 3), (6, 3), (7, 6), (7, 6), (100, 12)):
        assert folder.keep_for_replay(before) == f"step_{kept:08d}"
    assert names(folder.replay) == ["step_00000006", "step_00000012"]
    one, two = (place / "step_00000012" / "model.safetensors" for place in (folder.replay, folder.checkpoints))
    assert os.path.samefile(one, two)

    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    assert folder.keep_for_replay(10) is None
    assert capsys.readouterr().out == "step_00000009 cannot be kept for a replay: No space left on device\n"
    assert names(folder.replay) == ["step_00000006", "step_00000012"]


@pytest.mark.parametrize("before", [None, "{", "[]", "{}", '{"starts": 3}', "[" * 100_000])
def test_every_start_is_recorded(config, before):
    folder = claimed(config)
    path = folder.path / "environment.json"
    if before is not None:
        path.write_text(before)
    for step in (0, 5):
        folder.record_start(step, 4, torch.device("cpu"))
    first, second = json.loads(path.read_text())["starts"]
    assert (first["step"], second["step"], second["world_size"]) == (0, 5, 4)
    assert second["versions"]["torch"] == torch.__version__
    assert second["versions"]["beit_fast"] == __version__
    assert (second["cpu_count"], second["torch_threads"]) == (os.cpu_count(), torch.get_num_threads())


def test_what_runs_did_before_a_setting_existed_is_its_default():
    """Value and kind, so that False is not 0."""
    defaults = flat(to_plain(PretrainConfig()))
    earlier = {name: repr(value) for name, value in run_folder.EARLIER_VALUES.items()}
    assert earlier == {name: repr(defaults[name]) for name in earlier}
