"""Nothing is left out or guessed without a word: what a path holds, what of it is skipped, and what is refused."""

import io
import os
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.labelled import open_training, open_validation, with_classes
from beit_fast.data.reading import read_screened
from beit_fast.data.screening import Rejection
from beit_fast.data.sources import Contents, TarSource, open_source, open_training_source


def jpeg(number=0):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(root, *names, data=None):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg() if data is None else data)


def archive(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


# Folders


def test_helper_folders_are_left_out_and_counted(tmp_path):
    write(
        tmp_path,
        "cat/1.jpg",
        "dog/1.jpg",
        "@eaDir/1.jpg",
        "cat/@eaDir/1.jpg",
        "__MACOSX/cat/1.jpg",
        ".thumbnails/1.jpg",
    )
    write(tmp_path, "lost+found/1.jpg", "dog/._1.jpg")
    source = open_training(tmp_path).source
    assert [os.path.relpath(source.name(i), tmp_path) for i in range(len(source))] == ["cat/1.jpg", "dog/1.jpg"]
    skipped = source.contents.to_json()["left_out"]
    assert skipped["helper folder"]["count"] == 5
    assert skipped["hidden file"] == {"count": 1, "first": ["dog/._1.jpg"]}


def test_a_class_whose_files_all_have_another_suffix_is_named(tmp_path):
    write(tmp_path, "cat/1.JPG", "cat/2.Jpeg", "dog/1.heic", "dog/2.HEIC", "eel/notes")
    images = open_training(tmp_path)
    assert images.classes == ("cat",)
    assert images.source.contents.classes == {"cat": 2, "dog": 0, "eel": 0}
    lines = "\n".join(images.source.contents.lines())
    assert "without an image: 2 classes (dog, eel)" in lines
    assert "2 x suffix .heic (dog/1.heic, dog/2.HEIC)" in lines
    assert "1 x file without a suffix (eel/notes)" in lines
    assert ".jpg, .jpeg, .png" in lines


def test_pipes_devices_and_huge_files_are_never_read(tmp_path):
    write(tmp_path, "a/1.jpg", "a/2.jpg")
    os.mkfifo(tmp_path / "a/pipe.jpg")
    os.symlink("/dev/zero", tmp_path / "a/zero.jpg")
    with open(tmp_path / "a/huge.jpg", "wb") as file:
        file.truncate(60 << 30)  # takes no space
    source = open_source(tmp_path)
    names = [os.path.basename(source.name(i)) for i in range(len(source))]
    assert names == ["1.jpg", "2.jpg", "huge.jpg", "zero.jpg"]
    assert source.contents.skipped["pipe, socket or device"] == [1, "a/pipe.jpg"]
    reasons = {name: read_screened(source, i) for i, name in enumerate(names[2:], 2)}
    assert "61,440 MiB; images have at most" in reasons["huge.jpg"].reason
    assert "a pipe, socket or device" in reasons["zero.jpg"].reason
    os.remove(tmp_path / "a/2.jpg")
    os.mkfifo(tmp_path / "a/2.jpg")  # between listing and reading
    assert isinstance(read_screened(source, 1), Rejection)


@pytest.mark.parametrize("stray", ["n01.tar", "left.zip", "part.parquet"])
def test_mixed_forms_are_refused_by_name(tmp_path, stray):
    write(tmp_path, "n01/1.jpg", "n02/1.jpg")
    write(tmp_path, stray, data=b"whatever")
    with pytest.raises(
        ValueError, match=rf"holds {os.path.splitext(stray)[1]} files \({stray}, 1 in all\) and image files"
    ):
        open_source(tmp_path)


def test_two_kinds_of_archives_are_refused(tmp_path):
    archive(tmp_path / "a.tar", [("1.jpg", jpeg())])
    write(tmp_path, "b.zip", data=b"")
    with pytest.raises(ValueError, match=r"a\.tar.*and \.zip files \(b\.zip"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"names \.tar, \.zip files"):
        open_source(tmp_path / "*")


def test_a_folder_called_tar_is_a_folder(tmp_path):
    write(tmp_path, "n01.tar/1.jpg", "n02.zip/1.jpg", "n02.zip/2.jpg")
    images = open_training(tmp_path)
    assert images.classes == ("n01.tar", "n02.zip")
    assert images.labels.tolist() == [0, 1, 1]


def test_pretraining_takes_train_where_there_is_val(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "val/cat/1.jpg", "val/cat/2.jpg")
    source = open_training_source(tmp_path)
    assert len(source) == 1
    assert "train alone is trained on" in "\n".join(source.contents.lines())
    write(tmp_path / "other", "train/1.jpg", "more/1.jpg")  # a class called train
    assert len(open_training_source(tmp_path / "other")) == 2


def test_home_is_expanded_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "ds/train/cat/1.jpg", "ds/train/dog/1.jpg", "ds/val/cat/1.jpg")
    assert open_training("~/ds").classes == ("cat", "dog")
    assert len(open_validation("~/ds", ("cat", "dog"))) == 1
    assert len(open_training_source("~/ds")) == 2
    assert len(open_source("~/ds")) == 3


