"""Where tokenizers are looked for, what their files may be, and every refusal in its own words."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from beit_fast.tokenizers import DalleTokenizer, DiscreteVAE, TokenizerError, load, load_tokenizer
from beit_fast.tokenizers.dalle import DalleDecoder, DalleEncoder
from beit_fast.tokenizers.vqkd import VqkdTokenizer

VQKD_FILE = "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache") / "not" / "yet there"
    monkeypatch.setenv("BEIT_FAST_CACHE", str(cache))
    return cache


def encoder():
    torch.manual_seed(0)
    return DalleEncoder(8, 50)


def write(module, path, prefix="", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: tensor.clone() for name, tensor in module.state_dict().items()} | more, path)
    return path


def discrete_vae(path):
    return write(DiscreteVAE(20, 4, 8), path)


# Where they are.


def test_downloads_are_kept_in_the_cache(tmp_path, own_cache, monkeypatch):
    """Files that lie there are read, without a network; the decoder only where it is asked for."""
    monkeypatch.setattr(load, "is_reachable", lambda url: False)
    monkeypatch.setenv("HOME", str(tmp_path))
    vqkd = VqkdTokenizer(8, 4, 6, 64, 1, 1, 2, 8)
    for folder, given in ((own_cache, None), (tmp_path / "mine", str(tmp_path / "mine")), (tmp_path / "h", "~/h")):
        write(encoder(), folder / "dalle" / "encoder.safetensors")
        tokenizer = load_tokenizer("dalle", cache_dir=given)
        assert torch.equal(tokenizer.head()[0], DalleTokenizer(encoder()).head()[0])
        assert (tokenizer.name, tokenizer.decoder) == ("dalle", None)
        with pytest.raises(TokenizerError, match="the DALL-E decoder could not be fetched"):
            load_tokenizer("dalle", cache_dir=given, decoder=True)
        (folder / "vqkd").mkdir()
        torch.save({"model": vqkd.state_dict()}, folder / "vqkd" / VQKD_FILE)
        assert load_tokenizer("vqkd", cache_dir=given).vocab_size == 8


def test_only_the_name_is_given_by_place(tmp_path):
    assert load_tokenizer(name_or_path=str(discrete_vae(tmp_path / "a.safetensors"))).vocab_size == 20
    with pytest.raises(TypeError):
        load_tokenizer("random", "0" * 64)


def test_the_first_mirror_that_answers_is_taken(tmp_path, monkeypatch):
    """Where none does, the first is named, with the place that its file would have."""
    mirrors = {"encoder": ("http://a/first.pkl", "http://b/second.pkl", "http://c/third.pkl")}
    torch.save(encoder().state_dict(), tmp_path / "file")
    answering = []
    monkeypatch.setattr(load, "is_reachable", answering.__contains__)
    monkeypatch.setattr(load, "fetch", lambda url, place: place.write_bytes((tmp_path / "file").read_bytes()))
    size = {"encoder": sum(p.numel() for p in encoder().parameters())}
    with pytest.raises(TokenizerError) as error:
        load._load_dalle(tmp_path / "dalle", None, False, mirrors, size)
    reasons = "; ".join(f"{url}: its server cannot be reached" for url in mirrors["encoder"])
    assert str(error.value) == (
        "the DALL-E encoder could not be fetched. Without a network: put the file http://a/first.pkl at "
        f"{tmp_path / 'dalle' / 'first.pkl'}. Tried: {reasons}"
    )
    answering.append("http://b/second.pkl")
    assert load._load_dalle(tmp_path / "dalle", None, False, mirrors, size).vocab_size == 50


def test_the_hash_in_a_name_comes_after_the_last_dash(tmp_path, monkeypatch):
    model = VqkdTokenizer(8, 4, 6, 64, 1, 1, 2, 8)
    torch.save({"model": model.state_dict()}, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    monkeypatch.setattr(load, "is_reachable", lambda url: True)
    monkeypatch.setattr(load, "fetch", lambda url, place: place.write_bytes(data))
    name = f"vqkd-of-clip-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    assert load._load_vqkd(tmp_path / "cache", None, f"http://a/b/{name}").vocab_size == 8
    assert (tmp_path / "cache" / name).read_bytes() == data


def test_the_record_of_a_first_use_is_named_after_the_path(tmp_path, own_cache, capsys):
    file = discrete_vae(tmp_path / "own.safetensors")
    load_tokenizer(file)
    (record,) = (own_cache / "hashes").iterdir()
    assert record.name == hashlib.sha256(str(file).encode()).hexdigest()[:32]
    assert capsys.readouterr().err.endswith("(first use, kept)\n")


@pytest.mark.parametrize("obstacle", ["file", "home"])
def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch, capsys, obstacle):
    file = discrete_vae(tmp_path / "own.safetensors")
    if obstacle == "file":
        monkeypatch.setenv("BEIT_FAST_CACHE", str(file))
    else:

        def no_home(path):
            raise RuntimeError

        monkeypatch.delenv("BEIT_FAST_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr("beit_fast.tokenizers.download.Path.expanduser", no_home)
    tensors, _ = load._read(file, set())
    assert len(tensors) == len(DiscreteVAE(20, 4, 8).state_dict())
    assert capsys.readouterr().err.endswith("(first use, not kept)\n")


# How they run.


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_dalle_runs_in_half_precision_on_a_gpu(tmp_path, monkeypatch, place):
    """As its original does; nothing is moved here."""
    move = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *a, **k: self if a == (torch.device("cuda"),) else move(self, *a, **k)
    )
    write(encoder(), tmp_path / "encoder.safetensors")
    half = torch.float16 if place == "cuda" else torch.float32
    for name, given, expected in (
        (tmp_path, None, half), (tmp_path, torch.bfloat16, torch.bfloat16), ("random", None, torch.float32),
    ):  # fmt: skip
        assert load_tokenizer(name, dtype=given, device=place)._dtype() == expected


def test_the_random_tokenizer_is_always_the_same():
    tokenizer = load_tokenizer("random")
    codes = tokenizer.state_dict()["codebook.weight"]
    assert codes.shape == (8192, 16)
    assert tokenizer.state_dict()["encoder.0.0.weight"].shape[0] == 32
    torch.testing.assert_close(codes[0, :3], torch.tensor([-1.1258, -1.1524, -0.2506]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("dalle", DalleTokenizer), ("vqkd", VqkdTokenizer)])
def test_plans_take_the_real_sizes_without_weights(name, kind):
    device = torch.device("meta")
    with device:
        tokenizer = load.untrained(name, device, torch.bfloat16)
    assert isinstance(tokenizer, kind)
    assert (tokenizer.vocab_size, tokenizer.training, tokenizer._dtype()) == (8192, False, torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


# What their files may be.


@pytest.mark.parametrize("prefix", ["", "module.", "encoder."])
def test_names_may_have_a_common_prefix(tmp_path, prefix):
    file = write(encoder(), tmp_path / "file.safetensors", prefix)
    assert torch.equal(load_tokenizer(file).head()[0], DalleTokenizer(encoder()).head()[0])


def test_the_depths_of_a_vqkd_are_read_from_its_names(tmp_path):
    """And what a run of the official code keeps besides is left out."""
    model = VqkdTokenizer(8, 4, 6, 64, 2, 3, 2, 8).eval()
    more = {f"{name}.x": torch.zeros(1) for name in ("teacher_model", "scaling_layer", "loss_fn")}
    found = load_tokenizer(write(model, tmp_path / "file.safetensors", **more))
    state = found.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("kept", "other"), [("encoder", "decoder"), ("decoder", "encoder")])
def test_two_of_the_same_part_are_refused(tmp_path, kept, other):
    part = encoder() if kept == "encoder" else DalleDecoder(12, 8, 50)
    one, two = (write(part, tmp_path / f"{name}.safetensors") for name in (kept, other))
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(one)
    assert str(error.value) == f"{one} and {two} are the same part: one of them must be the {other}"


def test_a_part_of_another_size_is_told_the_published_one(tmp_path, monkeypatch):
    with torch.device("meta"):
        for part, module in (("encoder", DalleEncoder()), ("decoder", DalleDecoder())):
            assert load._DALLE_PARAMETERS[part] == sum(p.numel() for p in module.parameters())
    monkeypatch.setattr(load, "MIRRORS", {"encoder": (), "decoder": ()})
    write(encoder(), tmp_path / "dalle" / "encoder.safetensors")
    torch.save(DalleDecoder(12, 8, 50).state_dict(), tmp_path / "dalle" / "decoder.pkl")
    count = sum(p.numel() for p in DalleDecoder(12, 8, 50).parameters())
    with pytest.raises(TokenizerError) as error:
        load_tokenizer("dalle", cache_dir=tmp_path, decoder=True)
    assert str(error.value) == (
        f"decoder.pkl has {count:,} parameters; the published decoder has 43,829,766: fetch it again"
    )


@pytest.mark.parametrize(("size", "refused"), [(4 << 30, False), ((4 << 30) + 1, True)])
def test_files_of_more_than_4_gib_are_not_read(tmp_path, monkeypatch, size, refused):
    file = tmp_path / "file.safetensors"
    with file.open("wb") as empty:
        empty.truncate(size)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"few")
    said = "has 4,096 MiB, more than any tokenizer; give a tokenizer's file" if refused else "is not a readable"
    with pytest.raises(TokenizerError, match=f"^{file} {said}"):
        load_tokenizer(file)


@pytest.mark.parametrize("code", [5, None])
def test_files_that_cannot_be_read_say_why(tmp_path, monkeypatch, code):
    def broken(path):
        raise OSError("some reason") if code is None else OSError(code, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", broken)
    file = discrete_vae(tmp_path / "file.safetensors")
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(file)
    assert str(error.value) == f"{file} cannot be read: {'some reason' if code is None else 'Input/output error'}"


@pytest.mark.parametrize("kind", [None, ValueError, KeyError, RuntimeError])
def test_a_damaged_safetensors_file_is_one_line(tmp_path, monkeypatch, kind):
    """Whatever the library raises; without one of these the file is truly damaged."""
    file = discrete_vae(tmp_path / "file.safetensors")
    if kind is None:
        file.write_bytes(file.read_bytes()[:60])
    else:

        def broken(data):
            raise kind("two\nlines")

        monkeypatch.setattr(load, "load_safetensors", broken)
    with pytest.raises(TokenizerError, match=r"is not a readable safetensors file \(.+\)\. Fetch it again\.$") as error:
        load_tokenizer(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "flat", "short", "impossible"])
def test_a_malformed_tensor_is_one_line(tmp_path, monkeypatch, damage):
    """KeyError, ValueError, IndexError and RuntimeError of what reads the sizes."""
    state = DiscreteVAE(20, 4, 8).state_dict()
    if damage == "missing":
        del state["encoder.0.0.weight"]
    elif damage == "flat":
        state["codebook.weight"] = torch.zeros(3)
    elif damage == "short":
        state = {"blocks.input.w": torch.zeros(3), "blocks.output.conv.w": torch.zeros(3)}
    else:

        def impossible(tensors):
            raise RuntimeError

        monkeypatch.setattr(load, "_skeleton", impossible)
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(TokenizerError, match="is not a tokenizer beit_fast knows: a required tensor is malformed"):
        load_tokenizer(tmp_path / "file.safetensors")


def test_of_an_unknown_file_three_names_are_shown(tmp_path):
    save_file({name: torch.zeros(1) for name in "edcba"}, tmp_path / "file.safetensors")
    with pytest.raises(TokenizerError, match=r"BEiT v2's tokenizer, but a, b, c, \.\.\.$"):
        load_tokenizer(tmp_path / "file.safetensors")
