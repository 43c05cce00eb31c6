"""Records to the tables of the documentation, and to pictures.

    python -m benchmarks.report            # writes tables and pictures
    python -m benchmarks.report --check    # fails where the tables do not match the records, a slower row has no
                                           # reason, or a newer record is slower beyond the noise that was measured

`docs/performance.md` holds the comparisons of `HEADLINES` and all rows of GPUs, `benchmarks/README.md` all of them,
`docs/reliability.md` the faults; each between markers.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks import faults
from benchmarks.records import FOLDER, Record, Row, history, newest, read_all
from benchmarks.remarks import ACCEPTED, remarks, unused, why

ROOT = Path(__file__).resolve().parents[1]
PICTURES = Path(__file__).parent / "pictures"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
SLOWER = 0.97
"""Below this ratio beit_fast counts as slower than a baseline."""

HEADLINES = (
    r"^pre-training",
    r"^backbone",
    r"^accelerate",
    r"^input pipeline",
    r"^mask sampler",
    r"^tokenizer: dalle",
    r"^optimizer",
)


def write_time(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            return f"{three_digits(seconds * factor)} {unit}"
    raise AssertionError


def three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def is_slower(row: Row) -> bool:
    """Whether beit_fast takes longer than this baseline: a median ratio below 0.97."""
    return row.ratio is not None and not row.is_ours and row.ratio[0] < SLOWER


def table(record: Record, page: Path, pattern: str | None = None) -> list[str]:
    """The table of a record as Markdown lines for `page`, its conditions below it; nothing if no title fits."""
    groups = {g: rows for g, rows in record.groups().items() if pattern is None or re.search(pattern, g)}
    if not groups:
        return []
    lines = [
        "| comparison | who | median (quartiles) | rounds | times beit_fast's time [95 %] |",
        "|---|---|---|---|---|",
    ]
    notes: dict[str, int] = {}
    for group, rows in groups.items():
        for number, row in enumerate(rows):
            low, high = row.quartiles_s
            mark = "".join(
                f" ({notes.setdefault(text, len(notes) + 1)})" for text in remarks(record, row, is_slower(row))
            )
            beside = format_ratio(row.ratio) if row.name != "beit_fast" else "1"
            if row.gain:
                beside = f"{format_ratio(row.gain)} times as fast as the row above"
            title = group if number == 0 else ""
            lines.append(
                f"| {title} | {row.name}{mark} | {write_time(row.median_s)} "
                f"({write_time(low)} to {write_time(high)}){rates(record, row)} | {row.rounds} | {beside} |"
            )
    lines.append("")
    lines += [f"({number}) {reason}." for reason, number in notes.items()]
    if notes:
        lines.append("")
    lines += [conditions(record, page), ""]
    return lines


def rates(record: Record, row: Row) -> str:
    """Of a GPU: images/s, and the share of the peak, by the data sheet and by this card's own matrix product."""
    found = [f"{row.info['images_per_s']:,.0f} images/s"] if "images_per_s" in row.info else []
    if "cuda" not in record.environment or not found:
        return ""
    for key, what in (("mfu", "of the data sheet's peak"), ("share_of_matmul", "of the measured product's rate")):
        if row.info.get(key):
            found.append(f"{row.info[key]:.0%} {what}")
    return "; " + ", ".join(found)


def format_ratio(ratio: tuple[float, float, float] | None) -> str:
    if ratio is None:
        return ""
    middle, low, high = (three_digits(value) for value in ratio)
    return f"{middle} [{low}, {high}]"


def conditions(record: Record, page: Path) -> str:
    e = record.environment
    versions = ", ".join(f"{name} {value}" for name, value in e.get("versions", {}).items())
    load = f", load average {e['load_average'][0]:.1f} at the end" if "load_average" in e else ""
    return (
        f"{record.date}, {record.device}, {e.get('threads', '?')} threads{load}; `{record.command}`; commit "
        f"`{record.commit}`; {versions}; record [`{record.path.name}`]({os.path.relpath(record.path, page.parent)})."
    )


