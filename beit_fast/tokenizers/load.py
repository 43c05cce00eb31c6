"""Find, verify and load a tokenizer: the demo, DALL-E's published files, or a file of the user's."""

import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from beit_fast.network import is_reachable
from beit_fast.tokenizers.base import Tokenizer, TokenizerError
from beit_fast.tokenizers.dalle import DalleDecoder, DalleEncoder, DalleTokenizer
from beit_fast.tokenizers.discrete_vae import DiscreteVAE
from beit_fast.tokenizers.download import default_cache_dir, exclusive, fetch
from beit_fast.tokenizers.unpickle import read_tensors

__all__ = ["MIRRORS", "load_tokenizer"]

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
VQKD_URL = (
    "https://github.com/addf400/files/releases/download/BEiT-v2/vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth"
)
"""The tokenizer of the released BEiT v2 models: decoder of 3 blocks, CLIP ViT-B/16 the teacher."""
_DALLE_PARAMETERS = {"encoder": 53_786_240, "decoder": 43_829_766}
_LARGEST = 4 << 30  # bytes
_VQKD = "quantize.embedding.weight"
"""A tensor that only the files of BEiT v2's tokenizer hold."""
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
    """Load a tokenizer in evaluation mode, without gradients.

    Args:
        name_or_path: "demo", the small tokenizer that comes with beit_fast; "dalle", and "vqkd", that of BEiT v2,
            fetched into the cache at first use; "random", an untrained one, always the same; or a path:
            `.safetensors`, `encoder.pkl` / `decoder.pkl` of DALL-E (each finds the other in its folder), `.pth` /
            `.bin` state dicts, BEiT v2's tokenizer among them, a folder with such files.
        sha256: the hash that the file must have; of encoder and decoder, separated by a comma, where both are read (a
            decoder that is not demanded is left out). For "dalle": of the published files. None: the hash is printed
            and kept in the cache at first use, and compared from then on.
        cache_dir: where "dalle" and "vqkd" are kept; None: `$BEIT_FAST_CACHE` or `~/.cache/beit_fast`.
        device: where the tokenizer runs.
        dtype: of the convolutions; the output convolution stays float32. None: float16 for DALL-E on a GPU, as in the
            original, else float32.
        decoder: fetch DALL-E's decoder too, for `decode`.

    Returns:
        A `Tokenizer`: `encode` gives int64 ids (B, h, w), or (M,) at the positions of a mask; `decode` gives images
        (B, 3, H, W) in [0, 1], where the tokens stand for pixels.

    Raises:
        TokenizerError: the tokenizer cannot be found, fetched, verified or read.

    Examples:
        >>> import torch
        >>> from beit_fast.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer("demo")
        >>> ids = tokenizer.encode(torch.rand(2, 3, 112, 112))
        >>> ids.shape, ids.dtype, tokenizer.vocab_size
        (torch.Size([2, 14, 14]), torch.int64, 8192)
        >>> tokenizer.decode(ids).shape
        torch.Size([2, 3, 112, 112])
    """
    name = str(name_or_path)
    tokenizer: Tokenizer
    if name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokenizer = DiscreteVAE(codebook_dim=16, hidden_dim=32)
    elif name == "dalle":
        folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        tokenizer = _load_dalle(folder / "dalle", sha256, decoder)
    elif name == "vqkd":
        folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        tokenizer = _load_vqkd(folder / "vqkd", sha256)
    else:
        path = DEMO_PATH if name == "demo" else Path(name_or_path).expanduser()
        if not path.exists():
            raise TokenizerError(
                f'tokenizer {name!r} not found: give "demo", "dalle", "vqkd", "random" or the path of an existing file'
            )
        tokenizer = _load_file(_file_in(path) if path.is_dir() else path, sha256)
    tokenizer.name = name
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float16 if isinstance(tokenizer, DalleTokenizer) and device.type == "cuda" else torch.float32
    return tokenizer.to_precision(dtype).to(device).eval().requires_grad_(False).prepare()


