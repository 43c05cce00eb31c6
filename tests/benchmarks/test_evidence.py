"""The evidence study: rows differ in what they say, the test set is never trained on, the table says what holds."""

import dataclasses
import json
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence import ablation, beitv2, continued, protocol
from benchmarks.evidence.ablation import Ablation, Job, choose, jobs, nearest_neighbours
from benchmarks.evidence.protocol import BASE, ROWS, TIERS, TUNING_SEED, Protocol
from benchmarks.evidence.record import Difference, Record, difference, report, t_quantile

TINY = Protocol(
    seeds=2, unlabelled_images=48, pretrain_steps=16, held_out=8, labelled_images=256, probe_images=256,
    tuning_images=48, test_images=64, finetune_steps=6, probe_epochs=1, device="cpu", precision="fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny(cache, tmp_path):
    return dataclasses.replace(TINY, cache_dir=cache, output=tmp_path / "out")


def test_rows_differ_from_the_first_in_what_they_say(tiny):
    configs = {name: protocol.pretraining(tiny, name, 1) for name, row in ROWS.items() if row.length}
    for name, config in configs.items():
        named = {key.partition(".")[0] for key in ROWS[name].changes}
        extra = {"steps", "optim"} if ROWS[name].length != 1 else set()
        extra |= {"data"} if name == "pixels" else set()  # it keeps no tokens
        fields = [field.name for field in dataclasses.fields(config)]
        differing = {field for field in fields if getattr(config, field) != getattr(configs[BASE], field)}
        assert differing - {"output_dir"} == named | extra
    assert configs["shorter"].steps == round(tiny.pretrain_steps * 3 / 8)
    fine = {name: protocol.finetuning(tiny, name, "scenes", 0, 1e-3) for name in ROWS}
    for name in ("pixels", "scratch", "random_mask", "recover_all", "shorter"):
        assert (fine[name].model, fine[name].data, fine[name].augment) == (
            fine[BASE].model, fine[BASE].data, fine[BASE].augment,
        )  # fmt: skip
    assert fine["no_bias"].model.preset == "plain"
    assert fine["layer_scale"].model.layer_scale_init == 0.1
    assert [name for name in ROWS if fine[name].scratch] == ["scratch", "scratch_long"]


def test_every_row_is_in_a_tier_and_seeds_come_in_order():
    assert sorted(name for tier in TIERS for name in tier) == sorted(ROWS)
    order = list(jobs(Protocol(tiers=3)))
    assert len(set(order)) == len(order)
    seed0 = [job for job in order if job.seed == 0 and job.row in TIERS[0]]
    assert order[: len(seed0)] == seed0
    for job in order:  # nothing is measured before its weights, and those its rate is chosen on, are there
        if job.kind != "pretrain" and ROWS[job.row].length:
            before = order[: order.index(job)]
            assert Job("pretrain", job.row, job.seed) in before
            assert Job("pretrain", job.row, 0) in before


def test_no_image_of_tuning_or_training_is_in_the_test_set(tiny):
    for labels in ("scenes", "hues"):
        tested = protocol.hashes(protocol.evaluation_folder(tiny, labels))
        assert len(tested) == tiny.test_images
        seeds = [protocol.TRAINING_SEED + seed for seed in (*range(tiny.seeds), TUNING_SEED)]
        seeds += [protocol.TUNING_VALIDATION_SEED, protocol.UNLABELLED_SEED, protocol.HELD_OUT_SEED]
        for seed in seeds:
            assert not tested & protocol.hashes(protocol.scene_folder(tiny, labels, seed, 64))


def test_a_test_set_that_is_trained_on_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(protocol, "TRAINING_SEED", protocol.TEST_SEED)
    with pytest.raises(ValueError, match=r"64 images of .* are in the test set"):
        protocol.finetuning(tiny, "scratch", "scenes", 0, 1e-3)


def test_tuning_is_measured_elsewhere_than_the_table(tiny):
    tuning, table = (protocol.finetuning(tiny, BASE, "scenes", seed, 1e-3) for seed in (TUNING_SEED, 0))
    assert tuning.data.validation_path != table.data.validation_path
    assert tuning.data.path != table.data.path
    assert tuning.weights == table.weights
    assert protocol.finetuning(tiny, BASE, "scenes", 1, 1e-3).weights != table.weights


@pytest.mark.slow
@pytest.mark.long
def test_a_study_is_continued_and_its_record_grows(tiny, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "choose", lambda top1_at, rates: max(rates[:1], key=top1_at))
    monkeypatch.setattr(ablation, "TIERS", ((BASE, "scratch"),))
    study = Ablation(dataclasses.replace(tiny, seeds=1))
    plan = study.plan()
    assert plan.splitlines()[-1].startswith("7 jobs left")
    study.run()
    lines = list(study.record.lines())
    kinds = [line["kind"] for line in lines if line.get("set") != "tuning"]
    assert {kind: kinds.count(kind) for kind in ("pretrain", "finetune", "probe", "knn")} == {
        "pretrain": 1, "finetune": 4, "probe": 2, "knn": 2,
    }  # fmt: skip
    assert len(study.record.find(kind="finetune", set="test", row=BASE)["curve"]) == 6
    before = study.record.path.read_text()
    capsys.readouterr()
    again = Ablation(tiny)
    again.run()
    assert "seed 0" not in capsys.readouterr().out
    assert again.record.path.read_text().startswith(before)
    assert set(again.record.by_seed("finetune", "scratch", "hues")) == {0, 1}
    assert Ablation(tiny).plan() == "0 jobs left, 0.0 h"
    for name in ("table.md", "curves.png"):
        assert (tiny.output / name).stat().st_size > 500
    with pytest.raises(ValueError, match="other settings"):
        Ablation(dataclasses.replace(tiny, finetune_steps=7))


def test_nothing_is_started_that_does_not_fit(tiny, capsys):
    study = Ablation(dataclasses.replace(tiny, budget_hours=1e-6))
    study.record.append({"kind": "step_time", "row": BASE, "step_ms": 500.0})
    study.run()
    assert "more than is left" in capsys.readouterr().out
    assert study.record.find(kind="pretrain") is None


def test_a_rate_is_chosen_with_none_better_on_either_side():
    assert choose(lambda rate: -abs(rate - 1e-3), (5e-4, 1e-3, 2e-3)) == 1e-3
    assert choose(lambda rate: -abs(rate - 8e-3), (5e-4, 1e-3, 2e-3)) == 8e-3
    assert choose(lambda rate: -rate, (5e-4, 1e-3, 2e-3)) == 5e-4 / 8


def test_neighbours_of_separate_classes_are_found_and_noise_is_not(tmp_path):
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((3, 16))
    for name, count in (("training", 90), ("validation", 60)):
        labels = np.arange(count) % 3
        features = generator.standard_normal((count, 2, 16)).astype(np.float32)
        features[:, 1] = centres[labels] + 0.1 * features[:, 1]
        folder = tmp_path / "features" / name
        folder.mkdir(parents=True)
        np.save(folder / "features.npy", features)
        np.save(folder / "labels.npy", labels)
    noise, separate = nearest_neighbours(tmp_path)
    assert separate == 100
    assert noise < 60


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 40])
def test_quantiles_are_students(freedom):
    for level in (0.8, 0.975):
        assert t_quantile(level, freedom) == pytest.approx(stats.t.ppf(level, freedom), rel=1e-3)


