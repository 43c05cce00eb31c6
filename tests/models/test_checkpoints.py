"""Checkpoints of every kind and naming: loaded whole and reported, or refused whole and explained."""

import argparse
import dataclasses
import hashlib
import json
import os
import pickle
import zipfile
import zlib

import pytest
import torch
from safetensors.torch import save_file

from beit_fast.models import (
    Beit,
    BeitConfig,
    BeitFeatures,
    BeitForMaskedImageModeling,
    CheckpointError,
    convert_state_dict,
    load_checkpoint,
    resize_relative_position_bias_table,
)
from benchmarks.baselines.libraries import timm_beit, transformers_beit
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()

SMALL = BeitConfig(width=32, depth=2, num_heads=2, patch_size=8, image_size=32, vocab_size=20)
CLASSIFIER = SMALL.for_classification(5)


def noisy(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator))
    return model


def pretrained(**overrides):
    return noisy(BeitForMaskedImageModeling(dataclasses.replace(SMALL, **overrides)))


def index_buffers(state):
    """The buffers that old files carry beside the tables."""
    return {
        name.replace("_table", "_index").replace("bias_index", "index"): torch.zeros(17, 17, dtype=torch.int64)
        for name in state
        if name.endswith("relative_position_bias_table")
    }


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# Round trips


@pytest.mark.parametrize("naming", ["official", "timm", "transformers", "transformers_v4"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"global_pool": "token"},
        {"relative_position_bias": "shared"},
        {"relative_position_bias": "none", "use_abs_pos_emb": True, "layer_scale_init": None},
    ],
)
def test_classifiers_go_round_bit_by_bit(naming, overrides):
    state = noisy(Beit(dataclasses.replace(CLASSIFIER, **overrides))).state_dict()
    there = convert_state_dict(state, to=naming)
    assert_equal_states(convert_state_dict(there, to="official"), state)


@pytest.mark.parametrize("naming", ["official", "transformers", "transformers_v4"])
@pytest.mark.parametrize("plain", [False, True])
def test_pretraining_goes_round_bit_by_bit(naming, plain):
    state = pretrained(relative_position_bias="none" if plain else "shared", use_abs_pos_emb=plain).state_dict()
    assert_equal_states(convert_state_dict(convert_state_dict(state, to=naming), to="official"), state)


@pytest.mark.parametrize("kind", ["BeitForImageClassification", "BeitForMaskedImageModeling", "BeitModel"])
def test_names_are_those_of_transformers(kind, tmp_path):
    """Of its modules, and of the files it saves (which have the names of version 4)."""
    config = SMALL if kind == "BeitForMaskedImageModeling" else CLASSIFIER
    peer = transformers_beit(config, kind)
    state = convert_state_dict(peer.state_dict(), to="transformers")
    if kind == "BeitModel":
        state = {name.removeprefix("beit."): tensor for name, tensor in state.items()}
    assert_equal_states(state, peer.state_dict())
    peer.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert_equal_states(convert_state_dict(saved, to="official"), convert_state_dict(peer.state_dict(), to="official"))
    if kind != "BeitModel":
        assert convert_state_dict(saved, to="transformers_v4").keys() == saved.keys()


def test_names_of_segmentation_are_those_of_transformers(tmp_path):
    peer = transformers_beit(CLASSIFIER, "BeitForSemanticSegmentation", num_hidden_layers=4, out_indices=[1, 2, 3, 4])
    state = peer.state_dict()
    official = convert_state_dict(state, to="official")
    for name in (
        "backbone.blocks.3.attn.qkv.weight",
        "backbone.fpn1.3.bias",
        "decode_head.conv_seg.weight",
        "decode_head.psp_modules.2.1.bn.running_mean",
        "decode_head.bottleneck.conv.weight",
        "decode_head.lateral_convs.0.bn.bias",
        "auxiliary_head.convs.0.conv.weight",
    ):
        assert name in official
    assert_equal_states(convert_state_dict(official, to="transformers"), state)
    peer.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert_equal_states(convert_state_dict(saved, to="official"), official)
    assert convert_state_dict(state, to="transformers_v4").keys() == saved.keys()