def untrained(name: str, device: torch.device, dtype: torch.dtype) -> Tokenizer:
    """The tokenizer "dalle" or "vqkd" without its weights: as large and as fast, for plans."""
    tokenizer: Tokenizer
    if name == "vqkd":
        from beit_fast.tokenizers.vqkd import VqkdTokenizer

        tokenizer = VqkdTokenizer()
    else:
        tokenizer = DalleTokenizer(DalleEncoder())
    return tokenizer.to_precision(dtype).to(device).eval().requires_grad_(False).prepare()


def _bytes_of(path: Path) -> bytes:
    """The whole file: what is hashed is what is read."""
    if not path.is_file():
        raise TokenizerError(f"{path} is not a file; give the path of a tokenizer's file")
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise TokenizerError(f"{path} has {size >> 20:,} MiB, more than any tokenizer; give a tokenizer's file")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from error


def _demanded(sha256: str | None) -> set[str]:
    """The hashes in a demand: one, or several separated by commas."""
    return {word.strip().lower() for word in (sha256 or "").split(",")} - {""}


def _read(path: Path, demanded: set[str]) -> tuple[dict[str, Tensor], str]:
    """Tensors and the hash that identifies them: the file's own, or that of the file it was converted from here."""
    data = _bytes_of(path)
    digest = hashlib.sha256(data).hexdigest()
    source = _record(digest + ".source") or digest
    first_use = not demanded and _is_first_use(path, digest)
    if demanded and not demanded & {digest, source}:
        raise TokenizerError(
            f"{path} has sha256 {digest}, not the demanded {', '.join(sorted(demanded))}: fetch it again"
        )
    if path.suffix != ".safetensors":
        tensors = read_tensors(path, data)
    else:
        try:
            tensors = load_safetensors(data)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise TokenizerError(f"{path} is not a readable safetensors file ({reason}). Fetch it again.") from error
    if first_use:  # a file that could be read
        kept = _keep_record(_first_use_record(path), digest, os.path.abspath(path))
        print(f"tokenizer {path}: sha256 {digest} (first use, {'kept' if kept else 'not kept'})", file=sys.stderr)
    return tensors, source


def _record_path(name: str) -> Path:
    """Where hashes are kept: in the user's cache, never in the folder of the file that they are of."""
    return default_cache_dir() / "hashes" / name


def _record(name: str) -> str | None:
    """The hash in a record; None where there is none."""
    try:
        return next(iter(_record_path(name).read_text().split()), None)
    except (OSError, ValueError):
        return None


def _keep_record(name: str, digest: str, about: str) -> bool:
    """Write a record of one line; False where the cache cannot be written."""
    try:
        path = _record_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(f"{digest}  {about}\n", errors="surrogateescape")
        os.replace(temporary, path)
    except (OSError, ValueError):
        return False
    return True


def _first_use_record(path: Path) -> str:
    """Name of the record of a file's hash at first use."""
    return hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]


def _is_first_use(path: Path, digest: str) -> bool:
    """Whether no hash of the file is known; compares with what was kept at first use or shipped as `<file>.sha256`."""
    name = _first_use_record(path)
    beside = path.with_name(f"{path.name}.sha256")
    shipped = next(iter(beside.read_text(errors="replace").split()), None) if beside.is_file() else None
    for kept_in, known in ((beside, shipped), (None, kept_before := _record(name))):
        if known not in (None, digest):
            raise TokenizerError(
                f"{path} has changed since its first use: sha256 {digest}, before {known}. "
                f"If you replaced it on purpose, delete {kept_in or _record_path(name)}"
            )
    return shipped is None and kept_before is None


def _load_file(path: Path, sha256: str | None) -> Tokenizer:
    demanded = _demanded(sha256)
    tensors, digest = _read(path, demanded)
    model = _build(tensors, path)
    if isinstance(model, Tokenizer):
        tokenizer = model
    else:
        parts: list[nn.Module] = [model]
        other = "decoder" if isinstance(model, DalleEncoder) else "encoder"
        if (other_file := _part_file(path.parent, other)) is not None:
            try:
                parts.append(_build(_read(other_file, demanded)[0], other_file))
            except TokenizerError as error:
                if not demanded:
                    raise
                print(f"the {other} is left out: {error}; demand its hash too, after a comma", file=sys.stderr)
        encoders = [part for part in parts if isinstance(part, DalleEncoder)]
        decoders = [part for part in parts if isinstance(part, DalleDecoder)]
        if len(encoders) > 1 or len(decoders) > 1:
            raise TokenizerError(f"{path} and {other_file} are the same part: one of them must be the {other}")
        tokenizer = DalleTokenizer(encoders[0] if encoders else None, decoders[0] if decoders else None)
    tokenizer.sha256 = digest
    return tokenizer


