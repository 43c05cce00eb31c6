"""Records to tables: what is shown, what is refused, and what counts as a regression."""

import json
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import faults, machine, plots, record, remarks, report
from benchmarks.records import newest, read, read_all


def entry(group, name, median, ratio=None, **info):
    if ratio is not None:
        info["over_beit_fast"] = dict(zip(("median", "low", "high"), ratio, strict=True)) | {"pairs": 15}
    stats = {"median": median, "q1": median * 0.9, "q3": median * 1.1, "rounds": 15}
    return {"group": group, "stats": stats, "extra_info": {"rival": name, **info}}


ENVIRONMENT = {
    "command": "pytest benchmarks/ --benchmark-only",
    "commit": "abc123",
    "threads": 2,
    "load_average": [0.5, 0.5, 0.5],
    "versions": {"torch": "2.13.0"},
}


def write(folder, date, entries, subject="step", **environment):
    path = folder / f"{date}_box_{subject}.json"
    path.write_text(json.dumps({"benchmarks": entries, "beit_fast": ENVIRONMENT | environment}))
    return path


def step(theirs, ratio, **info):
    group = "pre-training, forward and backward: toy"
    ours = entry(group, "beit_fast", 0.5, (1, 1, 1), images_per_s=4.0)
    return [ours, entry(group, "transformers, SDPA", theirs, ratio, **info)]


def test_a_table_shows_median_spread_rounds_command_and_commit(tmp_path):
    write(tmp_path, "2026-11-21", step(0.75, (1.5, 1.4, 1.6)))
    text = report.headline_tables(read_all(tmp_path), tmp_path / "README.md")
    assert "| pre-training, forward and backward: toy | beit_fast | 500 ms (450 ms to 550 ms) | 15 | 1 |" in text
    assert "|  | transformers, SDPA | 750 ms (675 ms to 825 ms) | 15 | 1.50 [1.40, 1.60] |" in text
    assert "`pytest benchmarks/ --benchmark-only`; commit `abc123`" in text
    assert "No record of a GPU exists" in text


def test_rows_of_a_gpu_show_images_per_second_and_the_shares_of_both_peaks(tmp_path):
    info = {"images_per_s": 1654.9, "mfu": 0.314, "share_of_matmul": 0.436}
    write(tmp_path, "2026-11-21", [entry("optimizer", "beit_fast", 0.5, (1, 1, 1), **info)], cuda="13.0")
    text = report.headline_tables(read_all(tmp_path), tmp_path / "README.md")
    rates = "1,655 images/s, 31% of the data sheet's peak, 44% of the measured product's rate"
    assert f"| optimizer | beit_fast | 500 ms (450 ms to 550 ms); {rates} | 15 | 1 |" in text


def test_the_newest_measurement_of_a_comparison_speaks(tmp_path):
    other = [entry("optimizer", "beit_fast", 0.5, (1, 1, 1))]
    write(tmp_path, "2026-11-21", step(0.75, (1.5, 1.4, 1.6)))
    write(tmp_path, "2026-11-22", step(0.9, (1.8, 1.7, 1.9)))
    write(tmp_path, "2026-11-20", step(0.9, (1.8, 1.7, 1.9)) + other, subject="older")
    (tmp_path / "2026-11-20_box_training.json").write_text('{"loss": 1}')  # not of this kind
    older, newer = newest(read_all(tmp_path))
    assert (older.date, {row.group for row in older.rows}) == ("2026-11-20", {"optimizer"})
    assert (newer.date, len(newer.rows)) == ("2026-11-22", 2)


def test_a_misnamed_record_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match=r"results\.json is not named"):
        read(path)


