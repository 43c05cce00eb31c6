"""Reading tokenizers from disk and from a (local) network; the pickles are made here, of look-alike classes."""

import hashlib
import http.server
import io
import os
import pickle
import sys
import threading
import types
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from beit_fast.tokenizers import DalleTokenizer, DiscreteVAE, TokenizerError, load, load_tokenizer
from beit_fast.tokenizers.dalle import DalleDecoder, DalleEncoder
from beit_fast.tokenizers.download import fetch
from beit_fast.tokenizers.unpickle import read_tensors
from beit_fast.tokenizers.vqkd import VqkdTokenizer

SMALL = {"encoder": sum(p.numel() for p in DalleEncoder(8, 50).parameters())}
SMALL["decoder"] = sum(p.numel() for p in DalleDecoder(12, 8, 50).parameters())


def look_alike(module: nn.Module, name: str, classes: dict[str, Any]) -> nn.Module:
    """The same tree of parameters, in classes that live in packages `dall_e.*` and nowhere else."""
    if type(module).__module__.startswith("torch.nn"):
        twin: nn.Module = type(module).__new__(type(module))
        twin.__dict__.update(module.__dict__)
    else:
        cls = classes.setdefault(name, type(name, (nn.Module,), {"__module__": f"dall_e.{name.lower()}"}))
        twin = cls()
        twin.__dict__["gain"] = 0.015625
        twin.__dict__["device"] = torch.device("cpu")
        twin._parameters = dict(module._parameters)
    twin._modules = {
        key: look_alike(child, type(child).__name__.strip("_"), classes) for key, child in module._modules.items()
    }  # type: ignore[arg-type,misc]
    return twin


def save_whole_module(module: nn.Module, name: str, path: Path, zipped: bool) -> None:
    classes: dict[str, Any] = {}
    twin = look_alike(module, name, classes)
    packages = {f"dall_e.{n.lower()}": types.ModuleType(f"dall_e.{n.lower()}") for n in classes} | {
        "dall_e": types.ModuleType("dall_e")
    }
    for n, cls in classes.items():
        setattr(packages[f"dall_e.{n.lower()}"], n, cls)
    sys.modules.update(packages)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Couldn't retrieve source code")
            torch.save(twin, path, _use_new_zipfile_serialization=zipped)
    finally:
        for package in packages:
            del sys.modules[package]


def make_parts(folder: Path, zipped: bool = True) -> tuple[DalleEncoder, DalleDecoder]:
    torch.manual_seed(0)
    encoder, decoder = DalleEncoder(8, 50), DalleDecoder(12, 8, 50)
    save_whole_module(encoder, "Encoder", folder / "encoder.pkl", zipped)
    save_whole_module(decoder, "Decoder", folder / "decoder.pkl", zipped)
    return encoder, decoder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hashes are kept here, not in the cache of the user who runs the tests."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BEIT_FAST_CACHE", str(cache))
    return cache


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_of_a_pickled_module(tmp_path: Path, zipped: bool) -> None:
    encoder, decoder = make_parts(tmp_path, zipped)
    assert "dall_e" not in sys.modules
    for module, part in ((encoder, "encoder"), (decoder, "decoder")):
        read = read_tensors(tmp_path / f"{part}.pkl")
        expected = module.state_dict()
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], expected[name]) for name in expected)
    tokenizer = load_tokenizer(tmp_path / "encoder.pkl")
    images = torch.rand(2, 3, 32, 32)
    ids = tokenizer.encode(images)
    assert torch.equal(ids, DalleTokenizer(encoder).encode(images))
    torch.testing.assert_close(tokenizer.decode(ids), DalleTokenizer(encoder, decoder).decode(ids))
    assert tokenizer.sha256 == sha256(tmp_path / "encoder.pkl")
    assert not any(p.requires_grad for p in tokenizer.parameters())


