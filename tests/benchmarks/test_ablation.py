"""The ablation study: rows differ in what they say, runs are not repeated, the table says what the record holds."""

import dataclasses
import json
import shutil

import pytest

from benchmarks.evidence import ablation
from benchmarks.evidence import study as studies
from benchmarks.evidence.study import Measured, Row, Study, difference, table, verdict


@pytest.fixture(scope="module")
def recipe():
    return ablation


def test_rows_differ_from_the_first_in_what_they_say(recipe, tmp_path):
    study = dataclasses.replace(recipe.config, images=2, held_out=2, cache_dir=str(tmp_path))
    choices = dict(study.choices)
    configs = {name: studies.pretraining(study, name, row) for name, row in choices.items() if row.length}
    base = configs["blockwise_tokens"]
    for name, config in configs.items():
        differing = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(base, f.name)} - {
            "output_dir"
        }
        named = {key.partition(".")[0] for key in choices[name].changes}
        extra = {"steps", "optim"} if choices[name].length != 1 else set()
        assert differing - {"data"} == named | extra
    assert configs["longer"].steps == 8 * base.steps // 3
    assert configs["no_mask"].masking.mode == "none"
    fine = {name: studies.finetuning(study, name, row, 0) for name, row in choices.items()}
    assert fine["plus"].model.preset == "plus"
    assert fine["layer_scale"].model.layer_scale_init == 0.1
    assert fine["scratch"].scratch
    same = ("random_mask", "pixels", "recover_all", "no_mask", "longer")
    assert all(fine[name].model == fine["blockwise_tokens"].model for name in same)


def test_a_wrong_field_is_an_error():
    with pytest.raises((TypeError, AttributeError)):
        studies.changed(Study(), {"masking.mood": 1})


@pytest.mark.slow
@pytest.mark.long
def test_a_study_is_continued_and_its_record_grows(recipe, tmp_path, capsys):
    rows = ("blockwise_tokens", "pixels", "scratch")
    study = dataclasses.replace(
        recipe.config, rows=rows, output=tmp_path / "runs", seeds=1, images=64, pretrain_steps=2, labelled_images=64,
        validation_images=48, held_out=8, finetune_steps=2, scratch_steps=2, probe_epochs=1,
        cache_dir=str(tmp_path / "cache"), device="cpu",
    )  # fmt: skip
    first = studies.run(study)
    before = first.path.read_text()
    capsys.readouterr()
    second = studies.run(dataclasses.replace(study, seeds=2))
    assert "pretrain: step 0" not in capsys.readouterr().out
    assert second.path.read_text().startswith(before)
    lines = list(second.lines())
    for measure in ("probe", "finetune"):
        assert len([line for line in lines if line["kind"] == measure]) == 6
        assert [entry.name for entry in second.measured(dict(study.choices), measure)] == list(rows)
    shutil.rmtree(study.output / "scratch")
    text = second.path.read_text()
    studies.run(dataclasses.replace(study, seeds=2))
    assert second.path.read_text() == text
    assert not (study.output / "scratch").exists()
    with pytest.raises(ValueError, match="other settings"):
        studies.run(dataclasses.replace(study, rate=2e-3))
    json.dumps(lines)


def test_the_table_tells_what_holds():
    base = Measured("base", Row("BEiT", paper=82.86), {0: 30.0, 1: 31.0, 2: 32.0})
    lower = Measured("pixels", Row("pixels", paper=81.04), {0: 20.0, 1: 21.2, 2: 21.8})
    near = Measured("random", Row("random", paper=82.77), {0: 31.0, 1: 30.0, 2: 32.5})
    higher = Measured("all", Row("all", paper=82.59), {0: 40.0, 1: 41.2, 2: 41.8})
    mean, half = difference(lower, base)
    assert mean == pytest.approx(-10)
    assert half == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)
    text = table([base, lower, near, higher], "base")
    rows = dict(zip(("base", "pixels", "random", "all"), text.splitlines()[2:], strict=True))
    assert rows["base"].startswith("| BEiT | 31.00 ± 1.00, 3 |")
    assert rows["pixels"].endswith("| -10.00 ± 0.50 | 81.04 | -1.82 | holds |")
    assert rows["random"].endswith("not told apart |")
    assert rows["all"].endswith("reversed |")
    assert verdict(None, 1.0) == verdict((1.0, 0.5), None) == ""
    alone = table([Measured("scratch", Row("scratch"), {0: 4.0})], "base").splitlines()[-1]
    assert alone == "| scratch | 4.00, 1 |  | not published |  |  |"
