"""Trackers: what each library reads back of a run, and that none of them can end one."""

import dataclasses
import itertools
import json
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit_fast.train import engine, trackers
from beit_fast.train.config import TRACKER_NAMES, LogConfig
from beit_fast.train.metrics import read_metrics


@pytest.fixture
def train(tiny, tmp_path):
    """`train("tensorboard,wandb")` runs the tiny recipe, which draws a picture at every evaluation."""

    def run(names, folder="run", **changes):
        class Drawing(tiny.TinyTask):
            def evaluate(self, model, step):
                pictures = self.config.output_dir / "pictures"
                pictures.mkdir(exist_ok=True)
                pixels = np.full((5, 7, 3), step, np.uint8)
                Image.fromarray(pixels).save(pictures / f"reconstructions_step_{step:08d}.png")
                return super().evaluate(model, step)

        log = LogConfig(every_steps=2, progress="none", trackers=names)
        config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / folder, eval_every=6, log=log, **changes)
        return engine.run(Drawing(config)), config.output_dir

    return run


def expected_of(folder):
    """The numbers of metrics.jsonl by tracker name and step."""
    found = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        for name, value in line.items():
            if name not in ("kind", "step") and value is not None:
                found.setdefault(f"{line['kind']}/{name}", {})[line["step"]] = value
    return found


def test_the_names_of_the_options_are_those_of_the_classes():
    assert set(trackers.TRACKERS) == set(TRACKER_NAMES)
    with pytest.raises(ValueError, match=r"--log.trackers: 'tensorbord' is none of tensorboard, wandb, mlflow"):
        LogConfig(trackers="wandb, tensorbord")


class Recorder(trackers.Tracker):
    """Keeps what it is told."""

    def __init__(self, folder, name, config, step):
        self.told = Recorder.told = [("open", folder, name, config["batch_size"], step)]

    def scalars(self, values, step):
        self.told.append(("scalars", dict(values), step))

    def picture(self, name, path, step):
        self.told.append(("picture", name, path.name, step))

    def close(self, finished):
        self.told.append(("close", finished))


def test_a_tracker_is_told_what_metrics_hold_in_order(train, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Recorder)
    _, folder = train("tensorboard", max_steps=8)
    told = Recorder.told
    assert told[0] == ("open", folder, "tiny", 8, 0)
    assert told[-1] == ("close", True)
    found = {}
    for _, values, step in (entry for entry in told if entry[0] == "scalars"):
        for name, value in values.items():
            found.setdefault(name, {})[step] = value
    assert found == expected_of(folder)
    pictures = [entry[1:] for entry in told if entry[0] == "picture"]
    assert pictures == [("reconstructions", f"reconstructions_step_{step:08d}.png", step) for step in (6, 8)]
    train("tensorboard")
    assert Recorder.told[0][-1] == 8
    assert [entry[2] for entry in Recorder.told if entry[0] == "scalars"] == [10, 12, 12]


def broken(*arguments):
    raise ConnectionError("the server is gone")


@pytest.mark.parametrize("method", ["__init__", "scalars", "picture", "close"])
def test_a_tracker_that_fails_costs_no_step(train, monkeypatch, capsys, weights, method):
    whole = weights(train("", "whole")[1])
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", type("Broken", (Recorder,), {method: broken}))
    result, folder = train("mlflow")
    assert (result.exit_code, result.step) == (0, 12)
    assert weights(folder) == whole
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: the tracker mlflow failed, training goes on (ConnectionError: the server is gone)"
    ]  # once, however often
    assert len(read_metrics(folder / "metrics.jsonl")) == 8


def test_a_tracker_that_never_answers_costs_no_step(train, monkeypatch, capsys):
    never = threading.Event()
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.2)
    monkeypatch.setattr(trackers, "WAITING", 2)
    hangs = type("Hangs", (Recorder,), {"scalars": lambda *arguments: never.wait(60)})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", hangs)
    result, folder = train("wandb")
    never.set()
    assert (result.exit_code, result.step) == (0, 12)
    assert (
        "the tracker wandb failed, training goes on (TimeoutError: it is 2 entries behind)" in capsys.readouterr().err
    )
    assert len(read_metrics(folder / "metrics.jsonl")) == 8


def test_a_library_that_is_not_installed_is_named_with_its_extra(train, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train("wandb")[0].exit_code == 0
    assert "pip install 'beit-fast[trackers]'" in capsys.readouterr().err


def close_to(found, expected):
    """The same names and steps, and values up to float32, which TensorBoard keeps."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6, abs=1e-12), name


@pytest.mark.slow
def test_tensorboard_reads_the_metrics_back(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("tensorboard", max_steps=7)
    _, folder = train("tensorboard")  # a continuation is one curve
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    found = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    close_to(found, expected_of(folder))
    pictures = events.Images("reconstructions")
    assert [(p.step, p.width, p.height) for p in pictures] == [(6, 7, 5), (7, 7, 5), (12, 7, 5)]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.removeprefix("```json").removesuffix("```"))["batch_size"] == 8


def wandb_records(path):
    """The records of an offline run: LevelDB's log format, each a message of wandb's own protocol."""
    from wandb.proto import wandb_internal_pb2

    data, record = path.read_bytes(), b""
    assert data[:4] == b":W&B"
    place = 7
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:  # the rest of a block
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if not kind:
            break
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            yield message
            record = b""


def finished_records(path):
    """The records of a run whose end is written: another process of wandb's writes it."""
    give_up = time.monotonic() + 300
    while not (records := list(wandb_records(path))) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < give_up, "wandb never wrote the end of the run"
        time.sleep(0.1)
    return records


@pytest.mark.slow
def test_wandb_reads_the_metrics_back(train, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train("wandb", max_steps=7)
    _, folder = train("wandb")
    found, pictures, config = {}, [], {}
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.stem for path in files}) == 1  # a continuation is the same run
    assert len(files) == 2
    for message in itertools.chain(*map(finished_records, files)):
        values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in message.history.item}
        config |= {item.key: json.loads(item.value_json) for item in message.run.config.update}
        step = values.pop("step", None)
        for name, value in values.items():
            if name.startswith(("train/", "evaluation/")):
                found.setdefault(name, {})[step] = value
        if "reconstructions/width" in values:
            pictures.append((step, values["reconstructions/width"], values["reconstructions/height"]))
    close_to(found, expected_of(folder))
    assert pictures == [(6, 7, 5), (7, 7, 5), (12, 7, 5)]
    assert config["batch_size"] == 8


@pytest.mark.slow
def test_mlflow_reads_the_metrics_back(train, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    train("mlflow", max_steps=7)
    _, folder = train("mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("beit_fast").experiment_id])
    found = {
        name: {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }
    close_to(found, expected_of(folder))
    assert run.data.params["optim.lr"] == "0.01"
    assert run.info.status == "FINISHED"
    pictures = [Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, "pictures")]
    assert pictures == [f"reconstructions_step_{step:08d}.png" for step in (6, 7, 12)]
