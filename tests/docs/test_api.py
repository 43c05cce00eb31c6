"""Every public name has a docstring that says what goes in and out, and an example that runs."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()

PUBLIC = [
    "beit_fast.create_model",
    "beit_fast.list_models",
    "beit_fast.accelerate",
    "beit_fast.restore",
    "beit_fast.use_backend",
    "beit_fast.Beit",
    "beit_fast.BeitConfig",
    "beit_fast.BeitForMaskedImageModeling",
    "beit_fast.kernels.packed_attention",
    "beit_fast.kernels.biased_attention",
    "beit_fast.kernels.relative_position_bias",
    "beit_fast.kernels.residual_layer_norm",
    "beit_fast.kernels.bias_gelu",
    "beit_fast.kernels.masked_cross_entropy",
    "beit_fast.models.load_checkpoint",
    "beit_fast.models.convert_state_dict",
    "beit_fast.models.resize_relative_position_bias_table",
    "beit_fast.tokenizers.load_tokenizer",
    "beit_fast.data.BlockwiseMasking",
]
API = Path(__file__).parents[2] / "docs/api.md"


def resolve(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", PUBLIC)
def test_the_example_of_a_public_name_runs(path):
    thing = resolve(path)
    examples = doctest.DocTestFinder(recurse=False).find(thing, path, globs={})
    assert examples, f"{path} has no example"
    assert sum(len(example.examples) for example in examples) > 0, f"{path} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report = []
    for example in examples:
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("path", PUBLIC)
def test_the_docstring_says_what_goes_in_and_out(path):
    thing = resolve(path)
    text = inspect.getdoc(thing)
    assert len(text.splitlines()[0]) <= 120
    if inspect.isfunction(thing) and inspect.signature(thing).parameters:
        without_errors = path in ("beit_fast.restore", "beit_fast.list_models")
        sections = ("Args:", "Returns:") if without_errors else ("Args:", "Returns:", "Raises:")
        assert [section for section in sections if section not in text] == []


def test_the_api_page_shows_every_public_name():
    shown = [line.removeprefix("::: ") for line in API.read_text().splitlines() if line.startswith("::: ")]
    assert set(PUBLIC) <= set(shown)
    for path in shown:
        resolve(path)
