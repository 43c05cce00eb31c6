"""Zip archives, parquet files and PyTorch datasets give the same images in the same order as the folder they hold."""

import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from beit_fast.data.screening import screen
from beit_fast.data.sources import DatasetSource, FolderSource, ParquetSource, ZipSource, open_source

NAMES = ["n02/b.jpg", "n01/x.png", "n01/deep/y.jpg", "n10/Grüße.webp", "n02/a.jpg"]


def encoded(number, suffix):
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix])
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    for number, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, name.rsplit(".", 1)[1]))
    return root


def packed(folder, path, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in reversed(NAMES):
            archive.write(folder / name, name)
        archive.writestr("__MACOSX/n01/._x.png", b"junk")
        archive.writestr("n01/notes.txt", b"text")
        archive.mkdir("n03")
    return path


def contents(source):
    return [(source.read(i), source.label(i)) for i in range(len(source))]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_archive_is_the_folder_it_holds(folder, tmp_path, method):
    expected = open_source(folder)
    assert isinstance(expected, FolderSource)
    source = ZipSource([packed(folder, tmp_path / "data.zip", method)])
    assert contents(source) == contents(expected)
    assert source.name(1) == f"{tmp_path}/data.zip:n01/x.png"
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(source.read, list(range(5)) * 40))
    assert read == [expected.read(i) for i in range(5)] * 40


def test_large_archives_with_extra_fields(folder, tmp_path):
    """zip64 records and the extra fields that `zip` and Windows write shift the data behind the local header."""
    path = tmp_path / "wide.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a/image.png", "w", force_zip64=True) as member:
        member.write((folder / "n01/x.png").read_bytes())
    assert ZipSource([path]).read(0) == (folder / "n01/x.png").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], r"d\.zip: not a zip archive, or cut off"),
        (lambda data: b"", r"d\.zip: not a zip archive"),
        (lambda data: b"\x1f\x8b" + data[2:100], r"d\.zip: not a zip archive"),
    ],
)
def test_archives_that_cannot_be_opened_are_named(folder, tmp_path, damage, message):
    path = packed(folder, tmp_path / "d.zip")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as failure:
        ZipSource([path])
    assert "\n" not in str(failure.value)


def test_members_that_cannot_be_read_are_named(folder, tmp_path):
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.write(folder / "n01/x.png", "x.png")
    with pytest.raises(ValueError, match=r"odd\.zip:x\.png: packed by bzip2"):
        ZipSource([path])
    secret = bytearray(packed(folder, tmp_path / "s.zip").read_bytes())
    directory = secret.index(b"PK\x01\x02")
    secret[directory + 8] |= 1
    (tmp_path / "s.zip").write_bytes(secret)
    with pytest.raises(ValueError, match=r"s\.zip:.*encrypted"):
        ZipSource([tmp_path / "s.zip"])
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", b"a")
    with pytest.raises(ValueError, match=r"no images in .*texts\.zip .*found 1 \.txt"):
        ZipSource([tmp_path / "texts.zip"])