def test_a_slower_row_is_shown_with_its_reason_and_refused_without(tmp_path, monkeypatch):
    write(tmp_path, "2026-11-21", step(0.4, (0.8, 0.75, 0.85)))
    (problem,) = report.unexplained(read_all(tmp_path))
    assert "slower than transformers, SDPA (0.80 [0.75, 0.85])" in problem
    monkeypatch.setitem(remarks.WHY, ("^pre-training", "transformers"), "it does less")
    assert not report.unexplained(read_all(tmp_path))
    text = report.headline_tables(read_all(tmp_path), tmp_path / "README.md")
    assert "transformers, SDPA (1)" in text
    assert "(1) it does less." in text


def test_a_remark_stands_beside_its_number_and_must_have_one(tmp_path, monkeypatch):
    path = write(tmp_path, "2026-11-21", step(0.75, (1.5, 1.4, 1.6)))
    monkeypatch.setitem(remarks.REMARKS, (path.name, "^pre-training", "transformers"), "it did more")
    records = read_all(tmp_path)
    text = report.headline_tables(records, tmp_path / "README.md")
    assert "transformers, SDPA (1) | 750 ms" in text
    assert "(1) it did more." in text
    assert not remarks.unused(records)
    monkeypatch.setitem(remarks.REMARKS, (path.name, "^pre-training", "timm"), "it was not measured")
    assert "timm, which no record holds" in remarks.unused(records)[0]


def test_bars_show_the_numbers_of_the_record_and_leave_out_what_it_lacks(tmp_path):
    group = "pre-training, whole step with DALL-E's tokenizer: BEiT-base plus, 224 px, B=256, bfloat16"
    rows = [entry(group, "beit_fast", 0.15, (1, 1, 1), images_per_s=1700.0),
            entry(group, "official style", 0.30, (2, 1.9, 2.1), images_per_s=850.0)]  # fmt: skip
    write(tmp_path, "2026-11-26", rows, cuda="13.0", device="NVIDIA H100")
    text = plots.headline(read_all(tmp_path))
    assert "150 ms, 1,700 images/s<" in text
    assert "300 ms, 850 images/s, 2.00 times as long" in text
    assert "BEiT-L" not in text
    assert "Backbone" not in text
    ElementTree.fromstring(text)


def test_a_variant_of_our_own_needs_no_reason(tmp_path):
    rows = [entry("g", "beit_fast", 1.0, (1, 1, 1)), entry("g", "beit_fast, fast path", 0.5, (0.5, 0.4, 0.6))]
    write(tmp_path, "2026-11-21", rows)
    assert not report.unexplained(read_all(tmp_path))


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ((1.2, 1.1, 1.3), True),  # below the old interval, and by 20 %
        ((1.38, 1.2, 1.5), False),  # the intervals meet
        ((1.47, 1.46, 1.475), False),  # below it, but by 2 %
        ((2.0, 1.9, 2.1), False),
    ],
)
def test_a_regression_is_a_loss_beyond_the_noise_of_both(tmp_path, now, found):
    write(tmp_path, "2026-11-21", step(0.75, (1.5, 1.48, 1.6)))
    write(tmp_path, "2026-11-22", step(0.60, now))
    problems = report.regressions(read_all(tmp_path))
    assert bool(problems) == found
    if found:
        assert "1.20 [1.10, 1.30] on 2026-11-22, 1.50 [1.48, 1.60] on 2026-11-21" in problems[0]


