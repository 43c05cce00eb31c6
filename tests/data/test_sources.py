import gzip
import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.screening import Header, screen
from beit_fast.data.sources import ArraySource, fingerprint, open_source


def write(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def contents(source):
    return [source.read(i).decode() for i in range(len(source))]


def test_class_folders(tmp_path):
    write(tmp_path, ["n02/b.JPEG", "n01/x.png", "n01/deep/y.jpg", "n02/a.webp", "n10/c.tiff"])
    write(tmp_path, ["n01/._x.jpg", "n01/.hidden.png", ".git/z.jpg", "n02/notes.txt"])
    source = open_source(tmp_path)
    assert contents(source) == ["n01/deep/y.jpg", "n01/x.png", "n02/a.webp", "n02/b.JPEG", "n10/c.tiff"]
    assert [source.label(i) for i in range(5)] == [0, 0, 1, 1, 2]
    assert source.name(0) == str(tmp_path / "n01/deep/y.jpg")


def test_flat_and_mixed_folders_have_no_classes(tmp_path):
    write(tmp_path, ["b.jpg", "a.jpg"])
    assert contents(open_source(tmp_path)) == ["a.jpg", "b.jpg"]
    assert open_source(tmp_path).label(0) is None
    write(tmp_path, ["more/c.jpg"])
    source = open_source(str(tmp_path))
    assert contents(source) == ["a.jpg", "b.jpg", "more/c.jpg"]
    assert source.label(2) is None


def test_names_that_are_not_ascii_or_not_utf8(tmp_path):
    write(tmp_path, ["Grüße.jpg"])
    (tmp_path / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(b"odd")
    source = open_source(tmp_path)
    assert sorted(source.read(i) for i in range(2)) == ["Grüße.jpg".encode(), b"odd"]


def test_links_to_folders_are_followed(tmp_path):
    write(tmp_path / "disk", ["a.jpg"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "class").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "class" / "circle").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "upwards").symlink_to(tmp_path)
    assert contents(open_source(tmp_path / "data")) == ["a.jpg"]


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    write(tmp_path / "data[1].tar", ["a.jpg"])
    assert contents(open_source(tmp_path / "data[1].tar")) == ["a.jpg"]


def test_wrong_paths_are_said_in_one_line(tmp_path):
    write(tmp_path, ["file.jpg", "texts/a.txt", "texts/b.txt", "texts/c.csv"])
    (tmp_path / "none").mkdir()
    for path, message in {
        tmp_path / "imagenet" / "train": rf"no such folder: .*train \({tmp_path} exists\)",
        tmp_path / "file.jpg": "is a file; give the folder",
        tmp_path / "none": r"no images in .*none .*found nothing",
        tmp_path / "texts": r"no images in .*texts .*found 2 \.txt, 1 \.csv",
        tmp_path / "x.tar": r"no such file: .*x\.tar",
        str(tmp_path / "x-{0..3}.tar"): r"no such file: .*x-0\.tar \(4 of the 4 shards",
        "s3://bucket/data": "of remote data, tar shards can be read",
        "pipe:cat x.tar": "runs a command; set BEIT_FAST_ALLOW_PIPE=1",
    }.items():
        with pytest.raises(ValueError, match=message) as failure:
            open_source(path)
        assert "\n" not in str(failure.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o000)
    with pytest.raises(ValueError, match=r"cannot read .*locked: permission denied"):
        open_source(tmp_path)


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_shards(tmp_path, layout):
    long = "d" * 90 + "/" + "f" * 80
    for shard in range(3):
        with tarfile.open(tmp_path / f"train-{shard:02d}.tar", "w", format=layout) as archive:
            archive.addfile(_folder("images"))
            for sample in range(4):
                key = f"{long}{sample}" if sample == 2 else f"images/s{shard}{sample}"
                add(archive, f"{key}.jpg", f"{shard}{sample}".encode() * (1 + 300 * sample))
                add(archive, f"{key}.cls", str(10 * shard + sample).encode())
                add(archive, f"{key}.json", b"{}")
    for path in (tmp_path, tmp_path / "*.tar", tmp_path / "train-{00..02}.tar"):
        source = open_source(path)
        assert len(source) == 12
        assert source.read(6) == b"12" * 601
        assert [source.label(i) for i in range(12)] == [10 * (i // 4) + i % 4 for i in range(12)]
        assert source.name(6) == f"{tmp_path}/train-01.tar:{long}2.jpg"
    one = open_source(tmp_path / "train-{01,02}.tar")
    assert len(one) == 8
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(source.read, list(range(12)) * 20))
    assert read == [source.read(i) for i in range(12)] * 20


def _folder(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def test_tar_without_classes_and_with_pax_numbers(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("Grüße.png")
        info.size, info.mtime = 3, 1.5  # both need extended headers
        archive.addfile(info, io.BytesIO(b"abc"))
        add(archive, "._b.png", b"junk")
    source = open_source(tmp_path)
    assert len(source) == 1
    assert source.read(0) == b"abc"
    assert source.name(0).endswith("Grüße.png")
    assert source.label(0) is None


def test_damaged_tars_are_named(tmp_path):
    with tarfile.open(tmp_path / "good.tar", "w") as archive:
        add(archive, "a.jpg", b"x" * 5000)
        add(archive, "b.jpg", b"y" * 5000)
    whole = (tmp_path / "good.tar").read_bytes()
    for name, content, message in (
        ("cut.tar", whole[:7000], r"cut\.tar: cut off at byte 7000"),
        ("zip.tar", gzip.compress(whole), r"zip\.tar: not an \(uncompressed\) tar archive"),
        ("class.tar", whole.replace(b"b.jpg", b"b.cls"), r"class\.tar:b\.cls: a class must be a number"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / name)
    with tarfile.open(tmp_path / "text.tar", "w") as archive:
        add(archive, "a.txt", b"x")
    with pytest.raises(ValueError, match=r"no images in .*text\.tar"):
        open_source(tmp_path / "text.tar")


def test_arrays_are_read_as_images():
    images = [np.random.default_rng(i).integers(0, 256, (5 + i, 7, 3), np.uint8) for i in range(3)]
    source = ArraySource(images, labels=[4, 5, 6])
    for i, image in enumerate(images):
        data = source.read(i)
        assert screen(data) == Header("pnm", 5 + i, 7)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    assert source.label(2) == 6
    gray = ArraySource(np.arange(12, dtype=np.uint8).reshape(1, 3, 4))
    assert np.asarray(Image.open(io.BytesIO(gray.read(0)))).shape == (3, 4)
    assert screen(ArraySource(np.zeros((1, 3, 4, 5))).read(0)) == Header("npy", 3, 4, 1, "array", 5, "float64")
    with pytest.raises(ValueError, match=r"images\[0\]: expected numbers"):
        ArraySource(np.zeros((1, 3, 4, 3, 2))).read(0)
    with pytest.raises(ValueError, match="labels: 1 for 3 images"):
        ArraySource(images, labels=[1])


def test_fingerprint_follows_names_and_order(tmp_path):
    write(tmp_path / "a", ["x/1.jpg", "x/2.jpg"])
    write(tmp_path / "b", ["x/1.jpg", "x/2.jpg"])
    write(tmp_path / "c", ["x/1.jpg", "y/2.jpg"])
    marks = [fingerprint(open_source(tmp_path / name)) for name in "abc"]
    assert marks[0] == marks[1]
    assert marks[2] != marks[0]
