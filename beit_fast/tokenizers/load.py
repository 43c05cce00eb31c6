"""Find, verify and load a tokenizer: the demo, DALL-E's published files, or a file of one's own."""

import hashlib
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from beit_fast.tokenizers.base import Tokenizer, TokenizerError
from beit_fast.tokenizers.dalle import DalleDecoder, DalleEncoder, DalleTokenizer
from beit_fast.tokenizers.discrete_vae import DiscreteVAE
from beit_fast.tokenizers.download import default_cache_dir, exclusive, fetch
from beit_fast.tokenizers.unpickle import read_tensors

__all__ = ["MIRRORS", "convert_pickle", "load_tokenizer"]

DEMO_PATH = Path(__file__).parent / "weights" / "demo.safetensors"
MIRRORS: dict[str, tuple[str, ...]] = {
    "encoder": (
        "https://cdn.openai.com/dall-e/encoder.pkl",
        "https://conversationhub.blob.core.windows.net/beit-share-public/dall-e_vae/encoder.pkl",
        "https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/dalle_encoder.pth",
    ),
    "decoder": (
        "https://cdn.openai.com/dall-e/decoder.pkl",
        "https://conversationhub.blob.core.windows.net/beit-share-public/dall-e_vae/decoder.pkl",
    ),
}
_DALLE_PARAMETERS = {"encoder": 53_786_240, "decoder": 43_829_766}
_SUFFIXES = (".safetensors", ".pkl", ".pth")


def load_tokenizer(
    name_or_path: str | Path,
    *,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    decoder: bool = False,
) -> Tokenizer:
    """A tokenizer in evaluation mode, without gradients.

    name_or_path: "demo", the small tokenizer that comes with beit_fast; "dalle", fetched into the cache at first use;
        "random", an untrained one, always the same; or a path: `.safetensors`, `encoder.pkl` / `decoder.pkl` of DALL-E
        (each finds the other beside it), `.pth` / `.bin` state dicts, a folder with such files.
    sha256: demand this hash of the file (for "dalle": of the published encoder file). Without it, the hash is printed
        and stored beside the file at first use, and compared from then on.
    cache_dir: where "dalle" lives; default `$BEIT_FAST_CACHE` or `~/.cache/beit_fast`.
    dtype: of the convolutions; the output convolution stays float32. Default: DALL-E float16 on a GPU as in the
        original, else float32.
    decoder: fetch DALL-E's decoder too, for `decode`.
    Raises TokenizerError.
    """
    name = str(name_or_path)
    if name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokenizer: Tokenizer = DiscreteVAE(codebook_dim=16, hidden_dim=32)
    elif name == "dalle":
        folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        tokenizer = _load_dalle(folder / "dalle", sha256, decoder)
    else:
        path = DEMO_PATH if name == "demo" else Path(name_or_path).expanduser()
        if not path.exists():
            raise TokenizerError(
                f'tokenizer {name!r} not found: give "demo", "dalle", "random" or the path of an existing file'
            )
        tokenizer = _load_folder(path, sha256) if path.is_dir() else _load_file(path, sha256)
    tokenizer.name = name
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float16 if isinstance(tokenizer, DalleTokenizer) and device.type == "cuda" else torch.float32
    assert isinstance(tokenizer, (DalleTokenizer, DiscreteVAE))
    return tokenizer.to_precision(dtype).to(device).eval().requires_grad_(False)


