"""Two pictures for each device: the ratio to every rival, and beit_fast's throughput over the records."""

from __future__ import annotations

from pathlib import Path

from benchmarks.records import Record, newest

INK, OTHER, FAINT = "#1f4e79", "#b3541e", "#bbbbbb"


def draw(records: list[Record], folder: Path) -> list[Path]:
    """Writes the pictures and returns their paths; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(exist_ok=True)
    written = []
    for device in dict.fromkeys(record.device for record in records):
        own = [record for record in records if record.device == device]
        for name, figure in (("ratios", ratios(own, device)), ("trend", trend(own, device))):
            if figure is not None:
                path = folder / f"{device}_{name}.png"
                figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
                written.append(path)
    return written


def ratios(records: list[Record], device: str):
    """Every rival's time over beit_fast's, with its 95 % interval, on a logarithmic axis."""
    from matplotlib.figure import Figure

    entries = []
    for record in newest(records):
        for group, rows in record.groups().items():
            beside = [row for row in rows if row.ratio is not None and not row.rival.startswith("beit_fast")]
            entries += [(group, row) for row in beside]
    if not entries:
        return None
    height = 0.9 + 0.24 * (len(entries) + len({group for group, _ in entries}))
    figure = Figure(figsize=(9, height))
    axis = figure.add_subplot()
    y, labels, last = 0.0, [], None
    for group, row in entries:
        if group != last:
            y += 1
            axis.text(0.0, y, f" {group}", transform=axis.get_yaxis_transform(), fontsize=7, va="center", weight="bold")
            last = group
        y += 1
        assert row.ratio is not None
        middle, low, high = row.ratio
        colour = INK if middle >= 0.97 else OTHER
        axis.plot([low, high], [y, y], color=colour, lw=1.5)
        axis.plot([middle], [y], "o", color=colour, ms=4)
        labels.append((y, row.rival))
    axis.axvline(1, color=FAINT, lw=1)
    axis.set_yticks([y for y, _ in labels], [label for _, label in labels], fontsize=7)
    axis.set_ylim(y + 1, 0)
    axis.set_xscale("log")
    lowest, highest = min(row.ratio[1] for _, row in entries), max(row.ratio[2] for _, row in entries)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if lowest / 1.3 <= t <= highest * 1.3]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    axis.minorticks_off()
    axis.set_xlabel("time of the rival / time of beit_fast, median and 95 % interval (right of 1: beit_fast is faster)")
    axis.set_title(f"{device}, {max(record.date for record in records)}", fontsize=9)
    return figure


def trend(records: list[Record], device: str):
    """beit_fast's images per second in every record that has them."""
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[str, float]]] = {}
    for record in records:
        for row in record.rows:
            if row.rival == "beit_fast" and "images_per_s" in row.info:
                series.setdefault(row.group, []).append((record.date, row.info["images_per_s"]))
    if not series:
        return None
    dates = sorted({date for points in series.values() for date, _ in points})
    figure = Figure(figsize=(9, 3.5 + 0.16 * len(series)))
    axis = figure.add_subplot()
    for group, points in series.items():
        axis.plot([dates.index(date) for date, _ in points], [value for _, value in points], "o-", ms=4, label=group)
    axis.set_xticks(range(len(dates)), dates, fontsize=7)
    axis.set_yscale("log")
    axis.set_ylabel("images/s")
    axis.set_title(f"beit_fast over the records of {device}", fontsize=9)
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    return figure
