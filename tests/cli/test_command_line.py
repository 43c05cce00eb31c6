"""What a user meets: options, one-line errors, exit codes, the run folder's manners."""

import json
import os
import resource

import pytest

from beit_fast.cli import train
from beit_fast.cli.options import option_names
from beit_fast.cli.train import main
from beit_fast.train.checkpoint.format import list_checkpoints


@pytest.fixture
def command(tiny, tmp_path, capsys):
    """`command("--steps", 5)` runs the tiny recipe in `tmp_path/run`: (exit code, stdout, stderr)."""

    def run(*arguments, folder=tmp_path / "run"):
        with pytest.raises(SystemExit) as stop:
            main(tiny.RECIPE, tiny.TinyTask, arguments=["--output-dir", str(folder), *map(str, arguments)])
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    return run


def is_one_line(text):
    return text.startswith("error: ") and text.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "did you mean --optim.lr?"),
        (["--lr", "1"], "did you mean --optim.lr?"),
        (["--batchsize", "4"], "did you mean --batch-size?"),
        (["--checkpont.keep=4"], "did you mean --checkpoint.keep?"),
        (["--keep=4"], "did you mean --checkpoint.keep?"),
        (["--zzz", "4"], "unknown option --zzz; --help lists them"),
        (["surplus"], "unexpected argument 'surplus'"),
        (["--optim.lr", "fast"], "could not convert string to float: 'fast'"),
        (["--precision", "fp8"], "--precision"),
        (["--steps"], "--steps"),
    ],
)
def test_wrong_options(command, arguments, message):
    code, _, err = command(*arguments)
    assert code == 2
    assert is_one_line(err)
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", 0], "--batch-size is 0"),
        (["--batch-size", 64], "less than one batch of 64"),
        (["--checkpoint.keep", 1], "at least 2"),
        (["--max-steps", 0], "--max-steps is 0"),
        (["--device", "tpu9"], "device 'tpu9' is not one of"),
    ],
)
def test_impossible_values(command, arguments, message):
    code, _, err = command(*arguments)
    assert code == 1
    assert is_one_line(err)
    assert message in err


@pytest.mark.parametrize(("arguments", "steps"), [((), 2), (("--optim.warmup-steps", 90), 1), (("--steps", 45), 2)])
def test_the_warm_up_of_a_short_run_is_a_tenth_and_is_said(command, arguments, steps):
    code, out, _ = command("--max-steps", 1, "--log.progress", "lines", *arguments)
    assert code == 0
    assert f"warm-up {steps} steps" in out


def test_every_field_is_an_option(tiny, command, capsys):
    assert {
        "--optim.lr",
        "--output-dir",
        "--max-steps",
        "--seed",
        "--batch-size",
        "--batch-per-device",
        "--fresh",
    } <= set(option_names(tiny.RECIPE))
    code, out, _ = command("--help")
    assert code == 0
    for name in option_names(tiny.RECIPE):
        assert name in out


def test_other_settings_are_named(command):
    assert command("--max-steps", 3)[0] == 0
    code, _, err = command("--optim.lr", 0.5, "--seed", 4)
    assert code == 1
    assert is_one_line(err)
    assert "optim.lr: 0.01 in that run, 0.5 now; seed: 0 in that run, 4 now" in err
    code, out, _ = command("--max-steps", 4, "--batch-per-device", 4, "--log.every-steps", 1)
    assert code == 0
    assert "continuing" in out


def test_fresh_moves_the_old_run_aside(command, tmp_path):
    command("--max-steps", 3)
    code, out, _ = command("--fresh", "--seed", 1, "--max-steps", 2)
    assert code == 0
    assert f"moved to {tmp_path / 'run.1'}" in out
    assert [p.name for p in list_checkpoints(tmp_path / "run.1" / "checkpoints")] == ["step_00000003"]
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]