def convert_pickle(source: Path, destination: Path) -> None:
    """Write the tensors of a pickled DALL-E part, checked, as safetensors; the source's hash goes into the metadata."""
    tensors = read_tensors(source)
    _build(tensors, source)
    metadata = {"source": source.name, "source_sha256": _hash(source)}
    temporary = destination.with_name(f"{destination.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, destination)


def _read(path: Path, sha256: str | None) -> tuple[dict[str, Tensor], str]:
    """Tensors and the hash that identifies them: the file's own, or that of the pickle it was converted from."""
    if not path.is_file():
        raise TokenizerError(f"{path} is not a file")
    try:
        digest = _hash(path)
        if path.suffix != ".safetensors":
            _verify(path, digest, digest, sha256)
            return read_tensors(path), digest
        with safe_open(path, framework="pt") as file:
            source = (file.metadata() or {}).get("source_sha256", digest)
            _verify(path, digest, source, sha256)
            return {name: file.get_tensor(name) for name in file.keys()}, source  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise TokenizerError(f"{path} is not a readable safetensors file ({error}). Fetch it again.") from error
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from error


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, digest: str, source: str, demanded: str | None) -> None:
    """Compare with the demanded hash, or with the one stored in `<file>.sha256`; store it at first use."""
    sidecar = path.with_name(f"{path.name}.sha256")
    known = sidecar.read_text().split()[:1] if sidecar.exists() else []
    if demanded is not None:
        if demanded.strip().lower() not in (digest, source):
            raise TokenizerError(f"{path} has sha256 {source}, not the demanded {demanded}: fetch it again")
    elif known and known[0] != digest:
        raise TokenizerError(
            f"{path} has changed since its first use: sha256 {digest}, before {known[0]}. "
            f"If you replaced it on purpose, delete {sidecar}"
        )
    if known != [digest]:
        try:
            temporary = sidecar.with_name(f"{sidecar.name}.{os.getpid()}.tmp")
            temporary.write_text(f"{digest}  {path.name}\n")
            os.replace(temporary, sidecar)
            where = f"stored in {sidecar.name}"
        except OSError:
            where = "not stored: the folder is read-only"
        print(f"tokenizer {path}: sha256 {digest} (first use, {where})", file=sys.stderr)


def _load_file(path: Path, sha256: str | None) -> Tokenizer:
    tensors, digest = _read(path, sha256)
    model = _build(tensors, path)
    tokenizer: Tokenizer
    if isinstance(model, DiscreteVAE):
        tokenizer = model
    else:
        other = "decoder" if isinstance(model, DalleEncoder) else "encoder"
        beside = _part_file(path.parent, other)
        partner = _build(_read(beside, None)[0], beside) if beside is not None else None
        encoder, decoder = (model, partner) if other == "decoder" else (partner, model)
        if not (isinstance(encoder, DalleEncoder | None) and isinstance(decoder, DalleDecoder | None)):
            raise TokenizerError(f"{path} and {beside} are the same part: one of them must be the {other}")
        tokenizer = DalleTokenizer(encoder, decoder)
    tokenizer.sha256 = digest
    return tokenizer