# Classes


def labelled(root, *classes):
    for name in classes:
        write(root, f"{name}/1.jpg")
    return open_training(root)


def test_folders_that_are_numbers_are_numbers(tmp_path):
    images = labelled(tmp_path, *map(str, range(12)))  # 10 and 11 before 2, by text
    names = tuple(f"class {number}" for number in range(12))
    numbered = with_classes(images, names, "x")
    for index in range(12):
        assert os.path.relpath(images.source.name(index), tmp_path) == f"{numbered.labels[index]}/1.jpg"
    padded = with_classes(labelled(tmp_path / "padded", "000", "003", "007"), names, "x")
    assert padded.labels.tolist() == [0, 3, 7]
    own = with_classes(images, images.classes, "x")  # trained on the same folders: by name
    assert own.labels.tolist() == images.labels.tolist()


@pytest.mark.parametrize("classes", [("cat", "fox"), ("Cat", "dog"), ("1", "dog"), ("7", "8"), ("cat ", "dog")])
def test_names_that_disagree_are_refused(tmp_path, classes):
    images = labelled(tmp_path, *classes)
    strange = next(name for name in images.classes if name not in ("cat", "dog"))
    with pytest.raises(ValueError, match=r"do not occur in training, e\.g\. .*--data\.class-map FILE") as error:
        with_classes(images, ("cat", "dog"), "somewhere")
    assert repr(strange) in str(error.value)


def test_a_class_map_says_which_is_which(tmp_path):
    images = labelled(tmp_path / "images", "n01", "n02", "n03")
    names = ("tench", "great white shark", "hen")
    for text in ("n01\then\nn02\ttench\nn03\tgreat white shark\n", "n02 0\nn01 2\nn03 1", "n02\nn03\nn01\n"):
        (tmp_path / "map.txt").write_text(text)
        assert with_classes(images, names, "x", tmp_path / "map.txt").labels.tolist() == [2, 0, 1]
    for text, message in (
        ("n01 hen\nn02 tench\n", "1 of 3 classes are not in it, e.g. 'n03'"),
        ("n01 hen\nn02 dog\nn03 tench", "'n02' stands for 'dog', which is no class"),
        ("n01 0\nn02 3\nn03 1", "'n02' stands for '3', which is no class"),
        ("n01 0\nn02 0\nn03 1", "two of its classes stand for the same"),
    ):
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            with_classes(images, names, "x", tmp_path / "map.txt")


def test_names_that_are_no_utf8_come_back(tmp_path):
    names = ("狗", "gbk"), ("犬", "shift_jis"), ("개", "euc-kr"), ("Grüße", "latin1"), ("鳥", "big5")
    for name in (b"\xff\xfe", *(text.encode(encoding) for text, encoding in names)):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(folder)
        with open(os.path.join(folder, b"1.jpg"), "wb") as file:
            file.write(jpeg())
    images = open_training(tmp_path)
    assert {os.fsencode(name) for name in images.classes} == set(os.listdir(os.fsencode(tmp_path)))
    assert all(source_name.isprintable() or source_name for source_name in images.source.contents.classes)


# Archives


def labels_of(members, tmp_path):
    return open_training(archive(tmp_path / "x" / "0.tar", members).parent).labels.tolist()


