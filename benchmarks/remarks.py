"""What has to be said beside a number: conditions, why a row is slower, which slowdowns between records are accepted.

Every row in which beit_fast is slower than a baseline needs a line in `WHY`, or `report.py --check` fails.
"""

from __future__ import annotations

import re

from benchmarks.records import Record, Row

# (file of a record, pattern of the comparison's title, pattern of the row) -> what is to be known about that number.
REMARKS: dict[tuple[str, str, str], str] = {
    ("2026-11-26_nvidia-h100-80gb-hbm3_first.json", "^pre-training, whole step", "^transformers"): (
        "not like for like: here transformers' row made its tokens with DALL-E's encoder in fp32, those of beit_fast "
        "and the official style in fp16"
    ),
}

# (pattern of the comparison's title, pattern of the baseline) -> the reason. The first that fits is shown.
WHY: dict[tuple[str, str], str] = {
    ("checkpoint, save", r"torch\.save|safetensors"): (
        "beit_fast also computes a crc32 of every file, syncs file and folder, and renames; `torch.save` alone leaves "
        "the data in the page cache"
    ),
    ("checkpoint, verify and read", "safetensors"): (
        "beit_fast first reads every byte to check its crc32; safetensors maps the file and checks nothing"
    ),
    ("residual and LayerNorm, .*forward:", "torch.compile"): (
        "it fuses the sum with the norm, a pass over 5 MB less; the rounds differ widely, and the interval holds 1"
    ),
    ("bias and exact GELU", "torch.compile"): (
        "its C++ adds the bias and takes GELU in one pass; torch's own operations, which we call, need two"
    ),
    ("attention with a frozen bias, forward and backward: B=128, N=197", "SDPA"): (
        "at this batch size the time is that of launches, which the host makes: ten a call in beit_fast, fewer in "
        "SDPA; the interval holds 1"
    ),
    ("import in a fresh interpreter", "torch alone"): "torch is a part of every one of these imports",
}

# (device, comparison, baseline) -> why a slowdown against the record before it is right.
ACCEPTED: dict[tuple[str, str, str], str] = {}


def remarks(record: Record, row: Row, slower: bool) -> list[str]:
    """What stands beside this number: its conditions, and the reason where beit_fast is slower."""
    found = [
        text
        for (file, group, name), text in REMARKS.items()
        if file == record.path.name and re.search(group, row.group) and re.search(name, row.name)
    ]
    reason = why(row.group, row.name) if slower else None
    return found if reason is None else [*found, reason]


def why(group: str, name: str) -> str | None:
    """The reason for a slower row, or None if there is none."""
    for (of_group, of_baseline), reason in WHY.items():
        if re.search(of_group, group) and re.search(of_baseline, name):
            return reason
    return None


def unused(records: list[Record]) -> list[str]:
    """Remarks about numbers that no record holds."""
    held = {(record.path.name, row.group, row.name) for record in records for row in record.rows}
    return [
        f"remarks.py speaks of {file}, {group}, {name}, which no record holds"
        for file, group, name in REMARKS
        if any(record.path.name == file for record in records)
        and not any(file == f and re.search(group, g) and re.search(name, n) for f, g, n in held)
    ]
