"""The run folder: one process at a time, continued only by the configuration that began it.

config.json  environment.json  metrics.jsonl  anomalies.jsonl  checkpoints/  replay/  pictures/  report.html
"""

import fcntl
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from beit_fast.data.sources.writing import WriteError
from beit_fast.train.checkpoint import format as checkpoint
from beit_fast.train.checkpoint.format import Checkpoint
from beit_fast.train.config import RunConfig, fields_marked, flat, to_plain
from beit_fast.train.distributed.world import World
from beit_fast.version import __version__

FORMAT = "beit_fast run 1"
RATES = {"optim.lr", "optim.min_lr", "optim.warmup_lr"}
"""Settings that --resume-from, --extend and --change-batch-size may change, beside their own."""
EARLIER_VALUES: dict[str, Any] = {
    "data.value_range": None, "data.channels": None, "weights": None, "fine_tuned_weights": False,
    "defaults_by_images_seen": False, "layer_decay": None, "frozen_blocks": 0, "lora.rank": 0, "lora.alpha": None,
    "data.one_view": False, "objective.head_layers": 0, "objective.early_layers": 0,
}  # fmt: skip
"""What runs did before a setting existed, by its dotted name: runs of then are continued so."""
REPLAY_KEPT = 2
LOCK_PATIENCE_S = 3.0
"""A run that was just killed together with its launcher holds its folder until its last process is gone."""
PACKAGES = ("torch", "triton", "numpy", "safetensors", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "tyro", "apex")


