"""Untrusted files: valid ones, mutated ones, and those made to take memory, time or control."""

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from beit_fast.models import Beit, BeitConfig
from beit_fast.tokenizers.dalle_networks import DalleEncoder
from beit_fast.tokenizers.discrete_vae import DiscreteVAE

SMALL = BeitConfig.from_preset("tiny", image_size=32, patch_size=8, width=32, depth=2, num_heads=2)
CONFIG = SMALL.for_classification(5)


class Runs:
    """Unpickled the ordinary way, this makes the file that the variable names."""

    def __reduce__(self):
        return os.system, ("touch " + os.environ["BEIT_FAST_HOSTILE_MARK"],)


def mutated(data, rng):
    """Bytes with up to eight changes: bits, runs of zeros or ones, pieces lost, doubled or moved, numbers made huge."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 600))
        size = rng.choice((1, 4, 8, 64, 512))
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif kind == 2:
            data[at : at + size] = b"\xff" * len(data[at : at + size])
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size]
        elif kind == 5:
            del data[at:]
        else:
            data[at : at + 8] = struct.pack(rng.choice(("<q", ">q")), rng.choice((-1, 1 << 31, 1 << 40, (1 << 63) - 1)))
    return bytes(data)


def torch_file(value, zipped=True):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def weights():
    torch.manual_seed(0)
    return {name: tensor.detach() for name, tensor in Beit(CONFIG).state_dict().items()}


def safetensors_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def raw_pickle_zip(pickled, storages=()):
    """A file of torch.save around any bytes in place of its pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for number, storage in enumerate(storages):
            archive.writestr(f"archive/data/{number}", storage)
    return file.getvalue()


