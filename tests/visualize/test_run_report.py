"""The run report: it holds what the run measured, it stands alone, and its pictures can be seen."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.labelled import open_training
from beit_fast.train.checkpoint.run_folder import RunFolder
from beit_fast.visualize import charts
from beit_fast.visualize.charts import Series, line_chart
from beit_fast.visualize.run_report import CHARTS, read_run, write_comparison, write_report


def make_run(folder, loss=6.0, **config):
    """A run folder as training leaves it, a line cut short by a kill included."""
    (folder / "pictures").mkdir(parents=True)
    saved = {"task": "pretrain", "config": {"steps": 100, "model": {"width": 128}, **config}}
    (folder / "config.json").write_text(json.dumps(saved))
    start = {"step": 0, "time": "2026-01-02T03:04:05", "device": "a <device>", "world_size": 1, "command": ["x", "-y"]}
    (folder / "environment.json").write_text(json.dumps({"starts": [start]}))
    lines = [
        {"kind": "train", "step": step, "loss": loss - step / 100, "accuracy": step / 1000, "lr": 1e-3,
         "grad_norm": 1.5, "images_per_s": 90.0 + step, "data_wait_share": 0.02, "skipped_steps": 0, "bad_images": 1.0,
         "peak_memory_mib": 812.5}
        for step in range(10, 101, 10)
    ]  # fmt: skip
    lines[3]["loss"] = None
    lines.append({"kind": "evaluation", "step": 100, "held_out_loss": 5.1, "token_entropy_nats": 5.5})
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text + '\n{"kind": "train", "st')
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    for step in (50, 100):
        Image.fromarray(pixels).save(folder / "pictures" / f"reconstructions_step_{step:08d}.png")
    Image.fromarray(pixels).save(folder / "confusion.png")
    histogram = {"images": 600, "vocab_size": 8192, "counts": [50, 20, 7, 1]}
    (folder / "pictures" / "token_histogram.json").write_text(json.dumps(histogram))
    return folder


def assert_stands_alone(page):
    assert not re.findall(r"""(?:src|href|srcset|action)=["'](?!data:|#)""", page)
    assert not re.findall(r"url\(|@import|https?://|<script|<link", page)