def test_conversion_refuses_what_it_does_not_know():
    state = Beit(CLASSIFIER).state_dict()
    with pytest.raises(ValueError, match=r"'extra\.weight' \(of 1\) is no parameter"):
        convert_state_dict({**state, "extra.weight": torch.zeros(1)}, to="timm")
    with pytest.raises(ValueError, match="choose one of official"):
        convert_state_dict(state, to="keras")
    hugging = convert_state_dict(state, to="transformers")
    del hugging["beit.layers.1.attention.k_proj.weight"]
    with pytest.raises(ValueError, match=r"q, k and v of 'blocks\.1\.attn' .* none"):
        convert_state_dict(hugging, to="official")
    with pytest.raises(ValueError, match="the names are of two kinds"):
        convert_state_dict({**state, "classifier.bias": torch.zeros(5)}, to="official")


# Containers


def containers(state):
    """The ways in which weights are kept in files, by the program that keeps them so."""
    arguments = argparse.Namespace(model="beit_base_patch16_224", lr=1.5e-3, betas=(0.9, 0.98))
    return {
        "bare": state,
        "official": {"model": state, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": arguments},
        "deepspeed": {"module": state, "dp_world_size": 8, "csr_tensor_module_names": set(), "global_steps": 9},
        "mmseg": {"meta": {"env": "linux", "seed": None}, "state_dict": {f"backbone.{k}": v for k, v in state.items()}},
        "ddp": {"state_dict": {f"module.{k}": v for k, v in state.items()}, "arch": "beit"},
        "compiled": {f"_orig_mod.{k}": v for k, v in state.items()},
    }


@pytest.mark.parametrize("container", containers({}))
@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_save(container, legacy, tmp_path):
    source = noisy(Beit(CLASSIFIER))
    state = {**source.state_dict(), **index_buffers(source.state_dict())}
    path = tmp_path / "weights.pth"
    torch.save(containers(state)[container], path, _use_new_zipfile_serialization=not legacy)
    model = Beit(CLASSIFIER)
    report = load_checkpoint(model, path, verbose=False)
    assert_equal_states(model.state_dict(), source.state_dict())
    assert sorted(report.loaded) == sorted(model.state_dict())
    assert len(report.ignored) == 2
    assert set(report.ignored.values()) == {"computed from the image size"}


@pytest.mark.parametrize("naming", ["official", "transformers", "transformers_v4"])
def test_safetensors_and_folders(naming, tmp_path):
    source = noisy(Beit(CLASSIFIER))
    save_file(convert_state_dict(source.state_dict(), to=naming), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model = Beit(CLASSIFIER)
        load_checkpoint(model, path, verbose=False)
        assert_equal_states(model.state_dict(), source.state_dict())


def test_parameters_keep_their_identity(tmp_path):
    save_file(noisy(Beit(CLASSIFIER)).state_dict(), tmp_path / "w.safetensors")
    model = Beit(CLASSIFIER)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    load_checkpoint(model, tmp_path / "w.safetensors", verbose=False)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_the_report_is_printed(tmp_path, capsys):
    save_file(pretrained().state_dict(), tmp_path / "w.safetensors")
    load_checkpoint(Beit(CLASSIFIER), tmp_path / "w.safetensors")
    printed = capsys.readouterr().out
    assert "2 expanded" in printed
    assert "left as initialised: fc_norm.weight, fc_norm.bias, head.weight, head.bias" in printed
    assert "ignored (belongs to another task): lm_head.bias" in printed


# Fitting


def test_pretraining_into_a_classifier_of_another_size(tmp_path):
    source = pretrained()
    torch.save({"model": source.state_dict()}, tmp_path / "pt.pth")
    model = Beit(dataclasses.replace(CLASSIFIER, image_size=(48, 40)))
    fresh = {name: model.state_dict()[name].clone() for name in ("fc_norm.weight", "head.weight")}
    report = load_checkpoint(model, tmp_path / "pt.pth", verbose=False)
    state, given = model.state_dict(), source.state_dict()
    table = resize_relative_position_bias_table(given["rel_pos_bias.relative_position_bias_table"], (4, 4), (6, 5))
    tables = [f"blocks.{i}.attn.relative_position_bias_table" for i in range(2)]
    for name in tables:
        assert torch.equal(state[name], table)
    for name, value in fresh.items():
        assert torch.equal(state[name], value)
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], given["blocks.1.mlp.fc1.weight"])
    assert report.expanded == tables
    assert sorted(report.missing) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert {"mask_token", "norm.weight", "norm.bias", "lm_head.weight", "lm_head.bias"} == set(report.ignored)
    covered = [*report.loaded, *report.resized, *report.expanded, *report.missing]
    assert sorted(covered) == sorted(state)