def test_the_key_is_the_name_up_to_its_suffix(tmp_path):
    numbers = range(6)
    dotted = [m for k in numbers for m in ((f"scan.{k:02d}.jpg", jpeg(k)), (f"scan.{k:02d}.cls", b"%d" % (k % 2)))]
    assert labels_of(dotted, tmp_path / "dotted") == [0, 1] * 3
    source = open_source(tmp_path / "dotted/x")
    assert "6 names have a dot before their suffix, e.g. scan.00.jpg" in "\n".join(source.contents.lines())
    plain = [m for k in numbers for m in ((f"d.1/s{k}.JPG", jpeg(k)), (f"d.1/s{k}.CLS", b"%d" % k))]
    assert labels_of(plain, tmp_path / "plain") == list(numbers)
    assert open_source(tmp_path / "plain/x").contents.notes == []
    folders = [("a/1.jpg", jpeg()), ("b/1.jpg", jpeg()), ("b/1.cls", b"4"), ("a/1.cls", b"3")]
    assert labels_of(folders, tmp_path / "folders") == [3, 4]


def test_two_classes_for_one_key_name_both(tmp_path):
    with pytest.raises(ValueError, match=r"0\.tar: two classes for a: a\.cls and a\.CLS"):
        labels_of([("a.jpg", jpeg()), ("a.cls", b"1"), ("a.CLS", b"2")], tmp_path)


def test_images_without_a_class_are_counted(tmp_path):
    path = archive(tmp_path / "0.tar", [("a.jpg", jpeg()), ("a.cls", b"1"), ("b.jpg", jpeg()), ("b.json", b"{}")])
    source = open_source(path)
    assert "1 of 2 images have no .cls entry" in source.contents.notes
    assert source.contents.skipped == {"suffix .json": [1, "0.tar:b.json"]}
    with pytest.raises(ValueError, match=r"1 of 2 images have no label, e\.g\. .*0\.tar:b\.jpg"):
        open_training(path)


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_within_an_archive_are_resolved(tmp_path, layout):
    long = "d" * 60 + "/" + "f" * (20 if layout == tarfile.USTAR_FORMAT else 90)
    members = [
        ("a/1.jpg", b"one"), link("b/2.jpg", "../a/1.jpg"), link("hard.jpg", "a/1.jpg", tarfile.LNKTYPE),
        link("chain.jpg", "b/2.jpg"), (f"{long}.jpg", b"long"), link("to_long.jpg", f"{long}.jpg"),
        link("gone.jpg", "nowhere.jpg"), link("out.jpg", "/etc/passwd"), ("last.jpg", b"last"),
    ]  # fmt: skip
    source = open_source(archive(tmp_path / "0.tar", members, format=layout))
    assert {source.name(i).split(":")[1]: source.read(i) for i in range(len(source))} == {
        "a/1.jpg": b"one", "b/2.jpg": b"one", "hard.jpg": b"one", "chain.jpg": b"one", f"{long}.jpg": b"long",
        "to_long.jpg": b"long", "last.jpg": b"last",
    }  # fmt: skip
    assert source.name(1).endswith("b/2.jpg")  # in the order of the archive
    assert source.contents.skipped == {"link to nothing in the archive": [2, "0.tar:out.jpg", "0.tar:gone.jpg"]}


def test_links_in_a_circle_end(tmp_path):
    source = open_source(archive(tmp_path / "0.tar", [link("a.jpg", "b.jpg"), link("b.jpg", "a.jpg"), ("c.jpg", b"c")]))
    assert len(source) == 1
    assert source.contents.skipped["link to nothing in the archive"][0] == 2


def test_what_is_no_file_is_counted_by_type(tmp_path):
    device, pipe = tarfile.TarInfo("dev.jpg"), tarfile.TarInfo("pipe.jpg")
    device.type, pipe.type = tarfile.CHRTYPE, tarfile.FIFOTYPE
    sparse = tarfile.TarInfo("sparse.jpg")
    sparse.type = tarfile.GNUTYPE_SPARSE
    source = open_source(
        archive(tmp_path / "0.tar", [(device, b""), (pipe, b""), (sparse, b"x" * 600), ("a.jpg", b"a")])
    )
    assert (len(source), source.read(0)) == (1, b"a")
    assert set(source.contents.skipped) == {"member of type '3'", "member of type '6'", "sparse member"}