def pictures_of(page):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def charts_of(page):
    """Title to points of each line, in pixels of the chart."""
    found = {}
    for svg in re.findall(r"<svg.*?</svg>", page):
        root = ET.fromstring(svg)
        lines = [[tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
                 for line in root.iter("polyline")]  # fmt: skip
        found[root.attrib["aria-label"]] = lines
    return found


def test_a_report_stands_alone_and_shows_everything(tmp_path):
    page = write_report(make_run(tmp_path / "run <1>")).read_text()
    assert_stands_alone(page)
    pictures = pictures_of(page)
    assert len(pictures) == 3
    assert all(picture.std() > 10 for picture in pictures)
    drawn = charts_of(page)
    assert set(drawn) >= {
        "loss", "accuracy, share of masked patches", "learning rate", "gradient norm before clipping",
        "images per second", "share of the time spent waiting for data",
        "skipped steps (gradient not finite), per interval", "bad images so far", "peak memory, MiB",
        "perplexity of the visual tokens on held-out images", "4 of 8,192 tokens occur in 600 held-out images",
    }  # fmt: skip
    assert len(drawn["loss"]) == 3
    assert len(drawn["loss"][0]) == 9 + 1  # one loss is missing; the last point stands twice
    heights = [y for _, y in drawn["loss"][0]]
    assert heights == sorted(heights)  # a falling loss goes down the page
    assert all(
        0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for each in drawn.values() for l in each for x, y in l
    )
    assert "run &lt;1&gt;" in page
    assert "a &lt;device&gt;" in page
    assert "model.width" in page
    assert "prefers-color-scheme: dark" in page


def test_a_report_of_little(tmp_path):
    """A run that was killed before its first interval, and no run at all."""
    (tmp_path / "metrics.jsonl").write_text("")
    assert_stands_alone(write_report(tmp_path).read_text())
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report(tmp_path / "elsewhere")


def test_a_report_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that fills up half-way leaves the report of before."""
    run = make_run(tmp_path / "run")
    before = write_report(run).read_text()

    def half(path, text, **options):
        with path.open("w", **options) as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_report(run)
    assert (run / "report.html").read_text() == before


def test_a_comparison_lays_runs_over_each_other(tmp_path):
    folders = [make_run(tmp_path / name / "pretrain", loss, seed=seed) for name, loss, seed in
               (("a", 6.0, 0), ("b", 7.0, 1))]  # fmt: skip
    page = write_comparison(folders, tmp_path / "out" / "page.html").read_text()
    assert_stands_alone(page)
    assert "a/pretrain" in page
    assert "b/pretrain" in page
    first, second = charts_of(page)["loss"]
    assert all(y1 > y2 for (_, y1), (_, y2) in zip(first, second, strict=True))  # the larger loss is higher up
    differing = page[page.index("Where the configurations differ") :]
    assert "<td>seed</td><td>0</td><td>1</td>" in differing
    assert "model.width" not in differing


def test_a_cut_line_is_passed_over(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert len(run.metrics) == 11
    assert run.series("held_out_loss").y == [5.1]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-3, 2e-3, 1e-3], [-5.0, 1e6], [3.0], [1e-9, 1.0, float("nan")]])
def test_charts_of_all_kinds_of_values(values, log):
    chart = line_chart("a <b>", [Series("s", list(range(1, len(values) + 1)), values)], log_y=log, log_x=log)
    finite = [v for v in values if np.isfinite(v) and (v > 0 or not log)]
    if not finite:
        assert chart == ""
        return
    (points,) = charts_of(chart)["a <b>"]
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in points)
    order = np.argsort(finite, kind="stable")
    assert (np.diff([points[i][1] for i in order]) <= 0).all()
    ticks = len(ET.fromstring(re.search(r"<svg.*?</svg>", chart).group()).findall("line"))
    assert 2 <= ticks <= 20


def test_no_chart_of_nothing():
    assert line_chart("x", [Series("s", [], []), Series("t", [1], [None])]) == ""


def test_values_are_shown_under_the_mouse(tmp_path):
    """Every point of a short line, with its own value, where it is drawn."""
    losses, held_out = [5.5, 4.25, 4.125], [6.0]
    chart = line_chart("loss", [Series("loss", [10, 20, 30], losses), Series("held <out>", [20], held_out)])
    root = ET.fromstring(re.search(r"<svg.*?</svg>", chart).group())
    line = [tuple(map(float, point.split(","))) for point in next(root.iter("polyline")).attrib["points"].split()]
    columns = root.findall("g[@class='at']")
    words = [[text.text for text in column.iter("text")] for column in columns]
    assert words == [
        ["optimizer step 10", "loss: 5.5"],
        ["optimizer step 20", "loss: 4.25", "held <out>: 6"],
        ["optimizer step 30", "loss: 4.125"],
    ]
    for column, (x, y) in zip(columns, line, strict=False):
        hit = column.find("rect").attrib
        assert float(hit["x"]) <= x <= float(hit["x"]) + float(hit["width"]) + 0.1
        dot = column.find("g/circle").attrib
        assert (float(dot["cx"]), float(dot["cy"])) == (x, y)
    edges = [float(column.find("rect").attrib["x"]) for column in columns]
    assert edges == sorted(edges)


def test_a_long_line_has_few_columns_and_keeps_its_last_value():
    steps = list(range(10_000))
    chart = line_chart("x", [Series("long", steps, [float(s) for s in steps]), Series("rare", [7], [1.0])])
    assert chart.count('class="at"') <= 62
    assert "long: 9,999" in chart
    assert "rare: 1" in chart
    assert len(chart) < 60_000


def test_axes_do_not_dramatise():
    """A change of 0.3 % is nearly flat, and where ratios count the axis begins at zero."""
    plot = charts._BOTTOM - charts._TOP

    def heights(values, **options):
        (points,) = charts_of(line_chart("m", [Series("m", list(range(len(values))), values)], **options))["m"]
        return [y for _, y in points[: len(values)]]

    first, second = heights([663.0, 665.0])
    assert 0 < first - second < 0.1 * plot
    assert charts._TOP < second < first < charts._BOTTOM
    low, high = heights([200.0, 400.0], from_zero=True)
    assert (charts._BOTTOM - high) / (charts._BOTTOM - low) == pytest.approx(2, rel=0.01)
    memory = next(chart for chart in CHARTS if chart.metrics == ("peak_memory_mib",))
    assert memory.from_zero


def test_the_data_of_a_run_is_shown(tmp_path):
    run = make_run(tmp_path / "run")
    assert "<h2>Data</h2>" not in write_report(run).read_text()
    (run / "data.json").write_text(json.dumps({"images": {"read": 1200, "bad": 3}, "path": "/some/<where>"}))
    page = write_report(run).read_text()
    section = page[page.index("<h2>Data</h2>") : page.index("<h2>Configuration</h2>")]
    rows = {"images.read": "1200", "images.bad": "3", "path": "/some/&lt;where&gt;"}
    assert all(f"<td>{name}</td><td>{value}</td>" in section for name, value in rows.items())


def test_what_a_run_found_is_shown_with_what_it_left_out(tmp_path):
    """From the folder on disk through data.json to the page."""
    data = tmp_path / "ds"
    for name in ("cat/1.jpg", "cat/2.heic", "dog/1.heic"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(b"")
    run = make_run(tmp_path / "run")
    RunFolder(run).record_data({"training": open_training(data).source.contents})
    page = write_report(run).read_text()
    section = page[page.index("<h2>Data</h2>") : page.index("<h2>Configuration</h2>")]
    for words in (str(data), "suffix .heic", "cat/2.heic", "classes_without_an_image", "dog"):
        assert words in section, words