def crafted_checkpoints():
    """(reader, files by name): what somebody wrote by hand."""
    base, one = weights(), torch.zeros(1 << 21)
    deep = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
    config = {"library_name": "beit_fast", "model_class": "Beit", **vars_of(CONFIG)}
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    whole = save(base)
    folder = {"model.safetensors": whole}
    yield "weights", {"w.pth": torch_file({f"t{i}": one for i in range(2000)})}
    yield "tokenizer", {"encoder.pkl": torch_file({f"t{i}": one for i in range(2000)})}
    yield "weights", {"w.safetensors": safetensors_file(deep)}
    yield "tokenizer", {"w.safetensors": safetensors_file(deep)}
    for depth in (
        deep,
        b"[" * 200_000,
        b'{"library_name": "beit_fast", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    ):
        yield "folder", folder | {"config.json": depth}
    for field, value in [
        ("width", 65_536), ("width", 1 << 40), ("depth", 1_000_000), ("num_classes", 1 << 40), ("vocab_size", 1 << 40),
        ("image_size", 1 << 20), ("image_size", [1 << 20, 1 << 20]), ("mlp_ratio", 1e12), ("mlp_ratio", None),
        ("patch_size", 0), ("num_heads", -2), ("width", "768"), ("image_size", "x"), ("image_size", [32]),
        ("in_chans", 1 << 30), ("drop_path_rate", "a"), ("layer_norm_eps", "b"), ("surprise", 1),
    ]:  # fmt: skip
        yield "folder", folder | {"config.json": json.dumps(config | {field: value}).encode()}
    for values in (
        {"model_type": "beit", "hidden_size": 65_536, "num_attention_heads": 16},
        {"model_type": "beit", "hidden_size": 0},
        {"model_type": "beit", "id2label": 3}, {"architecture": "beit_base_patch16_224", "model_args": 5},
        {"architecture": "beit_base_patch16_224", "model_args": {"width": 65_536}}, {"architecture": 7}, [], 5, None,
    ):  # fmt: skip
        yield "folder", folder | {"config.json": json.dumps(values).encode()}
    for header in (
        {"w": entry | {"shape": [5]}}, {"w": entry | {"shape": [1 << 62, 1 << 62]}}, {"w": entry | {"shape": [-4]}},
        {"w": entry | {"dtype": "F999"}}, {"w": entry | {"data_offsets": [16, 0]}}, {"w": entry, "v": entry},
        {"w": entry | {"data_offsets": [0, 1 << 60]}}, {"w": 5}, [1], {"w": entry | {"shape": "4"}},
        {"__metadata__": {"a": 1}, "w": entry}, b"\xff" * 64, b"", b"{" * 64,
    ):  # fmt: skip
        yield "weights", {"w.safetensors": safetensors_file(header, bytes(16))}
        yield "tokenizer", {"w.safetensors": safetensors_file(header, bytes(16))}
    wrong = {name: (tensor[..., None] if name.endswith("qkv.weight") else tensor) for name, tensor in base.items()}
    for state in (wrong, {n: t.flatten() for n, t in base.items()}, {n: t[:0] for n, t in base.items()},
                  {n: t.to(torch.int64) for n, t in base.items()}):  # fmt: skip
        yield "weights", {"w.safetensors": save({n: t.contiguous() for n, t in state.items()})}
        yield "weights", {"w.pth": torch_file(state)}
    for zipped in (True, False):
        for name in ("weights", "tokenizer"):
            yield name, {"encoder.pkl": torch_file({"weights": {"w": torch.zeros(2)}, "x": Runs()}, zipped)}
            yield name, {"encoder.pkl": torch_file({"model": Nested(20_000).value}, zipped=False)}
    for bad in (
        pickle.dumps(Runs()), b"\x80\x02r\xff\xff\xff\x7f.", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc",
        b"\x80\x02" + b"(" * 300_000 + b".", b"\x80\x02" + b"]" + b"q\x00h\x00a" * 100_000 + b".",
        b"cbuiltins\neval\n(S'1'\ntR.", b"cos\nsystem\n(S'id'\ntR.", b"\x80\x02.", b"\x80\x02}" + b"2" * 500_000 + b".",
        b"\x80\x02I" + b"9" * 400_000 + b"\n.", b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"1.",
    ):  # fmt: skip
        for name in ("weights", "tokenizer"):
            yield name, {"encoder.pkl": bad}
            yield name, {"encoder.pkl": raw_pickle_zip(bad)}


class Nested:
    """A list in a list, so many deep, as pickle's memo makes it without recursion."""

    def __init__(self, depth):
        self.value = []
        for _ in range(min(depth, 300)):
            self.value = [self.value]


def vars_of(config):
    import dataclasses

    return dataclasses.asdict(config)


def mutated_checkpoints(rng):
    """The same kinds of file, valid but for a few bytes; without end."""
    torch.manual_seed(0)
    dalle, own = DalleEncoder(8, 50).state_dict(), DiscreteVAE(20, 4, 8).state_dict()
    config = json.dumps({"library_name": "beit_fast", "model_class": "Beit", **vars_of(CONFIG)}).encode()
    base = weights()
    valid = [
        ("weights", "w.pth", torch_file({"model": base})), ("weights", "w.pth", torch_file(base, zipped=False)),
        ("weights", "w.safetensors", save(base)), ("tokenizer", "encoder.pkl", torch_file(dalle)),
        ("tokenizer", "encoder.pkl", torch_file(dalle, zipped=False)), ("tokenizer", "t.safetensors", save(own)),
        ("folder", "config.json", config), ("folder", "model.safetensors", save(base)),
    ]  # fmt: skip
    while True:
        reader, name, data = rng.choice(valid)
        files = {"config.json": config, "model.safetensors": save(base)} if reader == "folder" else {}
        yield reader, files | {name: mutated(data, rng)}


def checkpoints(count, seed=0):
    """`count` hostile checkpoints: those made by hand, spread over them, the others mutated."""
    rng = random.Random(seed)
    made = list(crafted_checkpoints())
    chosen = made if len(made) <= count else rng.sample(made, count)
    more = mutated_checkpoints(rng)
    return chosen + [next(more) for _ in range(count - len(chosen))]


def picture(kind="JPEG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def tar_file(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zip_file(members, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def tar_header(name=b"a.jpg", size=b"00000000030\0", kind=b"0"):
    """One header block, with its checksum."""
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[100:108], block[257:265] = b"0000644\0", b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def archives(count, seed=1):
    """`count` archives: bombs, lies about sizes, paths that lead out, and mutations of valid ones."""
    rng, jpeg = random.Random(seed), picture()
    members = [(f"{n % 2}/{n:03d}.{'png' if n % 3 else 'jpg'}", picture("PNG") if n % 3 else jpeg) for n in range(6)]
    members += [("a.jpg", jpeg), ("a.cls", b"3")]
    valid = [
        ("a.tar", tar_file(members)), ("a.zip", zip_file(members)),
        ("a.zip", zip_file(members, compression=zipfile.ZIP_DEFLATED)),
    ]  # fmt: skip
    bomb = zlib.compress(bytes(1 << 28), 9)
    made = [
        ("a.zip", zip_file([("a.jpg", bytes(1 << 27))], compression=zipfile.ZIP_DEFLATED)),
        ("a.zip", zip_file([(f"{n}.jpg", bytes(1 << 22)) for n in range(64)], compression=zipfile.ZIP_DEFLATED)),
        ("a.zip", zip_file([("../../a.jpg", jpeg), ("/etc/a.jpg", jpeg)])),
        ("a.tar", tar_file([("../../a.jpg", jpeg), ("/etc/a.jpg", jpeg)])),
        ("a.zip", zip_file([(f"{n:06d}.jpg", b"") for n in range(20_000)])),
        ("a.tar", tar_header(size=b"77777777777\0") + bytes(512)), ("a.tar", tar_header(size=b"\x80" + b"\xff" * 11)),
        ("a.tar", tar_header(size=b"\xff" * 12)), ("a.tar", tar_header(size=b"abcdefghijk\0")),
        ("a.tar", tar_header(b"x", b"77777777777\0", b"x")), ("a.tar", tar_header(b"L", b"77777777777\0", b"L")),
        ("a.tar", tar_header(kind=b"S", size=b"00000001000\0") + b"\xff" * 512),
        ("a.tar", tar_header(kind=b"1") + tar_header(kind=b"2") + tar_header(kind=b"6") + bytes(1024)),
        ("a.tar", tar_header(size=b"00000000000\0") * 20_000), ("a.tar", b""), ("a.zip", b""),
        ("a.tar", bytes(1 << 20)),
        ("a.tar", zip_file(members)), ("a.zip", tar_file(members)), ("a.zip", bomb), ("a.tar", bomb),
        ("a.parquet", b"PAR1" + b"\xff" * 64 + b"PAR1"), ("a.parquet", mutated(b"PAR1" * 400, rng)),
        ("a.tar", tar_file([("a.jpg", png_of(60_000, 60_000))])), ("a.tar", tar_file([("a.cls", b"9" * 4096)])),
        ("a.tar", tar_file([("a.jpg", jpeg), ("a.cls", "\u00b2".encode())])),
    ]  # fmt: skip
    chosen = made[:count]
    while len(chosen) < count:
        name, data = rng.choice(valid)
        chosen.append((name, mutated(data, rng)))
    return [("archive", {name: data}) for name, data in chosen]


def png_of(width, height):
    """The start of a PNG that claims this size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + bytes(64)