def test_conversion_to_safetensors(tmp_path: Path) -> None:
    make_parts(tmp_path)
    load._convert(tmp_path / "encoder.pkl", "encoder", SMALL["encoder"], None)
    images = torch.rand(2, 3, 16, 16)
    converted, original = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "encoder.pkl")
    assert (converted.name, original.name) == (str(tmp_path), str(tmp_path / "encoder.pkl"))
    assert torch.equal(converted.encode(images), original.encode(images))
    assert converted.sha256 == original.sha256


class Boom:
    """Unpickled the ordinary way, this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def hostile(path: Path, payload: Any, zipped: bool) -> None:
    torch.save(
        {"weights": {"blocks.input.w": torch.zeros(3)}, "x": payload}, path, _use_new_zipfile_serialization=zipped
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    file, trace = tmp_path / "encoder.pkl", tmp_path / "trace"
    hostile(file, Boom(trace), zipped)
    torch.load(file, weights_only=False)
    assert trace.exists(), "the payload is live"
    trace.rmdir()
    with pytest.raises(TokenizerError, match=r"refused.*mkdir"):
        load_tokenizer(file)
    assert not trace.exists()


def global_call(module: str, name: str, argument: str) -> bytes:
    """Protocol-4 pickle of name(argument) by STACK_GLOBAL, which may hold dotted names."""
    stream = io.BytesIO()
    stream.write(b"\x80\x04")
    for text in (module, name):
        stream.write(b"\x8c" + bytes([len(text)]) + text.encode())
    stream.write(b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R.")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("os", "system"),
        ("torch", "load"),
        ("torch.nn.modules.module", "os.system"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.hub", "load"),
        ("dall_e_evil", "run"),
        ("collections", "OrderedDict.fromkeys"),
    ],
)
def test_other_names_are_refused(tmp_path: Path, module: str, name: str) -> None:
    file = tmp_path / "encoder.pkl"
    trace = tmp_path / "trace"
    command = f"open({str(trace)!r}, 'w')"
    file.write_bytes(global_call(module, name, command))
    with pytest.raises(TokenizerError, match="refused"):
        read_tensors(file)
    assert not trace.exists()


def test_a_class_that_looks_like_a_layer_stays_inert(tmp_path: Path) -> None:
    """Names inside torch.nn are accepted, but neither imported nor called."""
    file = tmp_path / "encoder.pkl"
    before = set(sys.modules)
    file.write_bytes(global_call("torch.nn.no_such_module", "Layer", "x"))
    with pytest.raises(TokenizerError, match=r"not a file written by torch\.save"):
        read_tensors(file)
    assert set(sys.modules) == before


@pytest.mark.parametrize("stride", [0, 1])
def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path, stride: int) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            base = torch.zeros(4)
            return torch._utils._rebuild_tensor_v2, (base.untyped_storage(), 0, (1 << 40,), (stride,), False, {})

    file = tmp_path / "encoder.pth"
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, torch.UntypedStorage):
                return ("storage", torch.FloatStorage, "0", "cpu", 4)
            return None

    Pickler(buffer, protocol=2).dump({"w": Bad()})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(TokenizerError, match="beyond its storage"):
        read_tensors(file)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_files_end_in_one_clear_line(tmp_path: Path, zipped: bool) -> None:
    make_parts(tmp_path, zipped)
    whole = (tmp_path / "encoder.pkl").read_bytes()
    file = tmp_path / "cut" / "encoder.pkl"
    file.parent.mkdir()
    for length in (0, 1, 50, len(whole) // 3, len(whole) - 10):
        file.write_bytes(whole[:length])
        (tmp_path / "cut" / "encoder.pkl.sha256").unlink(missing_ok=True)
        with pytest.raises(TokenizerError) as caught:
            load_tokenizer(file)
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--2021-06-15 10:00:00--  https://cdn.openai.com/dall-e/encoder.pkl\nSaving to: 'encoder.pkl'\n", "wget -O"),
        ("\n<!DOCTYPE html><html>404</html>", "web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "encoder.pkl"),
    ],
)
def test_text_in_place_of_weights(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "encoder.pkl"
    file.write_text(text)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("encoder.2.0.bias"), "missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra does not belong"),
        (lambda t: t.update({"decoder.6.bias": torch.zeros(4)}), r"decoder\.6\.bias is \(4,\), expected \(3,\)"),
        (lambda t: t["encoder.6.weight"].view(-1)[5:6].fill_(float("nan")), "not finite"),
        (lambda t: t.pop("codebook.weight"), "holds neither"),
    ],
)
def test_structure_is_checked(tmp_path: Path, damage: Any, message: str) -> None:
    tensors = {k: v.clone() for k, v in DiscreteVAE(20, 4, 8).state_dict().items()}
    damage(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path / "bad.safetensors")


def test_official_discrete_vae_file(tmp_path: Path) -> None:
    """pytorch_model.bin: tensors under the key `weights`."""
    model = DiscreteVAE(20, 4, 8)
    torch.save({"weights": model.state_dict(), "hparams": {"num_layers": 3}}, tmp_path / "pytorch_model.bin")
    images = torch.rand(2, 3, 16, 24)
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert torch.equal(load_tokenizer(path).encode(images), model.encode(images))


def test_hash_at_first_use_and_after(tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.safetensors"
    save_file(DiscreteVAE(20, 4, 8).state_dict(), file)
    first = load_tokenizer(file)
    assert first.sha256 == sha256(file)
    assert first.sha256 in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"], "a file in somebody's folder"
    (record,) = (own_cache / "hashes").iterdir()
    assert record.read_text() == f"{first.sha256}  {file}\n"
    load_tokenizer(file)
    assert capsys.readouterr().err == ""
    save_file(DiscreteVAE(20, 4, 8).state_dict(), file)
    with pytest.raises(TokenizerError, match=rf"changed.*{first.sha256}.*delete {record}"):
        load_tokenizer(file)
    with pytest.raises(TokenizerError, match="demanded"):
        load_tokenizer(file, sha256=first.sha256)
    load_tokenizer(file, sha256=sha256(file).upper())  # a demand stands above what was kept
    record.unlink()
    load_tokenizer(file)
    Path(f"{file}.sha256").write_text(first.sha256)  # shipped with a file: it can refuse
    with pytest.raises(TokenizerError, match=rf"changed.*delete {file}.sha256"):
        load_tokenizer(file)


def test_a_hash_in_the_files_own_metadata_proves_nothing(tmp_path: Path) -> None:
    """Random weights that claim to be converted from the demanded file, the claim repeated in files beside them."""
    make_parts(tmp_path)
    published = sha256(tmp_path / "encoder.pkl")
    for part in ("encoder", "decoder"):
        (tmp_path / f"{part}.pkl").unlink()
    forged = tmp_path / "forged" / "encoder.safetensors"
    forged.parent.mkdir()
    save_file(DalleEncoder(8, 50).state_dict(), forged, metadata={"source_sha256": published})
    (forged.parent / "hashes").mkdir()
    (forged.parent / "hashes" / f"{sha256(forged)}.source").write_text(published)
    with pytest.raises(TokenizerError, match="not the demanded"):
        load_tokenizer(forged, sha256=published)
    assert load_tokenizer(forged).sha256 == sha256(forged)


def test_a_decoder_is_read_only_where_it_is_demanded_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_parts(tmp_path)
    encoder, decoder = (sha256(tmp_path / f"{part}.pkl") for part in ("encoder", "decoder"))
    assert load_tokenizer(tmp_path, sha256=encoder).decoder is None
    assert f"the decoder is left out: {tmp_path / 'decoder.pkl'} has sha256 {decoder}" in capsys.readouterr().err
    assert load_tokenizer(tmp_path, sha256=f"{encoder}, {decoder}").decoder is not None
    with pytest.raises(TokenizerError, match="not the demanded"):
        load_tokenizer(tmp_path, sha256=decoder)


def test_a_converted_copy_counts_only_with_the_record_of_its_conversion(tmp_path: Path, own_cache: Path) -> None:
    make_parts(tmp_path)
    published = sha256(tmp_path / "encoder.pkl")
    load._convert(tmp_path / "encoder.pkl", "encoder", SMALL["encoder"], published)
    copy = tmp_path / "encoder.safetensors"
    assert load_tokenizer(copy, sha256=published).sha256 == published
    (own_cache / "hashes" / f"{sha256(copy)}.source").unlink()
    with pytest.raises(TokenizerError, match="not the demanded"):
        load_tokenizer(copy, sha256=published)


def test_thousands_of_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    """8 MB in the file, 16 GB as tensors."""
    one = torch.zeros(1 << 21)
    torch.save({f"t{i}": one for i in range(2000)}, tmp_path / "encoder.pkl")
    with pytest.raises(TokenizerError, match="its tensors take 16,000 MiB, the file 8"):
        load_tokenizer(tmp_path / "encoder.pkl")


def test_unknown_names_and_the_random_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r'"demo", "dalle", "vqkd", "random"'):
        load_tokenizer("dall-e")
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    state = torch.get_rng_state()
    one, two = load_tokenizer("random"), load_tokenizer("random", dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.rand(1, 3, 64, 64)
    assert (one.vocab_size, one.stride) == (8192, 8)
    assert one.encode(images).shape == two.encode(images).shape == (1, 8, 8)
    assert two.head()[0].dtype == torch.float32


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`, honours Range unless told otherwise, and can break off after `cut` bytes per answer."""

    files: ClassVar[dict[str, bytes]] = {}
    ranges: ClassVar[bool] = True
    cut: ClassVar[int | None] = None
    log: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        requested = self.headers.get("Range")
        self.log.append((self.path, requested))
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        start = int(requested.removeprefix("bytes=").rstrip("-")) if requested and self.ranges else 0
        if start >= len(data) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return
        self.send_response(206 if requested and self.ranges else 200)
        if requested and self.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: self.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Handler.files, Handler.ranges, Handler.cut, Handler.log = {}, True, None, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


