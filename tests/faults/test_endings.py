"""R15, R16: the end of a run and the start of its continuation, where a process dies or a file cannot be read."""

import errno
import json
import pathlib
import shutil
import time

import pytest

from beit_fast.train import engine
from beit_fast.train.checkpoint import artefacts, format
from beit_fast.train.checkpoint.format import list_checkpoints
from beit_fast.train.metrics import read_metrics

ARTEFACTS = ("model/sums.json", "table.tsv")


def is_whole(folder, expected):
    """Whether a finished run's folder holds what an undisturbed one does, and says so."""
    files = {name: (folder / name).read_bytes() for name in ARTEFACTS if (folder / name).exists()}
    report = folder / "report.html"
    marked = artefacts.completed(folder, 12) is not None
    return marked and files == expected and report.exists() and report.read_text().rstrip().endswith("</html>")


@pytest.fixture(scope="module")
def finished(ranks, tmp_path_factory):
    """A folder with the artefacts of an undisturbed run, and the file with the number of calls of its ending."""
    root = tmp_path_factory.mktemp("finished")
    counts = root / "counts"
    done = ranks.run(root / "run", 1, faults={"0": {"rank": 0, "ending": 2.0, "counts": str(counts)}})
    assert done.code == 0, done.log
    expected = {name: (root / "run" / name).read_bytes() for name in ARTEFACTS}
    assert is_whole(root / "run", expected)
    assert int(counts.read_text()) > 1000
    return expected, counts


def killed_at_the_end(ranks, folder, finished, moments):
    """How many of the runs killed at these shares of their ending are whole after the same command."""
    expected, counts = finished
    passed, seconds = 0, 0.0
    for number, share in enumerate(moments):
        run = folder / str(number)
        fault = {"rank": 0, "ending": share, "counts": str(counts)}
        assert ranks.run(run, 1, faults={"0": fault}).code == -9
        assert [path.name for path in list_checkpoints(run / "checkpoints")][-1] == "step_00000012"
        done = ranks.run(run, 1)
        seconds = max(seconds, done.seconds)
        passed += done.code == 0 and is_whole(run, expected)
        assert len([line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "evaluation"]) == 1
    return passed, seconds


def test_a_run_killed_after_its_last_save_is_finished_by_the_same_command(ranks, tmp_path, finished):
    moments = (0.02, 0.5, 0.9)
    assert killed_at_the_end(ranks, tmp_path, finished, moments)[0] == len(moments)


@pytest.mark.slow
def test_r15_forty_kills_between_the_last_save_and_the_exit(ranks, tmp_path, finished, outcome):
    moments = [(number + 0.5) / 40 for number in range(40)]
    passed, seconds = killed_at_the_end(ranks, tmp_path, finished, moments)
    outcome("R15", "kill -9 at moments from the last save to the exit", 40, passed,
            "artefacts whole after the same command", cost=(0, seconds, 40 - passed))  # fmt: skip


@pytest.mark.parametrize("name", [*ARTEFACTS, "report.html", artefacts.MARKER])
@pytest.mark.parametrize("damage", ["torn", "missing"])
def test_a_damaged_artefact_is_made_again(tiny, tmp_path, name, damage):
    import dataclasses

    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run")
    engine.run(tiny.TinyTask(config))
    path, whole = tmp_path / "run" / name, (tmp_path / "run" / name).read_bytes()
    if damage == "torn":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.unlink()
    expected = {n: (tmp_path / "run" / n).read_bytes() for n in ARTEFACTS if n != name}
    result = engine.run(tiny.TinyTask(config))
    assert (result.exit_code, result.step) == (0, 12)
    assert "held_out_loss" in result.metrics
    assert is_whole(tmp_path / "run", expected | ({name: whole} if name in ARTEFACTS else {}))


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def stopped(tiny, tmp_path):
    """The configuration of a run that was stopped at step 6, and its folder."""
    import dataclasses

    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run", max_steps=6)
    engine.run(tiny.TinyTask(config))
    return dataclasses.replace(config, max_steps=None)


def unreadable(tiny, config, monkeypatch, number, at):
    """Run with the `at`-th look at a file of a checkpoint failing; returns the error, None with fewer looks."""
    calls = 0
    train = engine.TrainingRun.train

    def failing(function):
        def wrapper(path, *arguments, **options):
            nonlocal calls
            if "step_" in str(path) and calls >= 0:
                calls += 1
                if calls == at:
                    raise OSError(number, "made to fail")
            return function(path, *arguments, **options)

        return wrapper

    def begun(run):
        nonlocal calls
        calls = -1
        train(run)

    with monkeypatch.context() as patch:
        for name in ("open", "stat"):
            patch.setattr(pathlib.Path, name, failing(getattr(pathlib.Path, name)))
        patch.setattr(format, "safe_open", failing(format.safe_open))
        patch.setattr(engine.TrainingRun, "train", begun)
        try:
            engine.run(tiny.TinyTask(config))
        except OSError as error:
            return str(error)
    return None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_r16_what_cannot_be_read_now_is_left_as_it_is(tiny, stopped, monkeypatch, outcome, number):
    """At each look at a file of a checkpoint during a resume: nothing is renamed, nothing is lost."""
    folder = stopped.output_dir
    shutil.copytree(folder, folder.with_name("before"))
    before, looks = tree(folder), 0
    for at in range(1, 100):
        began = time.monotonic()
        error = unreadable(tiny, stopped, monkeypatch, number, at)
        if error is None:
            break
        assert "made to fail" in error
        assert "\n" not in error
        looks += 1
        after = tree(folder)
        assert after.keys() == before.keys()
        assert {n for n in after if after[n] != before[n]} <= {"config.json"}
    assert looks >= 8
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")][-1] == 12
    assert artefacts.completed(folder, 12) is not None
    outcome("R16", f"{errno.errorcode[number]} at each read of a resume", looks, looks,
            "nothing renamed, nothing lost", cost=(0, time.monotonic() - began, 0))  # fmt: skip


def test_a_run_never_starts_anew_by_itself(tiny, stopped):
    """Every checkpoint is damaged: the run says so and touches nothing."""
    folder = stopped.output_dir
    for path in list_checkpoints(folder / "checkpoints"):
        (path / "model.safetensors").write_bytes(b"damaged")
    before = tree(folder)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is sound \(step_00000006: .*--fresh"):
        engine.run(tiny.TinyTask(stopped))
    after = tree(folder)
    assert {n for n in before if after.get(n) != before[n]} <= {"config.json"}


def test_no_line_of_metrics_is_deleted(tiny, stopped):
    """Lines beyond the resumed step move to another file; foreign and torn lines stay somewhere."""
    folder = stopped.output_dir
    path = folder / "metrics.jsonl"
    before = path.read_bytes()
    foreign = b'not json\n{"kind": "evaluation", "step": -1e999}\n'
    path.write_bytes(before + foreign + b'{"kind": "train", "step": 8, "loss": 1.0}\n[' + b"[" * 100_000 + b'\n{"torn')
    engine.run(tiny.TinyTask(stopped))
    superseded = (folder / "metrics.superseded.jsonl").read_bytes()
    kept = path.read_bytes()
    assert kept.startswith(before + foreign + b"[[")
    assert b'{"kind": "train", "step": 8, "loss": 1.0}\n' in superseded
    assert superseded.endswith(b'{"torn\n')
    assert json.loads(kept.splitlines()[-1])["step"] == 12