def _part_file(folder: Path, part: str) -> Path | None:
    names = [f"{prefix}{part}{suffix}" for suffix in _SUFFIXES for prefix in ("", "dalle_")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _file_in(folder: Path) -> Path:
    """The tokenizer's file in a folder."""
    candidates = (_part_file(folder, "encoder"), *sorted(folder.glob("*.safetensors")), folder / "pytorch_model.bin")
    for path in candidates:
        if path is not None and path.exists():
            return path
    raise TokenizerError(f"{folder} holds no tokenizer: put encoder.pkl, a .safetensors or pytorch_model.bin there")


def _load_dalle(
    folder: Path,
    sha256: str | None,
    decoder: bool,
    mirrors: dict[str, tuple[str, ...]] = MIRRORS,
    parameters: dict[str, int] = _DALLE_PARAMETERS,
) -> Tokenizer:
    with exclusive(folder):
        for part in ("encoder", "decoder") if decoder else ("encoder",):
            if not (folder / f"{part}.safetensors").is_file():
                _provide(folder, part, mirrors[part], parameters[part], sha256)
    return _load_file(folder / "encoder.safetensors", sha256)


def _load_vqkd(folder: Path, sha256: str | None, url: str = VQKD_URL) -> Tokenizer:
    """BEiT v2's published tokenizer, fetched unless it is there; its name ends in the start of its hash."""
    path = folder / url.rsplit("/", 1)[1]
    by_hand = f"Without a network: put the file {url} at {path}"
    with exclusive(folder):
        if not path.is_file():
            if not is_reachable(url):
                raise TokenizerError(
                    f"BEiT v2's tokenizer could not be fetched: its server cannot be reached. {by_hand}"
                )
            fetch(url, partial := path.with_suffix(".fetched"))
            digest, start = hashlib.sha256(_bytes_of(partial)).hexdigest(), path.stem.rsplit("-", 1)[1]
            if not digest.startswith(start):
                partial.unlink()
                raise TokenizerError(f"{url} has sha256 {digest}, which does not start with {start}. {by_hand}")
            os.replace(partial, path)
    return _load_file(path, sha256)


def _provide(folder: Path, part: str, mirrors: tuple[str, ...], parameters: int, sha256: str | None) -> None:
    """Make `{part}.safetensors` in `folder` from a file that the user put there, or from a mirror."""
    if (by_hand := _part_file(folder, part)) is not None:
        return _convert(by_hand, part, parameters, sha256)
    reasons = []
    for url in mirrors:
        if not is_reachable(url):
            reasons.append(f"{url}: its server cannot be reached")
            continue
        fetched = folder / f"fetched_{part}{Path(url).suffix}"
        try:
            fetch(url, fetched)
            return _convert(fetched, part, parameters, sha256)
        except TokenizerError as error:
            reasons.append(str(error))
        finally:
            fetched.unlink(missing_ok=True)
    raise TokenizerError(
        f"the DALL-E {part} could not be fetched. Without a network: put the file {mirrors[0]} at "
        f"{folder / Path(mirrors[0]).name}. Tried: {'; '.join(reasons)}"
    )


def _convert(source: Path, part: str, parameters: int, sha256: str | None) -> None:
    """Write the tensors of a DALL-E part, checked, as `{part}.safetensors`; the cache records what it was made of.

    Raises:
        TokenizerError: it is another part, of another size, or its hash is not a demanded one.
    """
    data = _bytes_of(source)
    digest = hashlib.sha256(data).hexdigest()
    if (demanded := _demanded(sha256)) and digest not in demanded:
        raise TokenizerError(f"{source.name} has sha256 {digest}, not the demanded {sha256}: fetch it again")
    model = _build(tensors := read_tensors(source, data), source)
    if not isinstance(model, DalleEncoder if part == "encoder" else DalleDecoder):
        raise TokenizerError(f"{source.name} is not the {part} of DALL-E but a {type(model).__name__}: fetch it again")
    count = sum(p.numel() for p in model.parameters())
    if count != parameters:
        raise TokenizerError(
            f"{source.name} has {count:,} parameters; the published {part} has {parameters:,}: fetch it again"
        )
    print(f"DALL-E {part}: sha256 {digest}", file=sys.stderr)
    converted = save_safetensors(tensors, metadata={"source": source.name})
    temporary = source.with_name(f"{part}.{os.getpid()}.tmp")
    temporary.write_bytes(converted)
    _keep_record(f"{hashlib.sha256(converted).hexdigest()}.source", digest, source.name)
    os.replace(temporary, source.with_name(f"{part}.safetensors"))


def _build(tensors: dict[str, Tensor], path: Path) -> DalleEncoder | DalleDecoder | Tokenizer:
    """The module these tensors belong to, loaded; sizes come from the shapes, all the rest is checked."""
    for prefix in ("module.", "encoder.", "decoder."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if _VQKD in tensors:  # a run of the official code keeps its teacher as well
        tensors = {name: t for name, t in tensors.items() if not name.startswith(("teacher", "scaling", "loss"))}
    try:
        with torch.device("meta"):
            model = _skeleton(tensors)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise TokenizerError(f"{path} is not a tokenizer beit_fast knows: a required tensor is malformed") from error
    if model is None:
        some = ", ".join(sorted(tensors)[:3])
        raise TokenizerError(
            f"{path} holds neither DALL-E's dVAE nor a DiscreteVAE nor BEiT v2's tokenizer, but {some}, ..."
        )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problem = next(_problems(expected, tensors), None)
    if problem is not None:
        amount = f"{len(expected)} tensors expected, {len(tensors)} found"
        raise TokenizerError(f"{path} is damaged: {problem} ({amount}). Fetch it again.")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model


def _problems(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> Iterator[str]:
    for name in sorted(expected.keys() - tensors.keys()):
        yield f"{name} is missing"
    for name in sorted(tensors.keys() - expected.keys()):
        yield f"{name} does not belong there"
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            yield f"{name} is {tuple(tensor.shape)}, expected {expected[name]}"
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
            yield f"{name} holds values that are not finite numbers"


def _skeleton(tensors: dict[str, Tensor]) -> DalleEncoder | DalleDecoder | Tokenizer | None:
    if _VQKD in tensors:
        from beit_fast.tokenizers.vqkd import VqkdTokenizer  # with its Transformers: not for those who do not use it

        depths = {name.split(".")[0] + name.split(".")[2] for name in tensors if name.endswith(".attn.qkv.weight")}
        depth, decoder_depth = (sum(name.startswith(part) for name in depths) for part in ("encoder", "decoder"))
        width, _, patch_size, _ = tensors["encoder.patch_embed.proj.weight"].shape
        grid = math.isqrt(tensors["encoder.pos_embed"].shape[1] - 1)
        teacher_dim = len(tensors["decode_task_layer.2.bias"])
        vocab_size, code_dim = tensors[_VQKD].shape
        return VqkdTokenizer(vocab_size, code_dim, teacher_dim, width, depth, decoder_depth, grid, patch_size)
    if "codebook.weight" in tensors:
        vocab, dim = tensors["codebook.weight"].shape
        layers = sum(re.fullmatch(r"encoder\.\d+\.0\.weight", name) is not None for name in tensors)
        width, channels = tensors["encoder.0.0.weight"].shape[:2]
        return DiscreteVAE(vocab, dim, width, layers, channels)
    if "blocks.input.w" in tensors:
        entry, out = tensors["blocks.input.w"].shape, tensors["blocks.output.conv.w"].shape
        blocks = sum(name.startswith("blocks.group_1.") and name.endswith("res_path.conv_1.w") for name in tensors)
        if entry[1] == 3:
            return DalleEncoder(entry[0], out[0], blocks)
        return DalleDecoder(entry[0], out[1], entry[1], blocks)
    return None
