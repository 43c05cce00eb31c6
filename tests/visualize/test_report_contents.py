"""What a report says of a run, value by value: what is drawn is recorded instead of drawn."""

import json
import re
import struct

import pytest

from beit_fast.visualize import run_report
from beit_fast.visualize.charts import Series
from beit_fast.visualize.run_report import Run, read_run, write_comparison, write_report

DEEP = "[" * 100_000


def run_of(folder, *lines, config=None, **files):
    """A run folder of these lines of metrics."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"task": "pretrain", "config": config}))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """(title, series that have a point, how) of each chart of the pages."""
    found = []

    def chart(title, series, x_label="optimizer step", **how):
        if lines := [each for each in series if each.x]:
            found.append((title, lines, {"x": x_label, **how}))
        return f"<figure>{title}</figure>" if lines else ""

    monkeypatch.setattr(run_report, "line_chart", chart)
    return found


def test_lines_that_are_none_are_passed_over(tmp_path):
    folder = run_of(tmp_path / "run", [1], {"loss": 1.0}, {"step": True}, {"step": "3"}, {"step": 4, "loss": 2.0}, 5)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n" + DEEP.encode() + b'\n{"step": 6, "loss": 1.5}\n{"step": 7, "lo')
    assert [line["step"] for line in read_run(folder).metrics] == [4, 6]
    with pytest.raises(ValueError, match=r"is not a run folder: it holds no metrics\.jsonl"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]", "3", DEEP])
def test_files_that_are_none_are_empty(tmp_path, text):
    """Each beside the others, which are read."""
    files = {"config": '{"config": {"a": {"b": 1}}, "task": "t"}', "environment": '{"starts": [{"step": 0}, 3]}',
             "data": '{"images": {"read": 7}}'}  # fmt: skip
    expected = {"config": {"a.b": 1}, "starts": [{"step": 0}], "data": {"images.read": 7}, "task": "t"}
    without = {"config": {"config": {}, "task": "run"}, "environment": {"starts": []}, "data": {"data": {}}}
    for name in files:
        folder = run_of(tmp_path / name)
        for other, content in (files | {name: text}).items():
            if content is not None:
                (folder / f"{other}.json").write_text(content)
        found = read_run(folder)._asdict()
        assert {field: found[field] for field in expected} == expected | without[name]
    for starts in (3, {"a": 1}):
        assert read_run(run_of(tmp_path / f"starts {starts}", environment={"starts": starts})).starts == []
    assert read_run(run_of(tmp_path / "odd", config=[1])).config == {}


LINES = [
    {"step": 0, "kind": "evaluation", "knn_top1_percent": 30.0, "token_entropy_nats": 0.0, "loss": 7.0},
    {"step": 10, "kind": "train", "loss": 6, "odd": True, "words": "x", "none": None},
    {"step": 20, "kind": "train", "loss": float("nan"), "knn_top1_percent": 40.0, "token_entropy_nats": 1.0},
    {"step": 30, "kind": "train", "loss": float("inf"), "probe_top1_percent": 3.0, "none": None},
    {"step": 25, "kind": "evaluation", "loss": 5.5, "knn_top1_percent": 50.0},
]  # fmt: skip


def test_metrics_over_steps():
    run = Run("folder", "t", {}, [], LINES, {})
    assert run.series("loss") == Series("loss", [0, 10, 25], [7.0, 6, 5.5], False)
    assert run.series("token_entropy_nats", "a") == Series("a", [0, 20], [0.0, 1.0], True)
    for name in ("odd", "words", "none", "lost"):
        assert run.series(name) == Series(name, [], [], False)
    start = Series("knn top1 percent, starting weights", [0, 30], [30.0, 30.0], True)
    assert run.start_of("knn_top1_percent") == start
    for name in ("loss", "probe_top1_percent", "lost"):  # no such metric, not measured before the first step, neither
        assert run.start_of(name) == Series(f"{name.replace('_', ' ')}, starting weights", [], [], True)
    none = Run("folder", "t", {}, [], LINES[1:2], {})
    assert not none.start_of("knn_top1_percent").x
    last = {"step": 25, "knn_top1_percent": 50.0, "token_entropy_nats": 1.0, "loss": 5.5, "odd": True, "words": "x",
            "probe_top1_percent": 3.0}  # fmt: skip
    assert run.last == last


START = {"device": "a", "world_size": 2, "time": "noon"}


@pytest.mark.parametrize(
    ("steps", "config", "starts", "text"),
    [
        ([], {}, 0, "pretrain, step 0"), ([1200, 900], {"steps": 2000}, 0, "pretrain, step 1,200 of 2,000"),
        ([5], {"max_steps": 3000}, 1, "pretrain, step 5 of 3,000; d0 x 2, started noon"),
        ([5], {"steps": None}, 2, "pretrain, step 5; d1 x 2, started noon, 2 starts"),
        ([5], {"steps": 7, "max_steps": 6}, 3, "pretrain, step 5 of 7; d2 x 2, started noon, 3 starts"),
    ],
)  # fmt: skip
def test_the_line_below_the_name(tmp_path, steps, config, starts, text):
    environment = {"starts": [START | {"device": f"d{number}"} for number in range(starts)]}
    folder = run_of(tmp_path / "run", *({"step": n} for n in steps), config=config, environment=environment)
    assert f"<h1>run</h1><p>{text}</p>" in write_report(folder).read_text()


FROM_ZERO = [
    "accuracy, share of masked patches", "learning rate", "gradient norm before clipping", "images per second",
    "share of the time spent waiting for data", "skipped steps (gradient not finite), per interval",
    "bad images so far", "peak memory, MiB", "loss scale", "mean absolute error of pixels",
]  # fmt: skip
OTHERS = [
    "loss", "top-1 and top-5, %", "k-NN and linear probe on labelled images, top-1, %",
    "mean IoU, mean and pixel accuracy, %",
]  # fmt: skip


def test_which_axes_begin_at_zero(tmp_path, drawn):
    """Those of quantities whose ratios count."""
    metrics = {metric: 1.0 for chart in run_report.CHARTS for metric in chart.metrics}
    write_report(run_of(tmp_path / "run", {"step": 0, **metrics}, {"step": 9, **metrics}))
    axes = {title: how["from_zero"] for title, _, how in drawn if "perplexity" not in title}
    assert axes == dict.fromkeys(FROM_ZERO, True) | dict.fromkeys(OTHERS, False)
    (own,) = (lines for title, lines, _ in drawn if title.startswith("k-NN"))
    assert [(line.name, line.dashed) for line in own] == [
        ("knn top1 percent", False), ("knn top1 percent, starting weights", True), ("probe top1 percent", False),
        ("probe top1 percent, starting weights", True),
    ]  # fmt: skip


def test_the_visual_tokens(tmp_path, drawn):
    first = {"step": 0, "token_entropy_nats": 0.0, "held_out_perplexity_b": 3.0}
    second = {"step": 10, "token_entropy_nats": 2.0, "held_out_perplexity": 5.0, "held_out_perplexity_a": 4.0}
    folder = run_of(tmp_path / "run", first, second)
    page = write_report(folder).read_text()
    title = "perplexity of the visual tokens on held-out images"
    ((_, series, how),) = (chart for chart in drawn if chart[0] == title)
    assert how == {"x": "optimizer step", "from_zero": True}
    assert series[0].x == [0, 10]
    assert series[0].y == pytest.approx([1.0, 7.389056])
    assert [(each.name, each.x) for each in series[1:]] == [
        ("held out perplexity", [10]), ("held out perplexity a", [10]), ("held out perplexity b", [0])
    ]  # fmt: skip
    assert "<h2>Visual tokens</h2>" in page
    drawn.clear()
    (folder / "pictures").mkdir()
    histogram = {"images": 1600, "vocab_size": 8192, "counts": [9, 4, 1]}
    (folder / "pictures" / "token_histogram.json").write_text(json.dumps(histogram))
    write_report(folder)
    title, (ranks,), how = drawn[-1]
    assert title == "3 of 8,192 tokens occur in 1,600 held-out images"
    assert (ranks.x, ranks.y) == ([1, 2, 3], [9, 4, 1])
    assert how == {"x": "rank of the token", "log_x": True, "log_y": True}


def png(path, width):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", width, 256) + b"\xff")


@pytest.mark.parametrize(
    ("count", "spread"),
    [(0, []), (1, [0]), (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4]), (10, [0, 3, 6, 9]), (12, [0, 4, 7, 11])],
)
def test_the_newest_picture_and_some_before_it(tmp_path, count, spread):
    folder = run_of(tmp_path / "run")
    for step in range(count + 1):
        png(folder / "pictures" / f"the_kind_step_{step * 1000:08d}.png", 60)
    page = write_report(folder).read_text()
    section = page[page.index("<h2>Pictures</h2>") :]
    captions = [f"step {step * 1000:,}" for step in (count, *spread)]
    assert re.findall("<figcaption>(.*?)</figcaption>", section) == captions
    assert ("<summary>earlier in the run</summary>" in section) == (count > 0)
    assert "<h3>the kind</h3>" in section


@pytest.mark.parametrize(
    ("width", "least"), [(60, 30), (61, 30), (1399, 699), (1400, 700), (3000, 700), (0x01020304, 700)]
)
def test_a_picture_is_no_wider_than_it_is(tmp_path, width, least):
    folder = run_of(tmp_path / "run")
    png(folder / "confusion.png", width)
    page = write_report(folder).read_text()
    assert (
        f'alt="confusion" style="max-width: {width}px; min-width: {least}px" src="data:image/png;base64,iVBOR' in page
    )
    assert "<figcaption>confusion.png</figcaption>" in page


def test_values_and_starts(tmp_path, drawn):
    """By kind of value; what is not there has no section."""
    config = {"a": 0.123456789, "b": ["x", "y z"], "c": [1, 2], "d": None, "e": "text", "f": True, "g": {},
              "h": 12345678, "i": ["x", 1]}  # fmt: skip
    starts = [{"step": 1200, "time": "noon"}, {"time": "later"}]
    page = write_report(run_of(tmp_path / "run", config=config, environment={"starts": starts})).read_text()
    expected = {"a": "0.123457", "b": "x y z", "c": "[1, 2]", "d": "null", "e": "text", "f": "True", "h": "12345678",
                "i": "[&quot;x&quot;, 1]"}  # fmt: skip
    rows = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in expected.items())
    table = f'<div class="wide"><table><tr><th>field</th><th>value</th></tr>{rows}</table></div>'
    assert f"<details><summary>8 fields</summary>{table}</details>" in page
    assert "<summary>start at step 1,200, noon</summary>" in page
    assert "<summary>start at step 0, later</summary>" in page
    assert [part.split("</h2>")[0] for part in page.split("<h2>")[1:]] == ["Configuration", "Environment"]


def comparison(tmp_path, *folders):
    page = write_comparison(folders, tmp_path / "not" / "there" / "page.html").read_text()
    return page, page[page.index("<p>") + 3 : page.index("</p>")].split(", ")


def test_a_comparison_by_its_values(tmp_path, drawn):
    first, second = {"seed": 0, "same": 1, "own": 2, "number": 1}, {"seed": 5, "same": 1, "number": True}
    lines = [{"step": 1, "loss": 2.0, "token_entropy_nats": 3.0, "lr": 0.1, "accuracy": 0.5, "held_out_accuracy": 0.4}]
    folders = [
        run_of(tmp_path / "a", *lines, config=first),
        run_of(tmp_path / "b", {"step": 2, "loss": 1.0}, config=second),
    ]
    for _ in range(2):  # over the page of before
        drawn.clear()
        page, names = comparison(tmp_path, *folders)
    assert names == ["a", "b"]
    assert "<h1>2 runs</h1>" in page
    assert {title: [each.name for each in series] for title, series, _ in drawn} == {
        "loss": ["a", "b"], "token entropy nats": ["a"], "accuracy": ["a"], "held out accuracy": ["a"],
        "learning rate": ["a"],
    }  # fmt: skip
    assert not any(each.dashed for _, series, _ in drawn for each in series)
    assert [how["from_zero"] for _, _, how in drawn] == [False, False, True, True, True]
    differing = page[page.index("<h2>Where the configurations differ</h2>") :]
    rows = [row.split("</td>")[0] for row in differing.split("<tr><td>")[1:]]
    assert rows == ["seed", "own", "number"]
    assert "<td>own</td><td>2</td><td></td>" in differing
    page, _ = comparison(tmp_path, folders[0], folders[0], folders[1])
    assert "<td>seed</td><td>0</td><td>0</td><td>5</td>" in page


def test_runs_are_told_apart_by_the_folders_above_them(tmp_path):
    a, b, c = (run_of(tmp_path / name) for name in ("x/one/run", "y/one/run", "other"))
    assert comparison(tmp_path, a, c)[1] == ["run", "other"]
    assert comparison(tmp_path, a, b)[1] == ["x/one/run", "y/one/run"]
    _, (first, second) = comparison(tmp_path, a, a)  # nothing tells them apart
    assert first == second
    assert first.endswith(str(a))