def test_changed_data_is_named(command, tiny, monkeypatch):
    command("--max-steps", 3)
    monkeypatch.setattr(tiny.TinyTask, "num_samples", lambda self: 48)
    code, _, err = command()
    assert code == 1
    assert is_one_line(err)
    assert "num_samples 40, now 48" in err


def test_foreign_config_is_left_alone(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model_type": "beit"}')
    code, _, err = command()
    assert code == 1
    assert "was not written by this program" in err
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"model_type": "beit"}


def test_unwritable_output_dir(command, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command(folder=tmp_path / "file" / "run")
    assert code == 1
    assert is_one_line(err)
    assert "choose another --output-dir" in err


def test_two_runs_do_not_share_a_folder(command, tiny, tmp_path):
    from beit_fast.train.checkpoint.run_folder import RunFolder

    first = RunFolder(tmp_path / "run")
    first.claim(tiny.RECIPE, "tiny")
    code, _, err = command()
    assert code == 1
    assert "another process is training" in err
    first.release()
    assert command()[0] == 0


def test_wrong_apex_ends_the_command(command):
    code, _, err = command("--optim.impl", "apex")
    assert code == 1
    assert is_one_line(err)
    assert "--optim.impl torch" in err


def test_full_disk_loses_nothing(command, tmp_path, program, weights, environment, monkeypatch):
    """A limit on the file size, set between two runs of one command, stands for a disk that fills up."""
    folder = tmp_path / "run"
    assert command("--max-steps", 4)[0] == 0
    before = weights(folder)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

    monkeypatch.delitem(environment, "COVERAGE_PROCESS_CONFIG", raising=False)  # its file would meet the limit as well
    done = program(folder, preexec_fn=limit)
    assert done.returncode == 1, done.stdout + done.stderr
    assert is_one_line(done.stderr)
    assert "no room for the checkpoint of step 6" in done.stderr
    assert "step_00000004 is intact" in done.stderr
    assert weights(folder) == before
    assert [name for name in os.listdir(folder / "checkpoints") if name.startswith(".")] == []


def test_bugs_show_their_traceback(tiny, tmp_path, monkeypatch):
    """Only errors written for the user are cut to one line."""

    def broken(self, *args):
        raise AttributeError("a bug")

    monkeypatch.setattr(tiny.TinyTask, "loss", broken)
    with pytest.raises(AttributeError, match="a bug"):
        main(tiny.RECIPE, tiny.TinyTask, arguments=["--output-dir", str(tmp_path)])


def test_demo_values_step_in_without_data(tmp_path, tiny, capsys, monkeypatch):
    """A demo replaces the recipe's values where no data is named, and the command line overrides either."""
    import dataclasses

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Data:
        path: str | None = None
        """Data."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithData(tiny.TinyConfig):
        data: Data = dataclasses.field(default_factory=Data)

    values = {f.name: getattr(tiny.RECIPE, f.name) for f in dataclasses.fields(tiny.RECIPE)}
    paper = WithData(**values | {"steps": 6})
    monkeypatch.setattr(train, "demo_of", lambda config: dataclasses.replace(config, steps=4, samples=16))
    seen = []

    def task(config):
        seen.append((config.steps, config.samples, config.seed))
        return tiny.TinyTask(config)

    for number, arguments in enumerate([[], ["--data.path", "/x"], ["--samples", "24", "--seed", "3"]]):
        with pytest.raises(SystemExit) as stop:
            main(paper, task, arguments=["--output-dir", str(tmp_path / str(number)), *arguments])
        assert not stop.value.code
    assert seen == [(4, 16, 0), (6, 40, 0), (4, 24, 3)]
    assert capsys.readouterr().out.count("Built-in demo") == 2
    with pytest.raises(SystemExit):
        main(paper, task, demo=False, arguments=["--output-dir", str(tmp_path / "no_demo")])
    assert seen[-1] == (6, 40, 0)
    assert "Built-in demo" not in capsys.readouterr().out