DATA = bytes(range(256)) * 40


def test_a_broken_connection_is_continued(server: str, tmp_path: Path) -> None:
    Handler.files, Handler.cut = {"/a.pkl": DATA}, 4000
    fetch(f"{server}/a.pkl", tmp_path / "a.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == DATA
    assert [r for _, r in Handler.log] == [None, "bytes=4000-", "bytes=8000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.pkl"]


def test_a_partial_file_of_an_earlier_process_is_continued(server: str, tmp_path: Path) -> None:
    Handler.files, Handler.cut = {"/a.pkl": DATA}, 0
    with pytest.raises(TokenizerError):  # brings nothing: gives up
        fetch(f"{server}/a.pkl", tmp_path / "a.pkl")
    (part,) = tmp_path.glob("a.pkl.*.part")
    part.write_bytes(DATA[:1234])
    Handler.cut, Handler.log = None, []
    fetch(f"{server}/a.pkl", tmp_path / "a.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == DATA
    assert Handler.log == [("/a.pkl", "bytes=1234-")]


@pytest.mark.parametrize("have", [len(DATA), len(DATA) + 5, 100])
def test_odd_partial_files(server: str, tmp_path: Path, have: int) -> None:
    """Complete already; longer than the file; and a server that knows no ranges."""
    Handler.files, Handler.cut = {"/a.pkl": DATA}, 0
    with pytest.raises(TokenizerError):
        fetch(f"{server}/a.pkl", tmp_path / "a.pkl")
    (part,) = tmp_path.glob("a.pkl.*.part")
    part.write_bytes((DATA + b"surplus")[:have])
    Handler.cut, Handler.ranges = None, have != 100
    fetch(f"{server}/a.pkl", tmp_path / "a.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == DATA


def test_dalle_from_mirrors(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    encoder, _ = make_parts(source)
    good = (source / "encoder.pkl").read_bytes()
    Handler.files = {"/broken/encoder.pkl": good[:-100], "/good/encoder.pkl": good}
    mirrors = {"encoder": (f"{server}/gone/encoder.pkl", f"{server}/broken/encoder.pkl", f"{server}/good/encoder.pkl")}
    tokenizer = load._load_dalle(cache, None, False, mirrors, SMALL)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(tokenizer.encode(images), DalleTokenizer(encoder).encode(images))
    assert tokenizer.sha256 == sha256(source / "encoder.pkl")
    assert tokenizer.sha256 in capsys.readouterr().err
    Handler.log = []
    again = load._load_dalle(cache, tokenizer.sha256, False, mirrors, SMALL)
    assert Handler.log == [], "the second time comes from the cache"
    assert again.sha256 == tokenizer.sha256
    with pytest.raises(TokenizerError, match="demanded"):
        load._load_dalle(cache, "0" * 64, False, mirrors, SMALL)
    with (cache / "encoder.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(TokenizerError, match="changed since its first use"):
        load._load_dalle(cache, None, False, mirrors, SMALL)


def test_dalle_demanded_hash_is_checked_before_use(server: str, tmp_path: Path) -> None:
    make_parts(tmp_path)
    Handler.files = {"/encoder.pkl": (tmp_path / "encoder.pkl").read_bytes()}
    with pytest.raises(TokenizerError, match="not the demanded"):
        load._load_dalle(tmp_path / "cache", "0" * 64, False, {"encoder": (f"{server}/encoder.pkl",)}, SMALL)
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_dalle_of_another_size_is_refused(server: str, tmp_path: Path) -> None:
    make_parts(tmp_path)
    Handler.files = {"/encoder.pkl": (tmp_path / "encoder.pkl").read_bytes()}
    with pytest.raises(TokenizerError, match="53,786,240"):
        load._load_dalle(tmp_path / "cache", None, False, {"encoder": (f"{server}/encoder.pkl",)})


def test_offline_names_the_file_and_its_place(tmp_path: Path) -> None:
    mirrors = {"encoder": ("http://127.0.0.1:9/dall-e/encoder.pkl",)}
    with pytest.raises(TokenizerError) as caught:
        load._load_dalle(tmp_path, None, False, mirrors, SMALL)
    assert "http://127.0.0.1:9/dall-e/encoder.pkl" in str(caught.value)
    assert f"at {tmp_path / 'encoder.pkl'}" in str(caught.value)
    assert "\n" not in str(caught.value)
    make_parts(tmp_path)  # put there by hand, as told
    tokenizer = load._load_dalle(tmp_path, None, True, mirrors | {"decoder": ()}, SMALL)
    assert tokenizer.decode(tokenizer.encode(torch.rand(1, 3, 16, 16))).shape == (1, 3, 16, 16)
    assert (tmp_path / "encoder.pkl").exists()


def test_vqkd_is_fetched_and_checked_by_its_name(server: str, tmp_path: Path) -> None:
    model = VqkdTokenizer(8, 4, 6, 64, 1, 1, 2, 8)
    torch.save({"model": model.state_dict()}, tmp_path / "file.pth")
    data = (tmp_path / "file.pth").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    good, wrong = f"/vqkd-{digest[:8]}.pth", "/vqkd-00000000.pth"
    Handler.files = {good: data, wrong: data}
    tokenizer = load._load_vqkd(tmp_path / "cache", None, server + good)
    assert (tokenizer.sha256, tokenizer.vocab_size) == (digest, 8)
    Handler.files = {}
    assert load._load_vqkd(tmp_path / "cache", digest, server + good).sha256 == digest, "kept"
    Handler.files = {wrong: data}
    with pytest.raises(TokenizerError, match=f"has sha256 {digest}, which does not start with 00000000. Without a net"):
        load._load_vqkd(tmp_path / "cache", None, server + wrong)
    assert [path.name for path in (tmp_path / "cache").glob("vqkd-*")] == [good[1:]]
