"""`create_model` and the methods of its models do what timm's do, on the same arguments and weights."""

import pytest
import torch

import beit_fast
from beit_fast.models import Beit, BeitFeatures
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()
timm = pytest.importorskip("timm")

NARROW = {"depth": 3, "embed_dim": 48, "num_heads": 3}


def pair(name="beit_base_patch16_224", **arguments):
    """The model of this library and timm's, by the same call, with the same weights that leave nothing at zero."""
    ours, peer = (library.create_model(name, **{**NARROW, **arguments}) for library in (beit_fast, timm))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    peer.load_state_dict(ours.state_dict())
    return ours.eval(), peer.eval()


def images(side=64, channels=3):
    height, width = side if isinstance(side, tuple) else (side, side)
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 10, "img_size": 64},
        {"img_size": (48, 80), "in_chans": 1, "drop_rate": 0.2, "drop_path_rate": 0.1},
        {"img_size": 64, "num_classes": 0, "global_pool": "token"},
        {"img_size": 64, "num_classes": 0, "global_pool": ""},
        {"img_size": 64, "use_rel_pos_bias": False, "use_abs_pos_emb": True, "init_values": 1e-5},
        {"img_size": 64, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "mlp_ratio": 2},
        {"img_size": 32, "patch_size": 8, "use_fc_norm": False, "pretrained_cfg": None, "scriptable": False},
    ],
)
def test_the_same_call_gives_the_same_model(arguments):
    ours, peer = pair(**arguments)
    x = images(arguments["img_size"], arguments.get("in_chans", 3))
    assert ours.state_dict().keys() == peer.state_dict().keys()
    torch.testing.assert_close(ours(x), peer(x), atol=1e-5, rtol=0)
    for attribute in (
        "num_classes",
        "num_features",
        "head_hidden_size",
        "embed_dim",
        "num_prefix_tokens",
        "global_pool",
    ):
        assert getattr(ours, attribute) == getattr(peer, attribute), attribute


def test_names_and_their_descriptions_are_those_of_timm():
    known = [name for name in beit_fast.list_models() if "tiny" not in name and "small" not in name]
    assert set(known) <= set(timm.list_models("beit*"))
    for name in known:
        for tag in [""] + [f".{t}" for t in ("in22k_ft_in22k", "in1k_ft_in22k") if f"{name}.{t}" in PRETRAINED]:
            with torch.device("meta"):
                ours = beit_fast.create_model(name + tag, depth=1)
                peer = timm.create_model(name + tag, depth=1)
            assert ours.num_classes == peer.num_classes
            for key in ("hf_hub_id", "input_size", "interpolation", "crop_pct", "mean", "std", "num_classes", "tag"):
                expected = peer.default_cfg[key]
                if key == "hf_hub_id":
                    expected = f"timm/{name}.{peer.default_cfg['tag']}"
                assert ours.default_cfg[key] == expected, (name, key)


PRETRAINED = timm.list_pretrained("beit*")


def test_timm_reads_our_description():
    model = beit_fast.create_model("beitv2_base_patch16_224", depth=1)
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["input_size"] == (3, 224, 224)


def test_layer_scale_starts_as_in_timm():
    for name in ("beit_base_patch16_224", "beitv2_base_patch16_224"):
        ours, peer = (library.create_model(name, depth=1) for library in (beit_fast, timm))
        assert torch.equal(ours.blocks[0].gamma_1, peer.blocks[0].gamma_1)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("indices", [None, 2, [0, -2], [1]])
def test_forward_intermediates(indices, stop_early, pool, norm):
    ours, peer = pair(img_size=(48, 64), global_pool=pool)
    x = images((48, 64))
    options = {"indices": indices, "norm": norm, "stop_early": stop_early}
    final, maps = ours.forward_intermediates(x, **options)
    expected_final, expected_maps = peer.forward_intermediates(x, **options)
    torch.testing.assert_close(final, expected_final, atol=1e-5, rtol=0)
    torch.testing.assert_close(maps, expected_maps, atol=1e-5, rtol=0)
    options.update(output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)
    torch.testing.assert_close(
        ours.forward_intermediates(x, **options), peer.forward_intermediates(x, **options), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("out_indices", [2, (0, 2), [-2, -1]])
def test_features_only(out_indices):
    arguments = {**NARROW, "img_size": 64, "features_only": True, "out_indices": out_indices}
    ours, peer = (lib.create_model("beit_base_patch16_224", **arguments) for lib in (beit_fast, timm))
    assert isinstance(ours, BeitFeatures)
    assert ours.state_dict().keys() == peer.state_dict().keys()
    peer.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images()), peer(images()), atol=1e-5, rtol=0)
    for question in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, question)() == getattr(peer.feature_info, question)()
    assert len(ours.feature_info) == len(peer.feature_info)
    for keys in (["num_chs"], ["module", "reduction"]):
        assert ours.feature_info.get_dicts(keys) == peer.feature_info.get_dicts(keys)
    described = peer.feature_info.get_dicts()
    assert [{key: d[key] for key in described[0]} for d in ours.feature_info.get_dicts()] == described
    for index in range(len(peer.feature_info)):
        assert ours.feature_info[index]["reduction"] == peer.feature_info[index]["reduction"]
    assert ours.default_cfg is ours.model.default_cfg
    ours.set_grad_checkpointing()
    assert ours.model.grad_checkpointing