def test_a_damaged_member_is_an_error_of_that_image_only(folder, tmp_path):
    path = packed(folder, tmp_path / "d.zip", zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    image = (folder / "n01/x.png").read_bytes()
    data[data.index(image) + 50] ^= 1
    path.write_bytes(data)
    source = ZipSource([path])
    with pytest.raises(OSError, match="checksum"):
        source.read(1)
    assert source.read(0) == (folder / "n01/deep/y.jpg").read_bytes()


def test_a_member_that_claims_too_little_does_not_unpack_without_end(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(5_000_000))
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(OSError, match="size differs"):
        ZipSource([path]).read(0)


def write_parquet(path, rows, labels=None, names=True, features=None):
    images = [{"bytes": data, "path": name if names else None} for name, data in rows]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {"image": pyarrow.array(images, kind), "caption": pyarrow.array(["text"] * len(rows))}
    if labels is not None:
        columns["label"] = pyarrow.array(labels, pyarrow.int64())
    table = pyarrow.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def test_parquet_files_are_the_rows_in_their_order(folder, tmp_path):
    expected = open_source(folder)
    rows = [(expected.name(i).rsplit("/", 1)[1], expected.read(i)) for i in range(5)]
    labels = [expected.label(i) for i in range(5)]
    files = [
        write_parquet(tmp_path / "train-00000-of-00002.parquet", rows[:3], labels[:3]),
        write_parquet(tmp_path / "train-00001-of-00002.parquet", rows[3:], labels[3:]),
    ]
    source = ParquetSource(files, tmp_path / "cache")
    assert contents(source) == contents(expected)
    assert source.name(3) == f"{files[1]}:row 0/{rows[3][0]}"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.tar")}
    assert contents(ParquetSource(files, tmp_path / "cache")) == contents(expected)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.tar")} == before
    write_parquet(files[1], rows[3:][::-1], labels[3:][::-1])  # another file of the same name is unpacked anew
    assert ParquetSource(files, tmp_path / "cache").read(3) == expected.read(4)


def test_rows_without_names_and_without_labels(folder, tmp_path):
    rows = [(None, encoded(i, suffix)) for i, suffix in enumerate(("jpg", "png", "webp"))]
    source = ParquetSource([write_parquet(tmp_path / "x.parquet", rows, names=False)], tmp_path / "cache")
    assert [source.read(i) for i in range(3)] == [data for _, data in rows]
    assert [source.label(i) for i in range(3)] == [None] * 3


def test_labels_are_the_column_that_the_file_declares(folder, tmp_path):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table(
        {
            "image": pyarrow.array([{"bytes": encoded(0, "png"), "path": "a.png"}], kind),
            "label": pyarrow.array([7], pyarrow.int64()),
            "species": pyarrow.array([3], pyarrow.int32()),
        }
    )
    features = {"species": {"_type": "ClassLabel", "names": ["a", "b", "c", "d"]}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert ParquetSource([tmp_path / "x.parquet"], tmp_path / "cache").label(0) == 3


def test_parquet_files_that_cannot_be_used_are_named(folder, tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [("a.png", encoded(0, "png"))] * 3)
    whole = path.read_bytes()
    for content, message in ((whole[:-10], "cannot be read as parquet"), (b"", "cannot be read as parquet")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\.parquet: {message}") as failure:
            ParquetSource([path], tmp_path / "cache")
        assert "\n" not in str(failure.value)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match=r"x\.parquet: 0 columns hold images \(\['text'\]\)"):
        ParquetSource([path], tmp_path / "cache")
    write_parquet(path, [("a.png", None)])
    with pytest.raises(ValueError, match=r"a row of column 'image' holds no bytes \(a\.png\)"):
        ParquetSource([path], tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_disk_without_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", [("a.png", encoded(0, "png"))])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(ValueError, match=r"x\.parquet: unpacking needs .* MiB in .*; set BEIT_FAST_CACHE"):
        ParquetSource([path], tmp_path / "cache")


class Pixels(torch.utils.data.Dataset):
    """Items of every kind that a dataset may give."""

    def __init__(self):
        self.pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
        self.gray = self.pixels[..., 0]
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG")
        self.items = [
            self.pixels, self.gray, Image.fromarray(self.pixels), Image.fromarray(self.gray), buffer.getvalue(),
            torch.from_numpy(self.pixels).permute(2, 0, 1), torch.from_numpy(self.gray)[None],
        ]  # fmt: skip

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index], index


def test_items_of_a_dataset(tmp_path):
    dataset = Pixels()
    source = DatasetSource(dataset, labels=range(7))
    for index in range(7):
        image = np.asarray(Image.open(io.BytesIO(source.read(index))))
        assert np.array_equal(image, dataset.gray if index in (1, 3, 6) else dataset.pixels), index
    assert (source.name(2), source.label(2)) == ("dataset:2", 2)
    dataset.items[0] = dataset.pixels.astype(np.float32)
    assert screen(source.read(0)).depth == "float32"
    dataset.items[0] = dataset.pixels.astype(str)
    with pytest.raises(ValueError, match=r"dataset:0: expected numbers \(H, W\) or \(H, W, C\), got <U"):
        source.read(0)
    with pytest.raises(ValueError, match="labels: 2 for 7 images"):
        DatasetSource(dataset, labels=[0, 1])


def test_images_in_lmdb_through_a_dataset(folder, tmp_path):
    expected = open_source(folder)
    with lmdb.open(str(tmp_path / "db")) as environment, environment.begin(write=True) as transaction:
        for index in range(5):
            transaction.put(f"{index:08d}".encode(), expected.read(index))

    class Lmdb(torch.utils.data.Dataset):
        def __init__(self, path):
            self.environment = lmdb.open(path, readonly=True, lock=False)

        def __len__(self):
            return self.environment.stat()["entries"]

        def __getitem__(self, index):
            with self.environment.begin() as transaction:
                return transaction.get(f"{index:08d}".encode())

    source = DatasetSource(Lmdb(str(tmp_path / "db")))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, range(5))) == [expected.read(i) for i in range(5)]