def test_another_number_of_classes_and_channels():
    source = noisy(Beit(dataclasses.replace(CLASSIFIER, num_classes=9)))
    model = Beit(dataclasses.replace(CLASSIFIER, in_chans=1))
    report = load_state(model, source.state_dict())
    kernel = source.state_dict()["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert torch.equal(model.state_dict()["patch_embed.proj.weight"], kernel)
    assert list(report.resized) == ["patch_embed.proj.weight"]
    assert report.missing == ["head.weight", "head.bias"]
    assert "not the model's (5, 32)" in report.ignored["head.weight"]


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_channels_are_fitted_as_timm_fits_them(channels):
    from timm.models._manipulate import adapt_input_conv

    weight = torch.randn(4, 3, 2, 2)
    config = dataclasses.replace(CLASSIFIER, in_chans=channels, width=4, patch_size=2, image_size=8, num_heads=2)
    source = Beit(dataclasses.replace(config, in_chans=3))
    model = Beit(config)
    load_state(model, {**source.state_dict(), "patch_embed.proj.weight": weight})
    torch.testing.assert_close(model.patch_embed.proj.weight.data, adapt_input_conv(channels, weight))


def load_state(model, state, **options):
    from beit_fast.models.checkpoints import load_state_dict

    return load_state_dict(model, state, **options)


def test_windows_that_are_not_square_are_asked_for():
    wide = noisy(Beit(dataclasses.replace(CLASSIFIER, image_size=(32, 48)))).state_dict()
    model = Beit(CLASSIFIER)
    with pytest.raises(CheckpointError, match="give source_grid"):
        load_state(model, wide)
    report = load_state(model, wide, source_grid=(4, 6))
    assert len(report.resized) == 2
    turned = Beit(dataclasses.replace(CLASSIFIER, image_size=(48, 32)))  # the same rows in another order
    assert len(load_state(turned, wide, source_grid=(4, 6)).resized) == 2
    name = "blocks.0.attn.relative_position_bias_table"
    expected = resize_relative_position_bias_table(wide[name], (4, 6), (6, 4))
    assert torch.equal(turned.state_dict()[name], expected)


def test_absolute_embeddings_are_resized():
    plain = {"relative_position_bias": "none", "use_abs_pos_emb": True}
    source = noisy(Beit(dataclasses.replace(CLASSIFIER, **plain)))
    model = Beit(dataclasses.replace(CLASSIFIER, image_size=64, **plain))
    assert load_state(model, source.state_dict()).resized == {"pos_embed": ((1, 17, 32), (1, 65, 32))}


def test_features_take_weights_before_or_after_they_are_cut():
    source = noisy(Beit(dataclasses.replace(CLASSIFIER, global_pool="token")))
    features = BeitFeatures(Beit(dataclasses.replace(CLASSIFIER, global_pool="token")), 1, norm=True)
    report = load_state(features, source.state_dict())
    assert set(report.ignored) == {"head.weight", "head.bias"}
    assert not report.missing


def test_segmentation_files_give_their_backbone():
    peer = transformers_beit(CLASSIFIER, "BeitForSemanticSegmentation", num_hidden_layers=4, out_indices=[1, 2, 3, 4])
    model = Beit(dataclasses.replace(CLASSIFIER, depth=4))
    for state in (peer.state_dict(), convert_state_dict(peer.state_dict(), to="official")):
        report = load_state(model, state)
        assert {name.split(".")[0] for name in report.ignored} & {"decode_head", "auxiliary_head"}
        assert "fc_norm.weight" in report.missing
    loaded = convert_state_dict(model.state_dict(), to="transformers")
    name = "beit.layers.3.attention.q_proj.weight"
    assert torch.equal(loaded[name], peer.state_dict()[name])


def test_timm_loads_what_we_export():
    source = pretrained()
    peer = timm_beit(dataclasses.replace(SMALL, global_pool="token", num_classes=0))
    peer.load_state_dict(convert_state_dict(source.state_dict(), to="timm"))


# What does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, r"'blocks\.2\.gamma_1' \(32,\) is not in the file"),
        ({"depth": 1}, r"'blocks\.1\..*' .* has no place in the model"),
        ({"width": 64}, r"'cls_token' is \(1, 1, 32\) in the file and \(1, 1, 64\) in the model"),
        ({"layer_scale_init": None}, r"'blocks\.0\.gamma_1' .* has no place in the model"),
        ({"use_abs_pos_emb": True}, r"'pos_embed' \(1, 17, 32\) is not in the file"),
        ({"relative_position_bias": "shared"}, "a table for each block and the model one for all"),
        ({"patch_size": 4}, r"'patch_embed\.proj\.weight' is \(32, 3, 8, 8\)"),
    ],
)
def test_another_architecture_is_refused_and_leaves_the_model_as_it_was(change, message):
    source = noisy(Beit(CLASSIFIER)).state_dict()
    model = Beit(dataclasses.replace(CLASSIFIER, **change))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_state(model, source)
    assert "\n" not in str(caught.value)
    assert_equal_states(model.state_dict(), before)