def test_features_of_every_block_at_full_width():
    ours, peer = pair(depth=3, embed_dim=768, num_heads=12, img_size=96)
    x = images(96)
    with torch.no_grad():
        maps, expected = (model.forward_intermediates(x, intermediates_only=True) for model in (ours, peer))
    for ours_map, peer_map in zip(maps, expected, strict=True):
        assert (ours_map - peer_map).abs().max() < 1e-5 * peer_map.abs().max()


def test_another_head_keeps_the_rest():
    ours, peer = pair(img_size=64)
    head = torch.nn.Linear(48, 6)
    for model in (ours, peer):
        model.reset_classifier(6, "token")
        model.get_classifier().load_state_dict(head.state_dict())
    torch.testing.assert_close(ours(images()), peer(images()), atol=1e-5, rtol=0)
    ours.reset_classifier(0)
    assert ours(images()).shape == (2, 48)


def test_pruning():
    ours, peer = pair(img_size=64, global_pool="token")
    for model in (ours, peer):
        assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert ours.state_dict().keys() == peer.state_dict().keys()
    torch.testing.assert_close(ours(images()), peer(images()), atol=1e-5, rtol=0)


def test_an_input_size_made_the_models_own_gives_what_resizing_at_run_time_gives():
    ours, _ = pair(img_size=64)
    x = images((96, 48))
    before = ours(x)
    ours.set_input_size((96, 48))
    assert ours.blocks[0].attn.relative_position_bias_table.shape == (11 * 5 + 3, 3)
    torch.testing.assert_close(ours(x), before, atol=1e-6, rtol=0)


def test_layer_groups_are_those_of_timm():
    from timm.optim import param_groups_layer_decay

    ours, peer = pair(img_size=64)
    rates = [
        {n: g["lr_scale"] for g in param_groups_layer_decay(m, layer_decay=0.9) for n in names_of(m, g)}
        for m in (ours, peer)
    ]
    assert rates[0] == rates[1]


def names_of(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "beit_base_patch16_224.in21k"}, "in22k_ft_in22k_in1k"),
        ({"drop_path": 0.1}, "did you mean 'drop_path_rate'"),
        ({"swiglu_mlp": True}, "swiglu_mlp=True is not supported"),
        ({"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}, "choose one table"),
        ({"name": "beit_tiny_patch16_224", "pretrained": True}, "no weights are published"),
        ({"features_only": True, "out_indices": [12]}, "give some of 0 to 2"),
        ({"global_pool": "map"}, "global_pool 'map' is unknown"),
        ({"patch_size": (16, 8)}, "patches are square"),
        ({"depth": 2.5}, "depth must be a positive integer, got 2.5"),
        ({"mlp_ratio": "4"}, "mlp_ratio must be a positive number"),
        ({"num_classes": -1}, "num_classes must be 0 or more"),
        ({"pretrained_cfg": {"file": "weights.pth"}}, "give the weights as pretrained="),
        ({"pretrained_cfg_overlay": {"file": "weights.pth"}}, "give the weights as pretrained="),
        ({"pretrained_cfg": "in21k"}, "'beit_base_patch16_224.in21k' is unknown; choose one of .*in22k_ft_in22k"),
        ({"name": "hub:timm/beit_base_patch16_224"}, "give pretrained= a path or 'hf-hub:owner/name'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        beit_fast.create_model(**{"name": "beit_base_patch16_224", **NARROW, **arguments})


@pytest.mark.parametrize(
    ("x", "shape"), [(torch.zeros(1, 1, 64, 64), "1, 1, 64, 64"), (torch.zeros(3, 64, 64), "3, 64")]
)
def test_wrong_images_are_named(x, shape):
    model = beit_fast.create_model("beit_base_patch16_224", **NARROW, img_size=64)
    with pytest.raises(ValueError, match=rf"images must be \(B, 3, height, width\), got \({shape}"):
        model(x)


def test_arguments_as_timm_gives_them():
    model = beit_fast.create_model(
        "beit_base_patch16_224", **NARROW, patch_size=(8, 8), pretrained_cfg="in22k_ft_in22k"
    )
    assert model.num_classes == 21841
    assert model.patch_embed.patch_size == 8
    model.set_input_size(None)
    assert model.config.image_size == 224


def test_a_model_is_made_on_the_device_and_in_the_dtype_asked_for():
    model = beit_fast.create_model("beit_base_patch16_224", **NARROW, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert isinstance(model, Beit)