class RunFolder:
    """Paths and files of a run. Only rank 0 changes anything; the others read after it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.anomalies = path / "anomalies.jsonl"
        self.replay = path / "replay"
        self._lock: IO[str] | None = None

    def claim(self, config: RunConfig, task: str) -> None:
        """Create or take over the folder: lock it, move an old run aside for --fresh, compare configurations.

        OSError where it cannot be written, ValueError where the run found there is another one or still running.
        """
        self._create()
        self._acquire()
        saved = self.saved()
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if saved is not None and config.fresh and not restarted:
            self._move_aside()
            saved = None
        if saved is not None and checkpoint.list_checkpoints(self.checkpoints):
            self._compare(saved, config, task)
        self.checkpoints.mkdir(exist_ok=True)
        if config.resume_from is not None and not restarted:
            self._rewind(config.resume_from)
        checkpoint.remove_leftovers(self.checkpoints)
        (self.path / "traceback.txt").unlink(missing_ok=True)  # of an earlier try
        value = {"format": FORMAT, "version": __version__, "task": task, "config": to_plain(config)}
        checkpoint.write_json(self.path / "config.json", value)

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise WriteError(
                error.errno, f"cannot write to {self.path} ({error.strerror}); choose another --output-dir"
            ) from None

    def _acquire(self) -> None:
        self._lock = (self.path / ".lock").open("a+")
        try:
            give_up = time.monotonic() + LOCK_PATIENCE_S
            while True:
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() > give_up:
                        raise
                    time.sleep(0.05)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {self.path}; stop it, or choose another --output-dir"
            ) from None
        except OSError:
            return  # a file system without locks

    def saved(self) -> dict[str, Any] | None:
        """What config.json holds; None where there is no run. ValueError where it is none of ours."""
        path = self.path / "config.json"
        if not path.exists():
            return None
        try:
            value = json.loads(path.read_text())
            if value["format"] == FORMAT and isinstance(value["config"], dict):
                return dict(value)
        except OSError as error:
            raise OSError(error.errno, f"cannot read {path} now ({error.strerror or error})") from error
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise ValueError(f"{path} was not written by this program's runs; choose another --output-dir")

    def _move_aside(self) -> None:
        real = self.path.resolve()  # of a link what it leads to moves, and it leads to the new folder
        if Path.cwd().is_relative_to(real):
            raise ValueError(
                f"--fresh: {real} is the folder you are in, which cannot be moved aside; start from another one, or "
                "choose another --output-dir"
            )
        number = 1
        while (target := real.with_name(f"{real.name}.{number}")).exists():
            number += 1
        self.release()
        try:
            real.rename(target)
        except OSError as error:  # a mount point, a folder of somebody else
            raise WriteError(
                error.errno, f"--fresh: cannot move {real} aside ({error.strerror}); choose another --output-dir"
            ) from error
        real.mkdir()
        print(f"--fresh: the run found in {self.path} was moved to {target}", flush=True)
        self._create()
        self._acquire()

    def compare(self, config: RunConfig, task: str) -> None:
        """ValueError where the folder holds no run, or one of another configuration; changes nothing."""
        saved = self.saved()
        if saved is None:
            raise ValueError(f"there is no run in {self.path}; name its --output-dir")
        self._compare(saved, config, task)

    def _compare(self, saved: dict[str, Any], config: RunConfig, task: str) -> None:
        own = ({"epochs", "steps"} if config.extend else set()) | (
            {"batch_size"} if config.change_batch_size else set()
        )
        free = fields_marked(config, "free") | own | (RATES if own or config.resume_from is not None else set())
        before, now = EARLIER_VALUES | flat(saved["config"]), flat(to_plain(config))
        names = [n for n in sorted(before.keys() & now.keys()) if before[n] != now[n] and n not in free]
        changed = [f"{n}: {json.dumps(before[n])} in that run, {json.dumps(now[n])} now" for n in names]
        ways = {"epochs": "--extend", "steps": "--extend", "batch_size": "--change-batch-size", **dict.fromkeys(RATES)}
        extra = ""
        if names and set(names) <= ways.keys():
            options = " ".join(sorted({way for n in names if (way := ways[n])})) or "--resume-from STEP"
            extra = f"{options} continues it so; or "
        if saved.get("task") != task:
            changed.insert(0, f"task: {saved.get('task')} in that run, {task} now")
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings ({'; '.join(changed)}); {extra}repeat its settings "
                "to continue it, or start another with --fresh or another --output-dir"
            )
        version = str(saved.get("version"))
        unknown = sorted((now.keys() - before.keys() - free) | (before.keys() - now.keys() - EARLIER_VALUES.keys()))
        if unknown or _numbers(version) > _numbers(__version__):
            fields = f": {', '.join(unknown)} are not known to both" if unknown else ""
            raise ValueError(
                f"{self.path} holds a run of beit_fast {version}, this is {__version__}{fields}; continue it with that "
                "version, or start another with --fresh or another --output-dir"
            )

    def _rewind(self, step: int) -> None:
        """Set aside every checkpoint after that of `step`; ValueError where it is not kept."""
        kept = checkpoint.list_checkpoints(self.checkpoints)
        steps = [checkpoint.step_of(path) for path in kept]
        if step not in steps:
            names = ", ".join(str(number) for number in steps) or "none"
            raise ValueError(f"--resume-from {step}: {self.checkpoints} keeps the checkpoints of steps {names}")
        for path in kept[steps.index(step) + 1 :]:
            print(f"--resume-from {step}: {path.name} is kept as {checkpoint.set_aside(path, 'superseded').name}")

    def check_identity(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """ValueError where the run began with other data or another tokenizer."""
        if changed := [name for name in before if before[name] != now.get(name)]:
            pairs = ", ".join(f"{name} {before[name]}, now {now.get(name)}" for name in changed)
            raise ValueError(
                f"the run in {self.path} began with {pairs}; restore what it was trained on, or start anew with --fresh"
            )

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint to continue from, and one line per newer one that was damaged (and is now set aside).

        Raises:
            OSError: a checkpoint cannot be read now; nothing is changed.
            ValueError: there were checkpoints, and none of them is sound.
        """
        newest, rejected = checkpoint.newest_checkpoint(self.checkpoints)
        damaged = [path.name for path in sorted(self.checkpoints.glob("damaged-*"))]
        if newest is None and (rejected or damaged):
            reasons = "; ".join([f"{path.name}: {reason}" for path, reason in rejected] + damaged)
            raise ValueError(
                f"no checkpoint in {self.checkpoints} is sound ({reasons}); put one back, or start anew with --fresh, "
                "which keeps this run aside"
            )
        notes = []
        for path, reason in rejected:
            moved = checkpoint.set_aside(path)
            assert newest is not None
            notes.append(
                f"checkpoint {path.name} is damaged: {reason}; kept as {moved.name}; continuing from {newest.path.name}"
            )
        return newest, notes

    def newest_for_all(self, world: World) -> tuple[Checkpoint | None, list[str]]:
        """`newest` on every rank, verified by rank 0; the notes are rank 0's."""
        newest, notes = self.newest() if world.is_main else (None, [])
        step = world.agree(-1 if newest is None else newest.step)
        if not world.is_main and step >= 0:
            newest = checkpoint.read_verified(self.checkpoints / f"{checkpoint.PREFIX}{step:08d}")
        if newest is not None:
            checkpoint.check_state(newest)
        return newest, notes

    def keep_for_replay(self, step: int) -> str | None:
        """Keep the newest checkpoint before step number `step` from being dropped; returns its name, None = the start.

        By hard links, so it takes no room until the run drops its own; at most `REPLAY_KEPT` are kept.
        """
        older = [p for p in checkpoint.list_checkpoints(self.checkpoints) if (checkpoint.step_of(p) or 0) < step]
        if not older:
            return None
        source, target = older[-1], self.replay / older[-1].name
        if not target.exists():
            work = self.replay / f".tmp-{source.name}"
            try:
                shutil.copytree(source, work, copy_function=os.link)
                work.rename(target)
            except OSError as error:
                print(f"{source.name} cannot be kept for a replay: {error.strerror}", flush=True)
                shutil.rmtree(work, ignore_errors=True)
                return None
            for old in checkpoint.list_checkpoints(self.replay)[:-REPLAY_KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        return source.name

    def record_data(self, contents: dict[str, Any]) -> list[str]:
        """Write what was found in the data (`data.sources.Contents` by use) to data.json; the same as lines of text."""
        work = self.path / "data.json.tmp"
        checkpoint.write_json(work, {use: found.to_json() for use, found in contents.items()})
        work.replace(self.path / "data.json")
        return [line for use, found in contents.items() for line in found.lines(f"{use}: ")]

    def record_start(self, step: int, world_size: int, device: torch.device) -> None:
        """Add this start to environment.json: when, where, with what."""
        path = self.path / "environment.json"
        try:
            starts = list(json.loads(path.read_text())["starts"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            starts = []
        versions: dict[str, str] = {"beit_fast": __version__, "python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        starts.append(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "step": step,
                "command": sys.argv,
                "host": socket.gethostname(),
                "world_size": world_size,
                "device": torch.cuda.get_device_name(device)
                if device.type == "cuda"
                else platform.processor() or "cpu",
                "cpu_count": os.cpu_count(),
                "torch_threads": torch.get_num_threads(),
                "cuda": torch.version.cuda,
                "versions": versions,
                "git_commit": _git_commit(),
            }
        )
        checkpoint.write_json(path, {"starts": starts})

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _git_commit() -> str | None:
    """The commit of this program, "-dirty" added where its files differ from it; None where it is not in a checkout."""
    source = Path(__file__).resolve()
    commands = (["ls-files", "--error-unmatch", source.name],
                ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])  # fmt: skip
    output = ""
    try:
        for command in commands:  # the first fails where the file is only installed below someone else's repository
            output = subprocess.run(
                ["git", *command], cwd=source.parent, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return output


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
