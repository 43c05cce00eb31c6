"""Runs the before and after snippets of docs/drop-in.md, and compares what they give."""

import argparse
import re
from pathlib import Path

import pytest
import torch

import beit_fast
from beit_fast.models import resize_relative_position_bias_table
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()
pytest.importorskip("timm")
pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs/drop-in.md"


def snippets():
    """The code blocks of the page: before and after, in pairs."""
    blocks = re.findall(r"```python\n# (before|after)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert [kind for kind, _ in blocks] == ["before", "after"] * 3
    codes = [code for _, code in blocks]
    return list(zip(codes[::2], codes[1::2], strict=True))


def run(code, names):
    exec(compile(code, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(2, 3, 224, 224)


@torch.no_grad()
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["timm", "transformers"])
def test_the_same_logits_before_and_after(index, images):
    before, after = snippets()[index]
    names = run(before, {"images": images})
    for parameter in names["model"].parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape))
    expected = names["model"](images)
    names["weights"] = names["model"].state_dict()
    logits = run(after, names)["logits"]
    torch.testing.assert_close(logits, getattr(expected, "logits", expected), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_official_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = beit_fast.BeitConfig.from_preset("base", depth=12)
    state = beit_fast.BeitForMaskedImageModeling(config).state_dict()
    state["rel_pos_bias.relative_position_bias_table"].normal_()
    saved = {"model": state, "args": argparse.Namespace(lr=1.5e-3), "epoch": 799}
    torch.save(saved, "beit_base_patch16_224_pt22k.pth")
    before, after = snippets()[2]
    tables = run(before, {})["tables"]
    names = run(after, {})
    for found, given in zip(names["tables"], tables, strict=True):
        assert torch.equal(found.data, resize_relative_position_bias_table(given, (14, 14), (24, 24)))
    assert "12 expanded" in capsys.readouterr().out
