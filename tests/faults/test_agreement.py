"""R17 and what a run is continued with: ranks, versions and settings that differ are named; a ruined run goes back."""

import dataclasses
import json
import socket

import pytest
import torch
import torch.distributed as dist

from beit_fast.train import engine
from beit_fast.train.anomalies import Divergence
from beit_fast.train.checkpoint import run_folder
from beit_fast.train.checkpoint.format import list_checkpoints, verify
from beit_fast.train.config import OptimConfig
from beit_fast.train.distributed import launch
from beit_fast.train.distributed.world import World

FIELDS = {
    "optim.lr": ("--optim.lr", 0.02),
    "seed": ("--seed", 1),
    "samples": ("--samples", 48),
    "batch_size": ("--batch-size", 4),
    "width": ("--width", 8),
    "precision": ("--precision", "bf16"),
    "beit_fast": ("version", "9.9.9"),
    "torch": ("torch", "1.0.0"),
}
"""Field, and what rank 1 is started with in its place: an option, or a version."""


@pytest.mark.parametrize("name", FIELDS)
def test_r17_ranks_that_differ_are_named(ranks, tmp_path, outcome, name):
    option, value = FIELDS[name]
    done = ranks.run(tmp_path / "run", 2, faults={"0": {"rank": 1, "differs": [option, str(value)]}})
    lines = [line for line in done.log.splitlines() if line.startswith("error")]
    named = [line for line in lines if f"{name} (rank 0: " in line and "start all of them alike" in line]
    nothing = not list_checkpoints(tmp_path / "run" / "checkpoints")
    passed = done.code == 1 and not done.hung and len(named) == 2 and nothing
    what = "ranks that differ in one of 8: rate, seed, data, batch, model, precision, beit_fast, torch"
    outcome("R17", what, 1, int(passed), "named by all ranks before the first step", cost=(0, done.seconds, 0))


def test_ranks_may_differ_in_what_is_local(ranks, tmp_path):
    done = ranks.run(tmp_path / "run", 2, faults={"0": {"rank": 1, "differs": ["--hang-timeout-s", "90"]}})
    assert done.code == 0, done.log


def test_the_store_listens_on_the_loopback_only():
    """Every listening socket of this process while a launcher's store is open, from the kernel's own table."""
    seen = {}

    class Looks:
        def poll(self):
            return 0

        def __init__(self, environment):
            port = int(environment["MASTER_PORT"])
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            store.set("key", "value")
            assert store.get("key") == b"value"
            for table in ("tcp", "tcp6"):
                with open(f"/proc/net/{table}") as file:
                    rows = [line.split() for line in file.readlines()[1:]]
                for row in rows:
                    address, own = row[1].rsplit(":", 1)
                    if row[3] == "0A" and int(own, 16) == port:
                        seen[table] = address
            assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"

    assert launch.launch(1, "cpu", Looks) == 0
    assert seen == {"tcp": f"{int.from_bytes(socket.inet_aton('127.0.0.1'), 'little'):08X}"}


def test_gpus_that_are_not_there_are_refused():
    if torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    with pytest.raises(ValueError, match="--gpus 8: this machine has 0 CUDA devices; --device cpu runs without"):
        launch.launch(8, "auto", lambda environment: pytest.fail("started"))


@pytest.fixture
def stopped(tiny, tmp_path):
    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run", max_steps=6)
    engine.run(tiny.TinyTask(config))
    return dataclasses.replace(config, max_steps=None)


def change_saved(folder, change):
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))


def test_a_run_that_lacks_a_setting_is_refused_with_the_list(tiny, stopped):
    change_saved(stopped.output_dir, lambda saved: saved["config"].pop("dropout"))
    with pytest.raises(ValueError, match=r"holds a run of beit_fast .*: dropout are not known to both"):
        engine.run(tiny.TinyTask(stopped))


def test_a_setting_that_runs_lacked_has_the_value_of_then(tiny, stopped, monkeypatch):
    change_saved(stopped.output_dir, lambda saved: saved["config"].pop("dropout"))
    monkeypatch.setitem(run_folder.EARLIER_VALUES, "dropout", 0.5)
    with pytest.raises(ValueError, match=r"dropout: 0\.5 in that run, 0\.0 now"):
        engine.run(tiny.TinyTask(stopped))
    monkeypatch.setitem(run_folder.EARLIER_VALUES, "dropout", 0.0)
    assert engine.run(tiny.TinyTask(stopped)).step == 12


def test_a_run_of_a_newer_version_is_refused(tiny, stopped):
    change_saved(stopped.output_dir, lambda saved: saved.update(version="99.0"))
    with pytest.raises(ValueError, match=r"holds a run of beit_fast 99\.0, this is "):
        engine.run(tiny.TinyTask(stopped))


def test_a_ruined_run_keeps_its_last_good_checkpoint_and_goes_back_to_it(tiny, tmp_path, capsys):
    """A learning rate that ruins the weights in finite steps: rotation leaves the step before it."""
    config = dataclasses.replace(tiny.RECIPE, output_dir=tmp_path / "run", steps=30, max_steps=6)
    engine.run(tiny.TinyTask(config))
    wild = dataclasses.replace(config, resume_from=6, max_steps=None, optim=OptimConfig(lr=1e6, warmup_epochs=0.4))
    engine.run(tiny.TinyTask(wild))
    assert "the weights may be ruined" in capsys.readouterr().out
    kept = {path.name: verify(path).state["diverged"] for path in list_checkpoints(config.output_dir / "checkpoints")}
    assert kept == {"step_00000006": False, "step_00000027": True, "step_00000030": True}
    calm = dataclasses.replace(config, resume_from=6, max_steps=12, optim=OptimConfig(lr=5e-3, warmup_epochs=0.4))
    result = engine.run(tiny.TinyTask(calm))
    assert result.step == 12
    assert result.metrics["loss"] < 3
    names = {path.name for path in (config.output_dir / "checkpoints").iterdir()}
    assert {"superseded-step_00000027", "superseded-step_00000030", "step_00000012"} <= names
    with pytest.raises(ValueError, match=r"--resume-from 7: .* keeps the checkpoints of steps .*12"):
        engine.run(tiny.TinyTask(dataclasses.replace(calm, resume_from=7)))


def test_ordinary_losses_do_not_diverge():
    world = World(0, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    watch = Divergence(world)
    for step in range(2000):  # from 9 nats to 3, with noise, and a spike now and then
        loss = 3 + 6 * 0.99**step + 0.3 * torch.randn((), generator=generator) + (20.0 if step % 200 == 150 else 0.0)
        watch.add(loss, torch.zeros(()))
    assert not watch.state(2000, print)["diverged"]
    for _ in range(10):
        watch.add(torch.tensor(1e10), torch.zeros(()))
    assert watch.state(2010, print)["diverged"]
