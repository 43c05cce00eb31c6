"""The evidence protocol at toy length: every arm runs, the record says what was run, a second call reuses it."""

import json

import pytest

from benchmarks.evidence import finetune as evidence_finetune
from benchmarks.evidence.finetune import Protocol, differences, gather, summary


@pytest.mark.slow
@pytest.mark.long
def test_every_arm_runs_and_is_not_run_twice(tmp_path, monkeypatch, capsys):
    protocol = Protocol(
        output=tmp_path / "runs", seeds=2, unlabelled_images=64, pretrain_steps=16, labelled_images=64,
        validation_images=48, finetune_steps=3, scratch_steps=9, rates=(1e-3, 2e-3), probe_epochs=2, probe_images=64,
        cache_dir=str(tmp_path / "cache"), device="cpu",
    )  # fmt: skip
    monkeypatch.setattr(evidence_finetune, "HELD_OUT", 32)
    found = gather(protocol)
    assert {"pretraining", "probe_pretrained", "probe_random", "finetune", "scratch"} <= set(found)
    assert len(found["scratch"]["curves"]) == len(found["finetune"]["top1_percent"]) == 2
    assert found["finetune_tuning"]["chosen"] in protocol.rates
    assert found["scratch"]["steps"] == 9
    assert {len(layers) for layers in found["probe_random"]["layers"]} == {4}
    capsys.readouterr()
    again = gather(protocol)
    assert again == found
    assert "step 1/" not in capsys.readouterr().out
    evidence_finetune.draw(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    json.dumps(found)


def test_the_two_arms_differ_only_in_what_they_compare():
    protocol = Protocol()
    fine, scratch = (evidence_finetune.classifying(protocol, weights, 1e-3, 0) for weights in ("x", None))
    assert scratch.steps >= 3 * fine.steps
    assert (fine.data, fine.model, fine.augment, fine.seed) == (scratch.data, scratch.model, scratch.augment, 0)
    assert fine.optim.lr == scratch.optim.lr
    assert evidence_finetune.classifying(protocol, None, 1e-3, 1).data != scratch.data
    held = [evidence_finetune.classifying(protocol, None, 1e-3, s).data.builtin_seed for s in (0, 1, 2, 100)]
    assert len(set(held)) == 4


def test_sums_are_plain_statistics():
    found = {"finetune": summary([30.0, 32.0, 34.0]), "scratch": summary([20.0, 20.0, 23.0])}
    assert found["finetune"]["standard_deviation"] == 2.0
    assert differences(found) == {"finetune_minus_scratch": 11.0}