def test_the_verdict_follows_the_interval():
    found = difference({0: 20.0, 1: 21.2, 2: 21.8}, {0: 30.0, 1: 31.0, 2: 32.0, 3: 0.0})
    assert (found.mean, found.seeds) == (pytest.approx(-10), 3)
    assert found.half == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)
    assert (found.verdict(-1.8), found.verdict(1.8), found.verdict(None)) == ("confirmed", "refuted", "")
    unclear = Difference(1.0, 1.0, 3)
    n = unclear.seeds_needed()
    assert unclear.verdict(1.0) == f"open: {n} seeds needed"
    powers = [
        (stats.t.ppf(0.975, m - 1) + stats.t.ppf(0.8, m - 1)) * unclear.sd / math.sqrt(m) <= 1 for m in range(2, n + 1)
    ]
    assert powers == [False] * (n - 2) + [True]
    assert Difference(1.0, 0.0, 1).verdict(1.0).startswith("open")


def test_the_report_says_what_the_record_holds(tmp_path):
    record = Record(tmp_path / "record.jsonl", {})
    for seed, (ours, theirs) in enumerate([(30.0, 20.0), (31.0, 21.2), (32.0, 21.8)]):
        for row, value in ((BASE, ours), ("scratch", theirs)):
            curve = [[100, value / 2], [200, value]]
            record.append({"kind": "finetune", "row": row, "seed": seed, "labels": "scenes", "set": "test",
                           "top1_percent": value, "curve": curve})  # fmt: skip
    record.append({"kind": "finetune", "row": "pixels", "seed": None, "labels": "scenes", "set": "tuning",
                   "top1_percent": 99.0})  # fmt: skip
    text = report(record)
    assert "| BEiT: blockwise masks, visual tokens | 31.00 ± 1.00, 3 |" in text
    assert "| from scratch | 21.00 ± 0.92, 3 | -10.00 ± 0.50 | -1.06 | confirmed |" in text
    assert "99" not in text
    mean = statistics.mean([(a - b) * 0.75 for a, b in ((30, 20), (31, 21.2), (32, 21.8))])
    assert f"{mean:+.2f}" in text
    json.loads(record.path.read_text().splitlines()[0])