def test_an_accepted_regression_is_silent(tmp_path, monkeypatch):
    write(tmp_path, "2026-11-21", step(0.75, (1.5, 1.48, 1.6)))
    write(tmp_path, "2026-11-22", step(0.60, (1.2, 1.1, 1.3)))
    key = ("box", "pre-training, forward and backward: toy", "transformers, SDPA")
    monkeypatch.setitem(remarks.ACCEPTED, key, "the old one skipped work")
    assert not report.regressions(read_all(tmp_path))


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Pages with markers in place of the real ones."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "docs").mkdir()
    for name in ("docs/performance.md", "benchmarks/README.md"):
        (tmp_path / name).write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    (tmp_path / "docs/reliability.md").write_text(f"{report.faults.BEGIN}\nold\n{report.faults.END}\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    records = tmp_path / "records"
    records.mkdir()
    write(records, "2026-11-21", step(0.75, (1.5, 1.4, 1.6)))
    return tmp_path


def test_faults_show_the_newest_record_of_each_test_and_what_it_cost(tmp_path):
    environment = {"commit": "c0ffee", "versions": {"torch": "2.13.0"}}
    row = {"what": "kill | head", "trials": 2, "passed": 2, "target": "all", "note": "", "seconds": 1.0}
    cost = {"steps_lost": 3, "seconds_to_the_end": 1.5, "artefacts_missing": 0}
    costly = row | {"test": "R15"} | cost
    days = {
        "2026-11-25": [row | {"test": "R2"}, row | {"test": "R15"}],
        "2026-11-26": faults.merged([costly, costly | {"steps_lost": 5}]),
    }
    for day, rows in days.items():
        record = {"environment": environment, "seconds": 60, "faults": rows}
        (tmp_path / f"{day}_box_faults.json").write_text(json.dumps(record))
    lines = faults.section(tmp_path, tmp_path / "page.md").splitlines()
    assert lines[2:4] == [
        r"| R2 | kill \| head | 2 of 2 | all |  |",
        r"| R15 | kill \| head | 4 of 4 | all | at most 5 steps lost, 1.5 s to the end, 0 artefacts missing |",
    ]
    assert [line.split(",")[0] for line in lines[5::2]] == ["R2: 2026-11-25", "R15: 2026-11-26"]


def test_check_fails_until_the_tables_are_written(pages, capsys):
    folder = ["--records", str(pages / "records")]
    assert report.main(["--check", *folder]) == 1
    printed = capsys.readouterr().err
    for name in ("docs/performance.md", "benchmarks/README.md", "docs/reliability.md"):
        assert f"{name} does not match the records" in printed
    assert report.main(folder) == 0
    assert (pages / "docs/performance.md").read_text().startswith("before\n")
    assert (pages / "docs/performance.md").read_text().endswith("after\n")
    assert report.main(["--check", *folder]) == 0
    assert {path.name for path in (pages / "pictures").iterdir()} == {"box_ratios.png"}
    (pages / "docs/performance.md").write_text("no markers")
    assert report.main(["--check", *folder]) == 1
    assert "performance.md needs one pair of markers" in capsys.readouterr().err


def test_the_real_tables_match_the_real_records(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_times_have_three_digits():
    assert [report.write_time(t) for t in (12.345, 1.2345, 0.123, 0.0123, 1.23e-5, 1e-7)] == [
        "12.3 s", "1.23 s", "123 ms", "12.3 ms", "12.3 µs", "0.10 µs",
    ]  # fmt: skip


def test_a_record_is_never_written_over(tmp_path, monkeypatch):
    device = torch.device("cpu")
    path = record.record_path("mim_step", device, tmp_path)
    assert path.stem.split("_", 2)[1:] == [machine.device_slug(device), "mim_step"]
    path.write_text("{}")
    with pytest.raises(ValueError, match="exists, and records are not changed"):
        record.record_path("mim_step", device, tmp_path)
    with pytest.raises(ValueError, match="subject"):
        record.record_path("../mim", device, tmp_path)


def test_the_waterfall_is_drawn_as_gains(tmp_path):
    gain = {"median": 1.2, "low": 1.1, "high": 1.3, "pairs": 15}
    rows = [entry("waterfall: toy", "official style", 1.0), entry("waterfall: toy", "+ patches", 0.8, gain=gain)]
    write(tmp_path, "2026-11-21", rows)
    text = report.all_tables(read_all(tmp_path), tmp_path / "README.md")
    assert "| + patches | 800 ms (720 ms to 880 ms) | 15 | 1.20 [1.10, 1.30] times as fast as the row above |" in text
    assert not plots.draw(read_all(tmp_path), tmp_path / "pictures")  # neither ratios nor images per second
