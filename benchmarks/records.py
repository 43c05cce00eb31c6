"""The committed records: reading them, and which of them count.

A record is pytest-benchmark's JSON, `<date>_<device>_<subject>.json`, never changed once it is committed. For each
device and subject the newest one speaks; the older ones are the trend and what a regression is measured against.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "records"


@dataclass(frozen=True)
class Row:
    """One implementation in one comparison."""

    group: str
    name: str
    median_s: float
    quartiles_s: tuple[float, float]
    rounds: int
    info: dict[str, Any]

    @property
    def is_ours(self) -> bool:
        """Whether it is beit_fast or a variant of it, not a baseline."""
        return self.name.startswith("beit_fast")

    @property
    def ratio(self) -> tuple[float, float, float] | None:
        """How many times as long as beit_fast: (median, low, high); None where it does not stand beside beit_fast."""
        found = self.info.get("over_beit_fast")
        return (found["median"], found["low"], found["high"]) if found else None

    @property
    def gain(self) -> tuple[float, float, float] | None:
        """Of a rung of the waterfall: how many times as fast as the rung before."""
        found = self.info.get("gain")
        return (found["median"], found["low"], found["high"]) if found else None

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.name


@dataclass(frozen=True)
class Record:
    """One file."""

    path: Path
    date: str
    device: str
    subject: str
    made: str
    """When, as ISO 8601; "" where the file does not say."""
    environment: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def command(self) -> str:
        return str(self.environment.get("command", "unknown"))

    @property
    def commit(self) -> str:
        return str(self.environment.get("commit", "unknown"))

    def groups(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found


def read(path: Path) -> Record | None:
    """The record in a file; None for a file that is something else (a training log, say).

    Raises:
        ValueError: the name is not that of a record.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or "benchmarks" not in data:
        return None
    parts = path.stem.split("_", 2)
    if len(parts) != 3 or len(parts[0]) != 10:
        raise ValueError(f"{path.name} is not named <date>_<device>_<subject>.json")
    rows = [_row(entry) for entry in data["benchmarks"] if "rival" in entry["extra_info"]]
    return Record(path, *parts, data.get("datetime", ""), data.get("beit_fast", {}), tuple(rows))


def _row(entry: dict[str, Any]) -> Row:
    stats, info = entry["stats"], entry["extra_info"]
    return Row(entry["group"], info["rival"], stats["median"], (stats["q1"], stats["q3"]), stats["rounds"], info)


def read_all(folder: Path = FOLDER) -> list[Record]:
    """Every record that holds rows, oldest first."""
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    return sorted((r for r in found if r is not None and r.rows), key=lambda r: (r.date, r.made))


def newest(records: list[Record]) -> list[Record]:
    """The last measurement of each comparison on each device.

    Those are the records, given oldest first, without the comparisons that a later one of the device repeats; in order
    of device and subject.
    """
    found, seen = [], set()
    for record in reversed(records):
        rows = tuple(row for row in record.rows if (record.device, row.group) not in seen)
        seen |= {(record.device, row.group) for row in rows}
        if rows:
            found.append(replace(record, rows=rows))
    return sorted(found, key=lambda r: (r.device, r.subject))


def history(records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """All records of each device and subject, oldest first."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.device, record.subject), []).append(record)
    return found
