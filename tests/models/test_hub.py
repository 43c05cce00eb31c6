"""Models to and from folders, and the way to the hub as far as it goes without a network."""

import json
import shutil
import socket
import threading
from dataclasses import replace

import pytest
import torch

import beit_fast
from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling, CheckpointError
from benchmarks.baselines.libraries import transformers_beit

pytest.importorskip("huggingface_hub")

SMALL = BeitConfig(width=32, depth=2, num_heads=2, patch_size=8, image_size=(32, 40), vocab_size=20)
SQUARE = replace(SMALL, image_size=32)


def noisy(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("kind", [Beit, BeitForMaskedImageModeling])
def test_a_saved_folder_comes_back_as_it_was(kind, tmp_path):
    config = SMALL.for_classification(5, global_pool="token") if kind is Beit else SMALL
    model = noisy(kind(config))
    model.save_pretrained(tmp_path / "folder")
    again = kind.from_pretrained(tmp_path / "folder")
    assert not again.training
    assert again.config == config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (
        "BEiT" in (tmp_path / "folder/README.md").read_text() or "Beit" in (tmp_path / "folder/README.md").read_text()
    )


def test_a_saved_pretraining_becomes_a_classifier_of_another_size(tmp_path, capsys):
    BeitForMaskedImageModeling(SQUARE).save_pretrained(tmp_path)
    model = Beit.from_pretrained(tmp_path, image_size=48, num_classes=3, drop_path_rate=0.2, verbose=True)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 3)
    assert model.config.drop_path_rate == 0.2
    assert "2 expanded" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [
        {"relative_position_bias": "per_block"},
        {"relative_position_bias": "none", "use_abs_pos_emb": True, "layer_scale_init": None, "global_pool": "token"},
    ],
)
def test_folders_that_transformers_saved(overrides, tmp_path):
    peer = noisy(
        transformers_beit(SMALL.for_classification(5, image_size=32, **overrides), "BeitForImageClassification")
    )
    peer.save_pretrained(tmp_path)
    ours = Beit.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), peer(x).logits, atol=1e-5, rtol=0)


def test_folders_of_pretraining_that_transformers_saved(tmp_path):
    peer = noisy(transformers_beit(SQUARE, "BeitForMaskedImageModeling"))
    peer.save_pretrained(tmp_path)
    ours = BeitForMaskedImageModeling.from_pretrained(tmp_path)
    x, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5
    torch.testing.assert_close(ours.predict_tokens(x, mask), peer(x, mask).logits[mask], atol=1e-5, rtol=0)
    assert Beit.from_pretrained(tmp_path, num_classes=4).head.weight.shape == (4, 32)


def test_folders_that_timm_saved(tmp_path):
    model = noisy(beit_fast.create_model("beit_tiny_patch16_224", depth=2, num_classes=7))
    model.save_pretrained(tmp_path)
    timms = {
        "architecture": "beit_tiny_patch16_224",
        "num_classes": 7,
        "model_args": {"depth": 2},
        "pretrained_cfg": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(timms))
    assert torch.equal(Beit.from_pretrained(tmp_path).head.weight, model.head.weight)


def test_a_classifier_is_not_opened_as_pretraining(tmp_path):
    Beit(SMALL.for_classification(5)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"open it with Beit\.from_pretrained"):
        BeitForMaskedImageModeling.from_pretrained(tmp_path)


OTHERS = ["", "[]", '{"model_type": "vit"}', '{"library_name": "beit_fast", "depht": 3}']
DEEP = [pytest.param(opening * 200_000, id=f"200000 x {opening}") for opening in ("[", '{"a":')]


@pytest.mark.parametrize("text", [*OTHERS, *DEEP])
def test_configurations_that_describe_no_beit(text, tmp_path):
    Beit(SMALL.for_classification(5)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="describes no BEiT"):
        Beit.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"width": 65_536}, {"depth": 1_000_000}, {"num_classes": 1 << 40}])
def test_a_description_of_more_than_the_weights_is_refused(tmp_path, change):
    """Before memory is taken for it: a folder of 100 KB that describes a model of terabytes."""
    Beit(SMALL.for_classification(5)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(
        CheckpointError, match=rf"{file}: describes a model of .* but model.safetensors has only 0\.1 MiB"
    ):
        Beit.from_pretrained(tmp_path)


def test_places_that_cannot_be_reached_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no such folder, and no repository owner/name"):
        Beit.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"https://huggingface\.co/missing/nothing/resolve/main/config\.json"):
        Beit.from_pretrained("missing/nothing", cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"timm/beit_base_patch16_224\.in22k_ft_in22k/resolve/main/model"):
        beit_fast.create_model("beit_base_patch16_224.in22k_ft_in22k", pretrained=True, depth=1, cache_dir=tmp_path)


def test_create_model_takes_files_and_folders(tmp_path):
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
    model = noisy(beit_fast.create_model("beit_base_patch16_224", **options))
    model.save_pretrained(tmp_path)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    for arguments in ({"pretrained": tmp_path}, {"checkpoint_path": str(tmp_path / "w.pth")}):
        again = beit_fast.create_model("beit_base_patch16_224", **options, **arguments)
        assert torch.equal(again.head.weight, model.head.weight)


def test_what_would_be_uploaded(tmp_path, monkeypatch):
    """Without a network: huggingface_hub's own code up to the two calls that would leave the machine."""
    from huggingface_hub import HfApi

    def create_repo(self, repo_id, **options):
        return type("Repository", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, tmp_path / "uploaded")
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model = noisy(Beit(SMALL.for_classification(5)))
    assert model.push_to_hub("me/mine", commit_message="First").startswith("https://huggingface.co/me/mine")
    again = Beit.from_pretrained(tmp_path / "uploaded")
    assert torch.equal(again.head.weight, model.head.weight)
    assert model.save_pretrained(tmp_path / "local") is None


def test_a_hub_that_does_not_answer_is_noticed_in_two_seconds(monkeypatch, tmp_path):
    """A server that accepts no connection, and a name lookup that hangs; what is in the cache is used all the same."""
    from huggingface_hub import constants

    from beit_fast import network

    monkeypatch.setattr(network, "PATIENCE_S", 0.2)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hanging = threading.Event()
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))  # it does not listen
        address = f"http://127.0.0.1:{full.getsockname()[1]}"
        assert not network.is_reachable(address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with pytest.raises(CheckpointError, match=f"config.json could not be fetched \\({address} cannot be reached"):
            Beit.from_pretrained("owner/name", cache_dir=tmp_path)
        full.listen()
        assert network.is_reachable(address)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: hanging.wait(30) and ())
    assert not network.is_reachable("https://huggingface.co")
    hanging.set()
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "1234"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("1234")
    noisy(Beit(SQUARE.for_classification(3))).save_pretrained(snapshot)
    assert Beit.from_pretrained("owner/name", cache_dir=tmp_path).num_classes == 3


def test_a_proxy_is_not_bypassed(monkeypatch):
    from beit_fast import network

    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert network.is_reachable("https://huggingface.co")