def headline_tables(records: list[Record], page: Path) -> str:
    """What stands in docs/performance.md: GPUs first and whole, then the comparisons of `HEADLINES` on CPUs."""
    lines = list(preface(records))
    for record in sorted(newest(records), key=lambda record: "cuda" not in record.environment):
        lines += table(record, page, None if "cuda" in record.environment else "|".join(HEADLINES))
    return "\n".join(lines).rstrip()


def all_tables(records: list[Record], page: Path) -> str:
    """What stands in benchmarks/README.md."""
    lines = list(preface(records))
    for record in newest(records):
        lines += [f"### {record.device}: {record.subject.replace('_', ' ')}", "", *table(record, page)]
    return "\n".join(lines).rstrip()


def preface(records: list[Record]) -> Iterable[str]:
    if not any("cuda" in record.environment for record in records):
        yield "No record of a GPU exists yet: `make gpu-check` makes one. Nothing below says anything about a GPU."
        yield ""


def replaced(path: Path, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The content of a file with `text` between the markers.

    Raises:
        ValueError: it has not exactly one pair of them.
    """
    content = path.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{path.name} needs one pair of markers {begin} and {end}")
    before, rest = content.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def regressions(records: list[Record]) -> list[str]:
    """Where a newer record is slower than the one before it, beyond the noise of both.

    Judged by what was measured in the same rounds as a baseline (or the rung below): the machine may be busier than it
    was then, but so is the baseline. A ratio fell if its 95 % interval lies below the old one, and by more than 3 %.
    """
    found = []
    for (device, subject), sequence in history(records).items():
        for old, new in itertools.pairwise(sequence):
            before = {row.key: row.ratio or row.gain for row in old.rows}
            for row in new.rows:
                was, now = before.get(row.key), row.ratio or row.gain
                if was is None or now is None or row.name == "beit_fast":
                    continue
                fell = now[2] < was[1] and now[0] < SLOWER * was[0]
                if fell and (device, *row.key) not in ACCEPTED:
                    found.append(
                        f"{device}, {subject}: {row.group}, beside {row.name}: {format_ratio(now)} on {new.date}, "
                        f"{format_ratio(was)} on {old.date}"
                    )
    return found


def unexplained(records: list[Record]) -> list[str]:
    """Slower rows without a reason in remarks.py."""
    return [
        f"{record.path.name}: {row.group}: beit_fast is slower than {row.name} "
        f"({format_ratio(row.ratio)}) and remarks.py does not say why"
        for record in newest(records)
        for row in record.rows
        if is_slower(row) and why(row.group, row.name) is None
    ]


def targets(records: list[Record], folder: Path) -> list[tuple[Path, str, str, str]]:
    """Page, text, and the markers that it stands between; the faults come from a record in `folder`."""
    front, full, faulty = (
        ROOT / name for name in ("docs/performance.md", "benchmarks/README.md", "docs/reliability.md")
    )
    return [
        (front, headline_tables(records, front), BEGIN, END),
        (full, all_tables(records, full), BEGIN, END),
        (faulty, faults.section(folder, faulty), faults.BEGIN, faults.END),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Records to tables and pictures.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something does not match")
    parser.add_argument("--records", type=Path, default=FOLDER)
    given = parser.parse_args(arguments)
    records = read_all(given.records)
    problems = regressions(records) + unexplained(records) + unused(records)
    for path, text, begin, end in targets(records, given.records):
        try:
            wanted = replaced(path, text, begin, end)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        if given.check:
            if wanted != path.read_text():
                problems.append(f"{path.relative_to(ROOT)} does not match the records: python -m benchmarks.report")
        else:
            path.write_text(wanted)
    if not given.check:
        from benchmarks.plots import draw

        for path in draw(records, PICTURES):
            print(path.relative_to(ROOT))
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        rows = sum(len(record.rows) for record in newest(records))
        print(f"{len(records)} records, {rows} rows: tables match, no slower row without a reason, no regression")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
