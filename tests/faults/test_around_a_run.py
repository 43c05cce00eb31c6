"""What lies around a run: folders that are links, lines of other programs, ports in use, homes that are not there."""

import dataclasses
import json
import os
import pwd
import socket
import stat

import pytest
import torch

from beit_fast.cli.train import main
from beit_fast.data.sources import default_cache_dir
from beit_fast.models.hub import write_weights
from beit_fast.tokenizers import download
from beit_fast.train import engine
from beit_fast.train.checkpoint.format import list_checkpoints
from beit_fast.train.metrics import read_metrics
from beit_fast.visualize.run_report import write_report

STEPS = ("--steps", 12, "--eval-every", 3)


@pytest.mark.parametrize("step", [pytest.param(6, marks=pytest.mark.slow), 12])
def test_an_evaluation_that_fails_on_one_rank(ranks, tmp_path, state_of, step):
    """Given up by both; before the last step it costs nothing, at the last the same command repeats it."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ranks.run(whole, 2, *STEPS).code == 0
    done = ranks.run(run, 2, *STEPS, "--bad-evaluation", step, "--bad-rank", 1)
    assert not done.hung
    assert "the validation images vanished" in done.log
    assert "it failed on another rank" in done.log
    assert done.code == (0 if step < 12 else 1), done.log
    assert list_checkpoints(run / "checkpoints")[-1].name == "step_00000012"
    if step == 12:
        assert len([line for line in done.log.splitlines() if line.startswith("error")]) == 2
        assert ranks.run(run, 2, *STEPS).code == 0
    assert state_of(run)[1] == state_of(whole)[1]
    evaluated = [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "evaluation"]
    assert evaluated == [s for s in (3, 6, 9, 12) if s != step or step == 12]


def test_a_port_in_use_is_one_line(ranks, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        done = ranks.run(tmp_path / "run", 1, environment=environment)
    (line,) = [line for line in done.log.splitlines() if line.startswith("error")]
    assert f"cannot meet the others at 127.0.0.1:{port}" in line
    assert "Choose another MASTER_PORT" in line
    assert done.code == 1
    assert "Traceback" not in done.log


def test_fresh_moves_what_a_link_leads_to(tiny, tmp_path):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    link.symlink_to(real)
    config = dataclasses.replace(tiny.RECIPE, output_dir=link)
    engine.run(tiny.TinyTask(config))
    before = (real / "metrics.jsonl").read_bytes()
    engine.run(tiny.TinyTask(dataclasses.replace(config, fresh=True, max_steps=3)))
    assert link.readlink() == real
    assert (tmp_path / "disk" / "real.1" / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in list_checkpoints(real / "checkpoints")] == ["step_00000003"]


def test_fresh_in_the_current_folder_is_refused(tiny, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run", max_steps=3)
    engine.run(tiny.TinyTask(config))
    monkeypatch.chdir(config.output_dir)
    for here in (".", "../run"):
        again = dataclasses.replace(config, fresh=True, output_dir=type(tmp_path)(here))
        with pytest.raises(ValueError, match=r"--fresh: .*run is the folder you are in, .*another --output-dir"):
            engine.run(tiny.TinyTask(again))
    assert [path.name for path in list_checkpoints(config.output_dir / "checkpoints")] == ["step_00000003"]


def test_a_traceback_does_not_outlive_the_next_try(tiny, tmp_path):
    folder = tmp_path / "run"
    arguments = ["--output-dir", str(folder), "--device", "cpu"]
    for more, code in (("--bad-evaluation", "12"), 1), ((), 0):
        with pytest.raises(SystemExit) as stop:
            main(tiny.RECIPE, tiny.TinyTask, arguments=[*arguments, *more])
        assert stop.value.code == code
        assert (folder / "traceback.txt").exists() == bool(code)


FOREIGN = [
    b"not json", b"5", b"[1, 2]", b'"text"', b"null", b'{"kind": "train"}', b'{"step": "4", "loss": 1}',
    b'{"step": 4, "loss": "low"}', b'{"kind": "train", "step": null}', b'{"step": 3, "loss": [1]}',
    b'{"step": true, "loss": {}}', b"[" * 100_000, b"\xff\xfe", b'{"step": 1e999, "loss": 1}',
    b'{"kind": 7, "step": 2}',
]  # fmt: skip


def test_lines_of_other_programs_end_neither_report_nor_run(tiny, tmp_path):
    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run", max_steps=6)
    engine.run(tiny.TinyTask(config))
    path = config.output_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b"\n".join([*FOREIGN, b'{"kind": "train", "st']))
    (config.output_dir / "environment.json").write_text('{"starts": [1, "x", null, {"step": 0}]}')
    (config.output_dir / "data.json").write_text("[" * 100_000)
    assert "</html>" in write_report(config.output_dir).read_text()
    assert engine.run(tiny.TinyTask(dataclasses.replace(config, max_steps=None))).step == 12
    kept = path.read_bytes() + (config.output_dir / "metrics.superseded.jsonl").read_bytes()
    assert all(line in kept for line in FOREIGN)
    assert "</html>" in (config.output_dir / "report.html").read_text()


def test_without_a_home_the_way_out_is_named(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "BEIT_FAST_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for function in (default_cache_dir, download.default_cache_dir):
        with pytest.raises(ValueError, match="set BEIT_FAST_CACHE to a folder"):
            function()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_weights_have_the_permissions_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_weights({"w": torch.ones(3)}, tmp_path / "w.safetensors", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == 0o666 & ~mask


def test_a_state_of_another_program_is_named(tiny, tmp_path):
    """A checkpoint whose manifest holds for a state.json that says something else."""
    import zlib

    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run", max_steps=3)
    engine.run(tiny.TinyTask(config))
    (newest,) = list_checkpoints(config.output_dir / "checkpoints")
    saved = json.loads((newest / "state.json").read_text())
    for text in ("[" * 200_000, "5", "{}", json.dumps(saved | {"interval": {}}), json.dumps(saved | {"skipped": "x"})):
        (newest / "state.json").write_text(text)
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["files"]["state.json"] = {"bytes": len(text), "crc32": zlib.crc32(text.encode())}
        (newest / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"state\.json is no state of a run .*--resume-from"):
            engine.run(tiny.TinyTask(dataclasses.replace(config, max_steps=None)))