def test_scans_are_the_same_at_every_call_and_their_classes_even():
    found = [continued.scan(index, 12) for index in range(24)]
    assert sorted(label for _, label in found) == sorted([*range(12)] * 2)
    assert all(pixels.dtype == np.uint16 and pixels.max() <= 4095 for pixels, _ in found)
    assert np.array_equal(continued.scan(5, 12)[0], found[5][0])
    assert not np.array_equal(continued.scan(5, 13)[0], found[5][0])


def test_the_interval_of_continued_pretraining_is_student_s():
    runs = {f"{kind}_{seed}": {"knn_top1_percent": value + seed, "probe_top1_percent": 0.0,
                               "start_knn_top1_percent": 10.0, "start_probe_top1_percent": 0.0}
            for seed in range(3) for kind, value in (("continued", 30.0), ("scratch", 20.0 + seed))}  # fmt: skip
    found = continued.differences(runs, 3)
    gains = [20.0, 21.0, 22.0]
    half = stats.t.ppf(0.975, 2) * statistics.stdev(gains) / math.sqrt(3)
    assert found["knn_top1_percent: continued minus as it is"] == pytest.approx((21, 21 - half, 21 + half), rel=1e-3)
    assert found["knn_top1_percent: continued minus scratch"][0] == pytest.approx(9)
    assert continued.differences({}, 3) == {}


def test_the_study_of_beit_v2_pairs_by_seed():
    runs = {}
    for seed in range(3):
        runs[f"tokenizer_{seed}"] = {"held_out_cosine": 0.9, "constant_cosine": 0.5 + 0.1 * seed,
                                     "used_codes_share": 1.0, "held_out_used_codes_share": 0.5}  # fmt: skip
        runs[f"v1_{seed}"] = {"knn_top1_percent": 20.0 + 3 * seed, "probe_top1_percent": 1.0}
        runs[f"v2_{seed}"] = {"knn_top1_percent": 25.0 + 2 * seed, "probe_top1_percent": 1.0}
    found = beitv2.summary(runs, 3)
    for name, values in (("cosine above the best constant", [0.4, 0.3, 0.2]),
                         ("knn_top1_percent: v2 minus v1", [5.0, 4.0, 3.0])):  # fmt: skip
        half = stats.t.ppf(0.975, 2) * statistics.stdev(values) / math.sqrt(3)
        mean = statistics.mean(values)
        assert found[name] == pytest.approx((mean, mean - half, mean + half), rel=1e-3)
    assert beitv2.summary({"v1_0": {}}, 3) == {}
