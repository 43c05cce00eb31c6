"""R21: archives and checkpoints that were made or changed to do harm, read under a memory limit."""

import importlib.util
import os
import pickle
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def hostile():
    path = Path(__file__).with_name("hostile.py")
    spec = importlib.util.spec_from_file_location("hostile", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile"] = module
    spec.loader.exec_module(module)
    return module


def read_all(ranks, root, cases, mark):
    """(index, case, what became of it, passed) of each."""
    for number, (reader, files) in enumerate(cases):
        folder = root / str(number)
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        found = ranks.read(
            reader, folder, BEIT_FAST_HOSTILE_MARK=str(mark), BEIT_FAST_CACHE=str(root / "cache"),
        )  # fmt: skip
        text = found["text"]
        clear = found["kind"] == "read" or (found["kind"] == "refused" and "\n" not in text and str(folder) in text)
        passed = clear and found["seconds"] < 2 and not mark.exists()
        yield number, reader, found, passed


def check(ranks, tmp_path, cases, monkeypatch, hostile):
    mark = tmp_path / "executed"
    monkeypatch.setenv("BEIT_FAST_HOSTILE_MARK", str(mark))
    failures, longest, refused = [], 0.0, 0
    for number, reader, found, passed in read_all(ranks, tmp_path, cases, mark):
        longest, refused = max(longest, found["seconds"]), refused + (found["kind"] == "refused")
        if not passed:
            failures.append((number, reader, found))
    for failure in failures:
        print(failure)
    pickle.loads(pickle.dumps(hostile.Runs()))
    assert mark.exists(), "the payload is live"
    os.unlink(mark)
    return len(cases) - len(
        failures
    ), f"{refused} refused, {len(cases) - refused} read; longest {longest:.1f} s of a core"


def test_some_hostile_files(ranks, tmp_path, monkeypatch, hostile):
    monkeypatch.setenv("BEIT_FAST_HOSTILE_MARK", str(tmp_path / "executed"))
    cases = hostile.checkpoints(200)[::10] + hostile.archives(200)[::20]
    passed, _ = check(ranks, tmp_path, cases, monkeypatch, hostile)
    assert passed == len(cases)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", ["checkpoints", "archives"])
def test_r21_two_hundred_hostile_files(ranks, tmp_path, monkeypatch, hostile, outcome, kind):
    monkeypatch.setenv("BEIT_FAST_HOSTILE_MARK", str(tmp_path / "executed"))
    cases = getattr(hostile, kind)(200)
    passed, note = check(ranks, tmp_path, cases, monkeypatch, hostile)
    what = "hostile checkpoints and configurations" if kind == "checkpoints" else "mutated and made-up archives"
    outcome("R21", f"{what} under a limit of 1 GiB: read, or refused in one line that names the file", len(cases),
            passed, "nothing executed, at most 2 s", note)  # fmt: skip
