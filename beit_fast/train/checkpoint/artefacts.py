"""What a finished run leaves: files published one by one, then a marker that all of them are there and whole."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit_fast.train.checkpoint.format import file_crc32, sync_folder, write_json

MARKER = "complete.json"
WORK = ".tmp-finish"


def new_work_folder(run_dir: Path) -> Path:
    """An empty folder inside the run folder for artefacts that are not published yet."""
    work = run_dir / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    return work


def publish(run_dir: Path, work: Path) -> list[Path]:
    """Move every file of `work` into the run folder, each whole or not at all; returns where they are now."""
    published = []
    for source in sorted(path for path in work.rglob("*") if path.is_file()):
        target = run_dir / source.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.replace(target)
        sync_folder(target.parent)
        published.append(target)
    shutil.rmtree(work, ignore_errors=True)
    return published


def mark_complete(
    run_dir: Path, step: int, artefacts: list[Path], metrics: Mapping[str, Any], early: bool = False
) -> None:
    """Say that the run is complete at `step` with these files; nothing of the run is written after this.

    `early`: before the end of its schedule, because nothing was gained any more.
    """
    files = {
        str(path.relative_to(run_dir)): {"bytes": path.stat().st_size, "crc32": file_crc32(path)} for path in artefacts
    }
    write_json(run_dir / MARKER, {"step": step, "artefacts": files, "metrics": dict(metrics), "early": early})


def unmark(run_dir: Path) -> None:
    """The run goes on: it is no longer complete."""
    (run_dir / MARKER).unlink(missing_ok=True)


def completed(run_dir: Path, step: int, early: bool = False) -> dict[str, Any] | None:
    """The final metrics of a run that is complete at `step` with every artefact whole; None where something is left.

    With `early` only where it ended early.
    """
    try:
        marker = json.loads((run_dir / MARKER).read_text())
        if marker["step"] != step or (early and not marker.get("early")):
            return None
        for name, entry in marker["artefacts"].items():
            path = run_dir / name
            if path.stat().st_size != entry["bytes"] or file_crc32(path) != entry["crc32"]:
                return None
        return dict(marker["metrics"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
