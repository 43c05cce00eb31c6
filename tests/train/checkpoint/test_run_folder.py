"""What a run folder says about the program that trained in it."""

import errno
import json
import os
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from beit_fast.train.checkpoint import run_folder
from beit_fast.train.checkpoint.format import save_checkpoint
from beit_fast.train.checkpoint.run_folder import RunFolder
from beit_fast.train.config import RunConfig


def git(folder, *words):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one committed file, which passes for this program's."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "program.py").write_text("one = 1\n")
    git(folder, "add", "program.py")
    git(folder, "commit", "--quiet", "--message", "begin")
    monkeypatch.setattr(run_folder, "__file__", str(folder / "program.py"))
    return folder


def test_the_commit_is_recorded(checkout):
    run = RunFolder(checkout)
    run.record_start(0, 1, torch.device("cpu"))
    (checkout / "program.py").write_text("one = 2\n")
    run.record_start(5, 1, torch.device("cpu"))
    starts = json.loads((checkout / "environment.json").read_text())["starts"]
    commit = git(checkout, "rev-parse", "HEAD").strip()
    assert [start["git_commit"] for start in starts] == [commit, f"{commit}-dirty"]
    assert [start["step"] for start in starts] == [0, 5]


def test_a_program_installed_below_another_repository_has_no_commit(checkout, tmp_path, monkeypatch):
    (checkout / "installed.py").write_text("")
    monkeypatch.setattr(run_folder, "__file__", str(checkout / "installed.py"))
    assert run_folder._git_commit() is None
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "nowhere.py"))
    assert run_folder._git_commit() is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(run_folder, "__file__", str(checkout / "program.py"))
    assert run_folder._git_commit() is None


@pytest.mark.parametrize(("processor", "device"), [("", "cpu"), ("a processor", "a processor")])
def test_a_start_names_the_processor_and_what_is_installed(tmp_path, monkeypatch, processor, device):
    monkeypatch.setattr(run_folder.platform, "processor", lambda: processor)
    monkeypatch.setattr(run_folder, "PACKAGES", ("torch", "no-such-package", "numpy"))
    RunFolder(tmp_path).record_start(0, 1, torch.device("cpu"))
    (start,) = json.loads((tmp_path / "environment.json").read_text())["starts"]
    assert start["device"] == device
    assert start["versions"].keys() == {"beit_fast", "python", "torch", "numpy"}
    assert start["versions"]["numpy"] == np.__version__


def test_a_folder_is_made_with_those_above_it(tmp_path):
    run = RunFolder(tmp_path / "not" / "there" / "yet")
    run.claim(RunConfig(output_dir=run.path), "t")
    run.release()
    assert (tmp_path / "not" / "there" / "yet" / "config.json").exists()


def test_the_start_of_a_run_is_kept_for_a_replay_of_what_follows(tmp_path):
    """The checkpoint of step 0, of a run that starts from weights, is before step 1 and not before itself."""
    run = RunFolder(tmp_path)
    save_checkpoint(run.checkpoints, 0, {"model": {"w": torch.zeros(1)}}, {}, 9)
    assert run.keep_for_replay(0) is None
    assert run.keep_for_replay(1) == "step_00000000"


def test_what_cannot_be_kept_or_removed_for_a_replay_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    run = RunFolder(tmp_path)
    for step in (3, 6, 9):
        save_checkpoint(run.checkpoints, step, {"model": {"w": torch.zeros(1)}}, {}, 9)
    run.replay.write_text("no folder")
    assert run.keep_for_replay(4) is None
    assert capsys.readouterr().out.startswith("step_00000003 cannot be kept for a replay: ")
    run.replay.unlink()
    assert run.keep_for_replay(4) == "step_00000003"
    assert run.keep_for_replay(7) == "step_00000006"

    def busy(path, **options):
        raise OSError(errno.EBUSY, "Device or resource busy", path)

    monkeypatch.setattr(os, "rmdir", busy)
    assert run.keep_for_replay(10) == "step_00000009"


def test_what_was_found_in_the_data_is_written_and_said(tmp_path):
    """Over what an earlier start found."""
    run = RunFolder(tmp_path)
    for words in ("one image", "two images"):
        found = SimpleNamespace(to_json=lambda words=words: [words], lines=lambda head, words=words: [head + words])
        assert run.record_data({"training": found}) == [f"training: {words}"]
    assert json.loads((tmp_path / "data.json").read_text()) == {"training": ["two images"]}
    assert os.listdir(tmp_path) == ["data.json"]