def test_undefined_and_whole_numbers_are_refused():
    state = noisy(Beit(CLASSIFIER)).state_dict()
    state["norm_of_nothing"] = torch.zeros(1)
    load_state(Beit(CLASSIFIER), state)
    bad = {**state, "blocks.1.norm1.weight": torch.full((32,), float("nan"))}
    with pytest.raises(CheckpointError, match=r"'blocks\.1\.norm1\.weight' holds infinite or undefined"):
        load_state(Beit(CLASSIFIER), bad)
    with pytest.raises(CheckpointError, match=r"torch\.int64, not floating"):
        load_state(Beit(CLASSIFIER), {**state, "cls_token": torch.zeros(1, 1, 32, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match="a Linear; weights can be loaded into a BEiT"):
        load_state(torch.nn.Linear(1, 1), state)


# What is damaged or hostile


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["beside", "inside", "legacy", "plain pickle"])
def test_code_in_a_file_is_named_and_not_run(place, tmp_path):
    state = Beit(CLASSIFIER).state_dict()
    mark = tmp_path / "executed"
    path = tmp_path / "bomb.pth"
    if place == "plain pickle":
        path.write_bytes(pickle.dumps({"model": Bomb(mark)}, protocol=2))
    else:
        held = {"model": {**state, "x": Bomb(mark)} if place == "inside" else state, "args": Bomb(mark)}
        torch.save(held, path, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(CheckpointError, match="mkdir") as caught:
        load_checkpoint(Beit(CLASSIFIER), path)
    assert "nothing was executed" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"<?xml version='1.0'?><Error>PublicAccessNotPermitted</Error>", "a web page or an error message"),
        (b"GIF89a" + bytes(100), "a file that begins with"),
        ((1 << 60).to_bytes(8, "little") + b'{"a":1}', "no safetensors file"),
        (b"PK\x03\x04" + bytes(60), "cut off or damaged"),
    ],
)
def test_files_of_another_kind(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(Beit(CLASSIFIER), tmp_path / "file")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(Beit(CLASSIFIER), tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_checkpoint(Beit(CLASSIFIER), tmp_path)


def test_a_known_hash_is_checked(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(Beit(CLASSIFIER).state_dict(), path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    load_checkpoint(Beit(CLASSIFIER), path, sha256=right.upper(), verbose=False)
    with pytest.raises(CheckpointError, match="sha256 is"):
        load_checkpoint(Beit(CLASSIFIER), path, sha256="0" * 64)


def test_the_manifest_of_a_training_checkpoint_is_checked(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(Beit(CLASSIFIER).state_dict(), path)
    data = bytearray(path.read_bytes())
    entry = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "files": {path.name: entry}}))
    load_checkpoint(Beit(CLASSIFIER), tmp_path, verbose=False)
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"differs from what manifest\.json says"):
        load_checkpoint(Beit(CLASSIFIER), tmp_path)


def test_archives_that_claim_more_than_they_hold(tmp_path):
    state = Beit(CLASSIFIER).state_dict()
    torch.save({**state, "cls_token": torch.zeros(1).expand(10**12)}, tmp_path / "huge.pth")
    with pytest.raises(CheckpointError, match=r"'cls_token' claims shape \(1000000000000,\)"):
        load_checkpoint(Beit(CLASSIFIER), tmp_path / "huge.pth")
    torch.save(state, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as source, zipfile.ZipFile(tmp_path / "z.pth", "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"compressed, which torch\.save never does"):
        load_checkpoint(Beit(CLASSIFIER), tmp_path / "z.pth")


@pytest.mark.parametrize("held", [[1, 2], {"model": 3}, {"epoch": 1}, torch.zeros(3), {"model": {"a": 1}}])
def test_files_without_named_tensors(held, tmp_path):
    torch.save(held, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"not a state dict|holds no named tensors"):
        load_checkpoint(Beit(CLASSIFIER), tmp_path / "w.pth")


def containing_itself():
    held = {}
    held["model"] = {"module": held}
    return held


def strange(tensor):
    state = dict(Beit(CLASSIFIER).state_dict())
    state["blocks.0.attn.proj.weight"] = tensor
    return state


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch about prototypes
@pytest.mark.parametrize(
    ("held", "problem"),
    [
        (containing_itself, "holds no named tensors"),
        (lambda: strange(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), "not a plain tensor .nested"),
        (
            lambda: strange(torch.quantize_per_tensor(torch.ones(32, 32), 0.1, 0, torch.qint8)),
            "plain tensor .torch.qint8",
        ),
        (lambda: strange(torch.empty(32, 32, device="meta")), "not a plain tensor .*meta"),
        (lambda: strange(torch.ones(32, 32).numpy()), "'blocks.0.attn.proj.weight' .* is not in the file"),
        (lambda: {**strange(torch.ones(32, 32)), "blocks.0.bad\nname": 1.0, "blocks.0.gamma\n": torch.ones(3)}, None),
    ],
)
def test_strange_contents(held, problem, tmp_path):
    torch.save(held(), tmp_path / "file.pt")
    if problem is None:
        report = load_checkpoint(Beit(CLASSIFIER), tmp_path / "file.pt", verbose=False)
        assert list(report.ignored) == ["blocks.0.gamma\n"]
        return
    with pytest.raises(CheckpointError, match=problem) as error:
        load_checkpoint(Beit(CLASSIFIER), tmp_path / "file.pt")
    assert len(str(error.value).splitlines()) == 1


def test_numbers_of_eight_bits_are_read(tmp_path):
    model = Beit(CLASSIFIER)
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    report = load_checkpoint(model, tmp_path, verbose=False)
    assert len(report.loaded) == len(state)
    assert torch.equal(model.head.weight.data, state["head.weight"].float())
