"""Files of ordinary training programs: their tensors are read, everything else in them is skipped unexecuted."""

import argparse
import collections
import datetime
import enum
import pathlib
import sys
import types

import numpy as np
import pytest
import torch

import beit_fast
from beit_fast.models import CheckpointError, load_checkpoint
from beit_fast.models.reading import read_checkpoint

OPTIONS = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3, "img_size": 32}


def make(**options):
    return beit_fast.create_model("beit_base_patch16_224", **OPTIONS, **options)


STATE = make().state_dict()
AVERAGED = {name: tensor + 1 for name, tensor in STATE.items()}


def foreign(monkeypatch, module, name, base=object, **members):
    """A class of a package that is there when a file is written, and not when it is read."""
    parts = module.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
    kind = type(name, (base,), {"__module__": module, "__qualname__": name, **members})
    setattr(sys.modules[module], name, kind)
    return kind


class Phase(enum.Enum):
    TRAIN = 1


def contents(monkeypatch):
    """What stands beside the tensors, by the program that puts it there, and the names that the report gives."""
    buffer = foreign(monkeypatch, "mmengine.logging.history_buffer", "HistoryBuffer")()
    buffer.__dict__.update(_max_length=1000, _log_history=np.arange(3.0), _count_history=np.ones(3))
    config = foreign(monkeypatch, "mmengine.config.config", "ConfigDict", dict)(lr=1e-3, betas=(0.9, 0.98))
    omega = foreign(monkeypatch, "omegaconf.listconfig", "ListConfig", list)(["a", "b"])
    state = foreign(monkeypatch, "lightning.pytorch.utilities", "AttributeDict", dict)(weights=[1, 2])
    slots = foreign(monkeypatch, "fairseq.tasks", "Task")()
    return {
        "numpy metric": ({"max_accuracy": np.float64(83.2), "best": np.int64(3)}, "scalar"),
        "numpy array": ({"history": np.arange(5), "names": np.array(["a", "b"])}, "_reconstruct"),
        "numpy generator": ({"rng": np.random.RandomState(0).get_state()}, "_reconstruct"),
        "path": ({"args": argparse.Namespace(output_dir=pathlib.PosixPath("/x/y"), lr=1.0)}, "PosixPath"),
        "enum": ({"phase": Phase.TRAIN}, "Phase"),
        "date": ({"started": datetime.datetime(2022, 1, 2)}, "datetime"),
        "defaultdict": ({"counts": collections.defaultdict(list, {"a": [1]})}, "defaultdict"),
        "deque": ({"window": collections.deque([1.0, 2.0], maxlen=20)}, "deque"),
        "log buffer": ({"message_hub": {"loss": buffer}}, "HistoryBuffer"),
        "config": ({"meta": {"cfg": config}}, "ConfigDict"),
        "list of a class": ({"cfg": omega}, "ListConfig"),
        "hyperparameters": ({"hyper_parameters": state, "pytorch-lightning_version": "2.1"}, "AttributeDict"),
        "object": ({"task": slots, "function": len}, "Task"),
    }


NAMES = [
    "numpy metric", "numpy array", "numpy generator", "path", "enum", "date", "defaultdict", "deque", "log buffer",
    "config", "list of a class", "hyperparameters", "object",
]  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_are_read_and_the_rest_is_named(name, legacy, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        beside, expected = contents(patch)[name]
        torch.save({"before": beside, "model": STATE, **beside}, tmp_path / "w.pth",
                   _use_new_zipfile_serialization=not legacy)  # fmt: skip
    model = make()
    report = load_checkpoint(model, tmp_path / "w.pth", verbose=False)
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in model.state_dict().items())
    assert not any(name.startswith(("mmengine", "omegaconf", "lightning", "fairseq")) for name in sys.modules)
    if expected in ("scalar", "_reconstruct", "defaultdict"):  # torch may take these for harmless
        assert not report.skipped or any(expected in skipped for skipped in report.skipped)
    else:
        assert any(skipped.endswith(expected) for skipped in report.skipped), report.skipped
        assert "skipped, not executed" in str(report)


class Runs:
    """Runs a function where it is unpickled by an unpickler that runs what it reads."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["beside", "inside"])
@pytest.mark.parametrize("harm", ["eval", "exec", "open", "pathlib", "os"])
def test_nothing_is_executed(harm, place, legacy, tmp_path):
    import os

    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')"
    bomb = {
        "eval": Runs(eval, code), "exec": Runs(exec, code), "open": Runs(open, str(mark), "w"),
        "pathlib": Runs(pathlib.Path.touch, mark), "os": Runs(os.mkdir, str(mark)),
    }[harm]  # fmt: skip
    held = {"model": {**STATE, "x": bomb} if place == "inside" else STATE, "args": bomb}
    torch.save(held, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load_checkpoint(model, tmp_path / "w.pth", verbose=False)
    except CheckpointError:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    else:
        assert all(torch.equal(tensor, STATE[name]) for name, tensor in model.state_dict().items())
    assert not mark.exists()


@pytest.mark.parametrize(
    ("held", "first"),
    [
        ({"state_dict": STATE, "state_dict_ema": AVERAGED, "epoch": 3}, "state_dict_ema"),
        ({"model": STATE, "model_ema": AVERAGED, "optimizer": {}}, "model_ema"),
        ({"model_ema": AVERAGED, "module": STATE}, "model_ema"),
        ({"state_dict": {f"module.{k}": v for k, v in STATE.items()}, "state_dict_ema": AVERAGED}, "state_dict_ema"),
    ],
)
def test_averaged_weights_are_taken_and_named(held, first, tmp_path, capsys):
    path = tmp_path / "w.pth"
    torch.save(held, path)
    for ema, expected in ((True, AVERAGED), (False, STATE)):
        model = make()
        report = load_checkpoint(model, path, ema=ema)
        printed = capsys.readouterr().out
        assert (first in report.taken.partition("(")[0]) is ema
        assert f"ema={not ema}" in printed
        assert "not averaged" in printed or ema
        for loaded in (model, make(checkpoint_path=path, ema=ema)):
            assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())


def test_a_single_set_needs_no_choice(tmp_path):
    for held in (STATE, {"model": STATE}, {"state_dict_ema": AVERAGED}, {"model": STATE, "model_ema": {}}):
        torch.save(held, tmp_path / "w.pth")
        for ema in (True, False):
            checkpoint = read_checkpoint(tmp_path / "w.pth", ema=ema)
            assert checkpoint.taken == ""
            assert checkpoint.tensors.keys() == STATE.keys()


def test_timm_takes_the_same_set(tmp_path):
    from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

    make_torchvision_importable()
    timm = pytest.importorskip("timm")
    torch.save({"state_dict": STATE, "state_dict_ema": AVERAGED}, tmp_path / "w.pth")
    peer = timm.create_model("beit_base_patch16_224", **OPTIONS, checkpoint_path=str(tmp_path / "w.pth"))
    ours = make(checkpoint_path=tmp_path / "w.pth")
    for name, tensor in peer.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
