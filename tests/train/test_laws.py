"""Any configuration comes back from config.json, and any field that was changed is seen (hypothesis)."""

import dataclasses
import functools
import json
import tempfile
import types
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit_fast import __version__
from beit_fast.train.checkpoint.run_folder import FORMAT, RunFolder
from beit_fast.train.config import OptimConfig, fields_marked, flat, from_plain, to_plain
from beit_fast.train.tasks.finetune import FinetuneConfig
from beit_fast.train.tasks.pretrain import PretrainConfig
from beit_fast.train.tasks.probe import ProbeConfig
from beit_fast.train.tasks.segment import SegmentConfig
from beit_fast.train.tasks.tokenizer import TrainTokenizerConfig

KINDS = [PretrainConfig, FinetuneConfig, SegmentConfig, ProbeConfig, TrainTokenizerConfig]

FREE = {
    "batch_per_device", "change_batch_size", "checkpoint.background", "checkpoint.best", "checkpoint.every_steps",
    "checkpoint.keep", "compile", "cuda_graph", "data.builtin_validation_images", "data.cache_dir", "data.decoder",
    "data.max_bad_share", "data.prefetch", "data.threads", "data.token_cache", "data.validate",
    "data.validation_path", "device", "dry_run", "eval_every", "evaluation.flip", "evaluation.images",
    "evaluation.knn", "evaluation.path", "evaluation.pictures", "evaluation.ratios", "evaluation.stride",
    "evaluation.windows_per_batch", "extend", "feature_batch", "fresh", "gpus", "hang_timeout_s", "held_out_images",
    "log.every_steps", "log.progress", "log.trackers", "max_steps", "model.compile", "model.grad_checkpointing",
    "optim.max_skipped_steps", "output_dir", "parallel", "plan_gpu", "replay", "resume_from", "stop_after_no_gain",
}  # fmt: skip
"""What may differ when a run is continued: where, how fast, what is watched; anything else would be another run."""
SIMPLE = {
    bool: st.booleans(), int: st.integers(0, 2**40), float: st.floats(0, 2, allow_nan=False), type(None): st.none(),
    str: st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9),
    Path: st.text("ab/~. é", min_size=1, max_size=9).map(Path),
}  # fmt: skip


def values_of(hint):
    """Values of a field by its annotation; None where it holds fields of its own."""
    if dataclasses.is_dataclass(hint):
        return None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values_of(argument) for argument in arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*(values_of(argument) for argument in arguments))
    return SIMPLE[hint]


@functools.cache
def leaves(kind):
    """The place of each field that holds a value -> what it may hold."""
    return dict(places(kind, ()))


def places(kind, prefix):
    for name, hint in typing.get_type_hints(kind).items():
        if name in {field.name for field in dataclasses.fields(kind)}:
            values = values_of(hint)
            yield from places(hint, (*prefix, name)) if values is None else [((*prefix, name), values)]


def default_of(kind):
    options = {"scratch": True} if "scratch" in kind.__dataclass_fields__ else {}
    return kind(**options | ({"optim": OptimConfig(clip_grad=None)} if kind is ProbeConfig else {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_what_is_written_down_may_differ_in_a_continuation(kind):
    names = {".".join(place) for place in leaves(kind)}
    assert fields_marked(default_of(kind), "free") == FREE & names


def changed(config, place, value):
    inner = value if len(place) == 1 else changed(getattr(config, place[0]), place[1:], value)
    return dataclasses.replace(config, **{place[0]: inner})


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_subset_of_options_comes_back_from_config_json(kind, data):
    """Whatever it takes: a value that it refuses stays at its default. A continuation sees each change."""
    fields = leaves(kind)
    assert len(fields) > 30
    default = config = default_of(kind)
    written = {}
    for place in data.draw(st.lists(st.sampled_from(sorted(fields)), unique=True, max_size=8)):
        value = data.draw(fields[place])
        try:
            config = changed(config, place, value)
        except ValueError:
            continue
        written[".".join(place)] = value
    text = json.dumps(to_plain(config))
    assert from_plain(kind, json.loads(text)) == config
    before, after = flat(to_plain(default)), flat(json.loads(text))
    for name, value in written.items():
        plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        assert after[name] == plain
    differing = {name for name in after if after[name] != before[name]}
    assert differing <= set(written)
    if not {"extend", "change_batch_size", "resume_from"} & differing:  # they say what else may differ
        with tempfile.TemporaryDirectory() as folder:
            saved = {"format": FORMAT, "task": "x", "version": __version__, "config": json.loads(text)}
            Path(folder, "config.json").write_text(json.dumps(saved))
            refused = ""
            try:
                RunFolder(Path(folder)).compare(default, "x")
            except ValueError as error:
                refused = str(error)
        assert all((f"{name}: " in refused) == (name not in FREE) for name in differing)
        assert bool(refused) == bool(differing - FREE)
