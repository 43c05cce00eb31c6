"""What a run folder says about the program that trained in it."""

import json
import subprocess

import pytest
import torch

from beit_fast.train.checkpoint import run_folder
from beit_fast.train.checkpoint.run_folder import RunFolder


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
