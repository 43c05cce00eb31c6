"""Pictures of the records: the ratio to every baseline, and for GPUs the few bars of the README."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from benchmarks.records import Record, Row, newest
from benchmarks.remarks import remarks

INK, OTHER, FAINT = "#1f4e79", "#b3541e", "#bbbbbb"
HEADLINE = (
    ("Whole pre-training step, BEiT-B", r"^pre-training, whole step.*BEiT-base plus, 224 px", "official style"),
    ("Whole pre-training step, BEiT-L", r"^pre-training, whole step.*BEiT-large plus, 224 px", "official style"),
    ("Backbone, training step, BEiT-B", r"^backbone, training step: BEiT-base plus, 224 px", "transformers, SDPA"),
    ("Backbone, training step, BEiT-L", r"^backbone, training step: BEiT-large plus, 224 px", "transformers, SDPA"),
)
"""Title, pattern of the comparison, and the baseline that does the same work; what no record holds is left out."""


def draw(records: list[Record], folder: Path) -> list[Path]:
    """Write the pictures and return their paths; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(exist_ok=True)
    written = []
    for device in dict.fromkeys(record.device for record in records):
        own = [record for record in records if record.device == device]
        if (figure := ratios(own, device)) is not None:
            path = folder / f"{device}_ratios.png"
            figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
            written.append(path)
        if "cuda" in own[-1].environment and (text := headline(own)):
            path = folder / f"{device}_headline.svg"
            path.write_text(text)
            written.append(path)
    return written


def headline(records: list[Record]) -> str:
    """The comparisons of `HEADLINE` as bars of milliseconds, an SVG for light and dark pages; "" without any."""
    bars: list[tuple[str, Row, Row]] = []
    for title, pattern, baseline in HEADLINE:
        for record in newest(records):
            for group, rows in record.groups().items():
                named = {row.name: row for row in rows}
                if re.search(pattern, group) and {"beit_fast", baseline} <= named.keys():
                    bars.append((f"{title}, {_batch(group)}", named["beit_fast"], named[baseline]))
    if not bars:
        return ""
    longest = max(other.median_s for _, _, other in bars)
    parts, y = [], 62
    for title, ours, other in bars:
        parts.append(f'<text class="t" x="24" y="{y}">{escape(title)}</text>')
        for row, kind in ((ours, "o"), (other, "b")):
            y += 26
            width = 400 * row.median_s / longest
            rate = f", {row.info['images_per_s']:,.0f} images/s"
            times = f", {row.ratio[0]:.2f} times as long" if kind == "b" and row.ratio else ""
            parts += [
                f'<text class="n" x="164" y="{y}" text-anchor="end">{escape(row.name)}</text>',
                f'<rect class="{kind}" x="172" y="{y - 13}" width="{width:.1f}" height="17" rx="2"/>',
                f'<text class="v" x="{180 + width:.1f}" y="{y}">{1e3 * row.median_s:.3g} ms{rate}{times}</text>',
            ]
        y += 36
    device, record = records[-1].environment["device"], records[-1]
    note = f"{device}, bf16, {record.date}; medians of interleaved rounds, record {record.path.name}"
    style = (
        "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#1f2328}"
        ".h{font-size:17px;font-weight:600}.t{font-size:14px;font-weight:600}.n,.v{font-size:13px}.s{font-size:11px;"
        "fill:#59636e}.o{fill:#1f6feb}.b{fill:#a9b1ba}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9198a1}.o{fill:#58a6ff}.b{fill:#6e7681}}"
    )
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {y + 8}" width="860" height="{y + 8}" role="img">',
        "<title>Time of a training step on a GPU: beit_fast beside the official style and transformers</title>",
        f'<style>{style}</style><text class="h" x="24" y="28">Time per step, shorter is faster</text>',
        *parts, f'<text class="s" x="24" y="{y - 8}">{escape(note)}</text></svg>', "",
    ])  # fmt: skip


def _batch(group: str) -> str:
    found = re.search(r"B=(\d+)", group)
    return f"batch {found[1]}" if found else ""


def ratios(records: list[Record], device: str):
    """Every baseline's time over beit_fast's, with its 95 % interval, on a logarithmic axis."""
    from matplotlib.figure import Figure

    entries, notes = [], dict[str, int]()
    for record in newest(records):
        for row in record.rows:
            if row.ratio is not None and not row.is_ours:
                marks = [f" ({notes.setdefault(text, len(notes) + 1)})" for text in remarks(record, row, False)]
                entries.append((row.group, row.ratio, row.name + "".join(marks)))
    if not entries:
        return None
    height = 0.9 + 0.24 * (len(entries) + len({group for group, _, _ in entries}))
    figure = Figure(figsize=(9, height))
    axis = figure.add_subplot()
    y, labels, last = 0.0, [], None
    for group, (middle, low, high), label in entries:
        if group != last:
            y += 1
            axis.text(0.0, y, f" {group}", transform=axis.get_yaxis_transform(), fontsize=7, va="center", weight="bold")
            last = group
        y += 1
        colour = INK if middle >= 0.97 else OTHER
        axis.plot([low, high], [y, y], color=colour, lw=1.5)
        axis.plot([middle], [y], "o", color=colour, ms=4)
        labels.append((y, label))
    axis.axvline(1, color=FAINT, lw=1)
    axis.set_yticks([y for y, _ in labels], [label for _, label in labels], fontsize=7)
    axis.set_ylim(y + 1, 0)
    axis.set_xscale("log")
    lowest, highest = min(ratio[1] for _, ratio, _ in entries), max(ratio[2] for _, ratio, _ in entries)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if lowest / 1.3 <= t <= highest * 1.3]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    axis.minorticks_off()
    text = "time of the baseline / time of beit_fast, median and 95 % interval (right of 1: beit_fast is faster)"
    axis.set_xlabel("\n".join([text, *(f"({number}) {note}" for note, number in notes.items())]), fontsize=8)
    axis.set_title(f"{device}, {max(record.date for record in records)}", fontsize=9)
    return figure