def test_v7_headers_are_read(tmp_path):
    data = bytearray(
        archive(tmp_path / "0.tar", [("a.jpg", b"one"), ("b.jpg", b"two")], format=tarfile.USTAR_FORMAT).read_bytes()
    )
    for start in (0, 1024):
        data[start + 257 : start + 512] = bytes(255)  # v7 knows neither magic nor prefix
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    (tmp_path / "0.tar").write_bytes(data)
    source = open_source(tmp_path / "0.tar")
    assert [source.read(i) for i in range(len(source))] == [b"one", b"two"]


def pax(tmp_path, *records, kind=b"x"):
    """An archive whose only image comes behind a pax header of these raw records."""
    body = b"".join(records)
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(body)
    head = info.tobuf(tarfile.USTAR_FORMAT)
    image = tarfile.TarInfo("a.jpg")
    image.size = 3
    path = tmp_path / "0.tar"
    path.write_bytes(head + body.ljust(-(-len(body) // 512) * 512, b"\0") + image.tobuf() + b"one".ljust(512, b"\0"))
    return path


@pytest.mark.parametrize(
    "record",
    [b"0 path=b.jpg\n", b"-5 path=b.jpg\n", b"99999 path=b.jpg\n", b"3 path=b.jpg\n", b"path=b.jpg\n", b"x" * 40,
     b"13 size=-512\n", b"12 path=b.jp\n", b"9999999999999999999999 path=b\n"],
)  # fmt: skip
def test_pax_headers_with_lengths_that_lie_are_one_line(tmp_path, record):
    with pytest.raises(ValueError, match=r"0\.tar: damaged at byte \d+") as error:
        open_source(pax(tmp_path, record))
    assert "\n" not in str(error.value)


def test_a_good_pax_header_names_the_file(tmp_path):
    assert open_source(pax(tmp_path, b"14 path=b.jpg\n")).name(0).endswith("0.tar:b.jpg")


def with_size(tmp_path, field, kind=b"0"):
    data = bytearray(archive(tmp_path / "0.tar", [("a.jpg", b"one"), ("b.jpg", b"two")]).read_bytes())
    data[124:136], data[156:157] = field, kind
    (tmp_path / "0.tar").write_bytes(data)
    return tmp_path / "0.tar"


@pytest.mark.parametrize(
    "field",
    [b"garbage!!!!!", b"00000000009\0", b"0x000000003\0", b"-0000000512\0", b"\xff" * 10 + b"\xfe\0", b"\xff" * 12,
     b"\x80" + struct.pack(">Q", 1 << 62).rjust(11, b"\0")],
)  # fmt: skip
def test_sizes_that_lie_are_one_line(tmp_path, field):
    for kind in (b"0", b"L", b"x"):
        with pytest.raises(ValueError, match=r"0\.tar: (damaged at byte 0|cut off)"):
            open_source(with_size(tmp_path, field, kind))


def test_shards_share_a_bounded_number_of_open_files(tmp_path):
    count = 280
    for number in range(count):
        archive(tmp_path / f"{number:03d}.tar", [("a.jpg", b"%d" % number)])
    source = open_source(tmp_path)
    assert isinstance(source, TarSource)
    before = len(os.listdir("/proc/self/fd"))
    assert [source.read(i) for i in range(count)] == [b"%d" % i for i in range(count)]
    assert len(os.listdir("/proc/self/fd")) - before <= 256
    assert source.read(0) == b"0"  # closed long ago
    del source
    assert len(os.listdir("/proc/self/fd")) <= before


def test_lines_and_json_say_the_same():
    contents = Contents("/data", "folders", images=1_281_167, shards=3, classes={"cat": 3, "dog": 0})
    for number in range(9):
        contents.skip("suffix .gif", f"{number}.gif")
    contents.notes.append("a note")
    assert contents.lines()[0] == "/data: 1,281,167 images in 3 tar shards, 2 classes"
    assert contents.lines()[1] == "  left out: 9 x suffix .gif (0.gif, 1.gif, 2.gif, ...)"
    assert contents.to_json()["left_out"] == {"suffix .gif": {"count": 9, "first": ["0.gif", "1.gif", "2.gif"]}}
    assert contents.lines()[-1] == "  a note"