def _part_file(folder: Path, part: str) -> Path | None:
    names = [f"{prefix}{part}{suffix}" for suffix in _SUFFIXES for prefix in ("", "dalle_")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _load_folder(folder: Path, sha256: str | None) -> Tokenizer:
    found = _part_file(folder, "encoder") or next((p for p in sorted(folder.glob("*.safetensors"))), None)
    if found is None and (folder / "pytorch_model.bin").is_file():
        found = folder / "pytorch_model.bin"
    if found is None:
        raise TokenizerError(f"{folder} holds no tokenizer: put encoder.pkl, a .safetensors or pytorch_model.bin there")
    return _load_file(found, sha256)


def _load_dalle(
    folder: Path,
    sha256: str | None,
    decoder: bool,
    mirrors: dict[str, tuple[str, ...]] = MIRRORS,
    parameters: dict[str, int] = _DALLE_PARAMETERS,
) -> Tokenizer:
    with exclusive(folder):
        for part in ("encoder", "decoder") if decoder else ("encoder",):
            _provide(folder, part, mirrors[part], parameters[part], sha256 if part == "encoder" else None)
    return _load_file(folder / "encoder.safetensors", sha256)


def _provide(folder: Path, part: str, mirrors: tuple[str, ...], parameters: int, sha256: str | None) -> None:
    """See to it that `folder` has `{part}.safetensors`: from a file put there by hand, or a mirror."""
    converted = folder / f"{part}.safetensors"
    if converted.is_file():
        return
    by_hand = _part_file(folder, part)
    if by_hand is not None:
        _convert(by_hand, converted, part, parameters, sha256)
        return
    reasons = []
    for url in mirrors:
        fetched = folder / f"fetched_{part}{Path(url).suffix}"
        try:
            fetch(url, fetched)
            _convert(fetched, converted, part, parameters, sha256)
            return
        except TokenizerError as error:
            reasons.append(str(error))
        finally:
            fetched.unlink(missing_ok=True)
    raise TokenizerError(
        f"the DALL-E {part} could not be fetched. Without a network: put the file {mirrors[0]} at "
        f"{folder / Path(mirrors[0]).name}. Tried: {'; '.join(reasons)}"
    )


def _convert(source: Path, destination: Path, part: str, parameters: int, sha256: str | None) -> None:
    digest = _hash(source)
    if sha256 is not None and sha256.strip().lower() != digest:
        raise TokenizerError(f"{source.name} has sha256 {digest}, not the demanded {sha256}")
    model = _build(read_tensors(source), source)
    if not isinstance(model, DalleEncoder if part == "encoder" else DalleDecoder):
        raise TokenizerError(f"{source.name} is not the {part} of DALL-E but a {type(model).__name__}")
    count = sum(p.numel() for p in model.parameters())
    if count != parameters:
        raise TokenizerError(f"{source.name} has {count:,} parameters; the published {part} has {parameters:,}")
    print(f"DALL-E {part}: sha256 {digest}", file=sys.stderr)
    convert_pickle(source, destination)


def _build(tensors: dict[str, Tensor], where: Path) -> "DalleEncoder | DalleDecoder | DiscreteVAE":
    """The module these tensors belong to, loaded; sizes come from the shapes, all the rest is checked."""
    for prefix in ("module.", "encoder.", "decoder."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):
            model = _skeleton(tensors)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise TokenizerError(f"{where} is not a tokenizer beit_fast knows: a required tensor is malformed") from error
    if model is None:
        some = ", ".join(sorted(tensors)[:3])
        raise TokenizerError(f"{where} holds neither DALL-E's dVAE nor a DiscreteVAE, but {some}, ...")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(expected.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - expected.keys())
    wrong = [name for name in expected if name in tensors and tuple(tensors[name].shape) != expected[name]]
    problems = [
        *(f"{name} is missing" for name in missing[:1]),
        *(f"{name} does not belong there" for name in surplus[:1]),
        *(f"{name} is {tuple(tensors[name].shape)}, expected {expected[name]}" for name in wrong[:1]),
        *(
            f"{name} holds values that are not finite numbers"
            for name, tensor in tensors.items()
            if not (tensor.is_floating_point() and bool(tensor.isfinite().all()))
        ),
    ]
    if problems:
        amount = f"{len(expected)} tensors expected, {len(tensors)} found"
        raise TokenizerError(f"{where} is damaged: {problems[0]} ({amount}). Fetch it again.")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model


def _skeleton(tensors: dict[str, Tensor]) -> "DalleEncoder | DalleDecoder | DiscreteVAE | None":
    if "codebook.weight" in tensors:
        vocab, dim = tensors["codebook.weight"].shape
        layers = sum(
            name.startswith("encoder.") and name.endswith(".0.weight") and name.count(".") == 3 for name in tensors
        )
        return DiscreteVAE(vocab, dim, tensors["encoder.0.0.weight"].shape[0], layers)
    if "blocks.input.w" in tensors:
        entry, out = tensors["blocks.input.w"].shape, tensors["blocks.output.conv.w"].shape
        blocks = sum(name.startswith("blocks.group_1.") and name.endswith("res_path.conv_1.w") for name in tensors)
        if entry[1] == 3:
            return DalleEncoder(entry[0], out[0], blocks)
        return DalleDecoder(entry[0], out[1], entry[1], blocks)
    return None
