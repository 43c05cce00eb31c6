"""Labelled data sets: folders, shards, both versions of CIFAR-100, scenes and digits; what can be wrong with them."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.labelled import builtin_labelled, open_training, open_validation
from beit_fast.data.sources.cifar import read_cifar100

RNG = np.random.default_rng(0)
NAMES = [f"class{number:02d}" for number in range(100)]
PIXELS = {split: RNG.integers(0, 256, (7, 3072), np.uint8) for split in ("train", "test")}
LABELS = {split: RNG.integers(0, 100, 7) for split in ("train", "test")}


def jpeg(value=100):
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 12, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def class_folders(root, classes, per_class=2):
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            (root / name / f"{number}.jpg").write_bytes(jpeg())
    return root


def shard(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            members = [(f"{number:03d}.jpg", jpeg())]
            if label is not None:
                members.append((f"{number:03d}.cls", str(label).encode()))
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def cifar_binary(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        labels = LABELS[split].astype(np.uint8)
        records = np.column_stack([labels // 5, labels, PIXELS[split]]).astype(np.uint8)
        (folder / f"{split}.bin").write_bytes(records.tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def python2_pickle(value):
    """Protocol 2 as python 2 wrote it: byte strings are plain strings, not calls of `_codecs.encode`."""

    def item(value):
        if isinstance(value, str):
            data = value.encode("latin1")
            return pickle.BINSTRING + len(data).to_bytes(4, "little") + data
        if isinstance(value, bool) or value is None:
            return {True: pickle.NEWTRUE, False: pickle.NEWFALSE, None: pickle.NONE}[value]
        if isinstance(value, int):
            return pickle.BININT + value.to_bytes(4, "little", signed=True)
        if isinstance(value, (list, tuple)):
            body = b"".join(map(item, value))
            if isinstance(value, tuple):
                return pickle.MARK + body + pickle.TUPLE
            return pickle.EMPTY_LIST + pickle.MARK + body + pickle.APPENDS
        if isinstance(value, dict):
            return pickle.EMPTY_DICT + b"".join(item(k) + item(v) + pickle.SETITEM for k, v in value.items())
        assert isinstance(value, np.ndarray)
        array = b"cnumpy.core.multiarray\n_reconstruct\n" + pickle.MARK + b"cnumpy\nndarray\n"
        array += item((0,)) + item("b") + pickle.TUPLE + pickle.REDUCE
        kind = b"cnumpy\ndtype\n" + item(("u1", 0, 1)) + pickle.REDUCE
        kind += item((3, "|", None, None, None, -1, -1, 0)) + pickle.BUILD
        state = pickle.MARK + item(1) + item(tuple(value.shape)) + kind + item(False)
        return array + state + item(value.tobytes().decode("latin1")) + pickle.TUPLE + pickle.BUILD

    return pickle.PROTO + b"\x02" + item(value) + pickle.STOP


def cifar_python(folder, dump=python2_pickle):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        labels = [int(label) for label in LABELS[split]]
        content = {"filenames": ["a.png"] * 7, "batch_label": "one of one", "fine_labels": labels}
        content |= {"coarse_labels": [label // 5 for label in labels], "data": PIXELS[split]}
        (folder / split).write_bytes(dump(content))
    meta = {"fine_label_names": NAMES, "coarse_label_names": ["x"] * 20}
    (folder / "meta").write_bytes(dump(meta))
    return folder


VERSIONS = {
    "binary": cifar_binary,
    "python 2": cifar_python,
    "python 3": lambda folder: cifar_python(folder, lambda value: pickle.dumps(value, protocol=2)),
    "protocol 4": lambda folder: cifar_python(folder, lambda value: pickle.dumps(value, protocol=4)),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_cifar_versions_hold_the_same(tmp_path, version):
    VERSIONS[version](tmp_path)
    for train, split in ((True, "train"), (False, "test")):
        images, labels, names = read_cifar100(tmp_path, train)
        np.testing.assert_array_equal(images.transpose(0, 3, 1, 2).reshape(7, -1), PIXELS[split])
        assert labels.tolist() == LABELS[split].tolist()
        assert list(names) == NAMES


def test_the_python2_pickles_of_these_tests_are_real():
    read = pickle.loads(python2_pickle({"a": [1, -2], "data": PIXELS["train"]}), encoding="latin1")
    assert read["a"] == [1, -2]
    np.testing.assert_array_equal(read["data"], PIXELS["train"])


def test_cifar_is_found_below_the_path_and_split(tmp_path):
    cifar_binary(tmp_path / "cifar-100-binary")
    train = open_training(tmp_path)
    validation = open_validation(tmp_path, train.classes)
    assert len(train) == len(validation) == 7
    assert train.classes == tuple(NAMES)
    pixels = np.asarray(Image.open(io.BytesIO(train.source.read(3))))
    np.testing.assert_array_equal(pixels.transpose(2, 0, 1).ravel(), PIXELS["train"][3])
    assert validation.labels.tolist() == LABELS["test"].tolist()


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def damage(folder, kind):
    train = folder / "train"
    if kind == "program":
        train.write_bytes(pickle.dumps({"data": Evil()}))
    elif kind == "cut":
        train.write_bytes(train.read_bytes()[:5000])
    elif kind == "list":
        train.write_bytes(pickle.dumps([1, 2]))
    elif kind == "no array":
        train.write_bytes(pickle.dumps({"data": [1], "fine_labels": [1]}))
    elif kind == "wrong type":
        train.write_bytes(pickle.dumps({"data": np.zeros((7, 3072)), "fine_labels": [1] * 7}, protocol=2))
    elif kind == "labels":
        train.write_bytes(python2_pickle({"data": PIXELS["train"], "fine_labels": [3]}))
    elif kind == "range":
        train.write_bytes(python2_pickle({"data": PIXELS["train"], "fine_labels": [100] * 7}))
    elif kind == "meta":
        (folder / "meta").write_bytes(python2_pickle({"fine_label_names": ["one"]}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("program", r"train: cannot be read as a CIFAR-100 file: it asks for (builtins|__builtin__).print"),
        ("cut", "train: cannot be read as a CIFAR-100 file"),
        ("list", "train: not a CIFAR-100 file"),
        ("no array", "'data' is not an array of bytes"),
        ("wrong type", "'data' is not an array of bytes"),
        ("labels", "7 pixels|for 1 labels"),
        ("range", r"label 100 is outside \[0, 100\)"),
        ("meta", "1 class names"),
    ],
)
def test_a_bad_cifar_file_is_one_line_and_runs_nothing(tmp_path, capsys, kind, message):
    cifar_python(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(ValueError, match=message) as error:
        open_training(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "this ran" not in capsys.readouterr().out


def test_a_cut_binary_file_is_one_line(tmp_path):
    cifar_binary(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"\0" * 3075)
    with pytest.raises(ValueError, match=r"train.bin: 3075 bytes are not whole records of 3074"):
        open_training(tmp_path)


def test_folders_share_their_classes_by_name(tmp_path):
    class_folders(tmp_path / "train", ["ant", "bee", "cat"])
    class_folders(tmp_path / "val", ["bee", "cat"], per_class=3)
    train = open_training(tmp_path)
    assert train.classes == ("ant", "bee", "cat")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for path in (tmp_path, tmp_path / "train"):
        validation = open_validation(path, train.classes)
        assert validation.labels.tolist() == [1, 1, 1, 2, 2, 2]
        assert validation.classes == train.classes
    given = open_validation(tmp_path / "train", train.classes, tmp_path / "val")
    assert given.labels.tolist() == [1, 1, 1, 2, 2, 2]


def test_shards_have_numbers_for_classes(tmp_path):
    shard(tmp_path / "train" / "a.tar", [0, 2, 1])
    shard(tmp_path / "val" / "a.tar", [1, 1])
    train = open_training(tmp_path)
    assert train.classes == ("0", "1", "2")
    assert train.labels.tolist() == [0, 2, 1]
    assert open_validation(tmp_path, train.classes).labels.tolist() == [1, 1]


def flat(root):
    root.mkdir()
    (root / "1.jpg").write_bytes(jpeg())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: flat(p / "val"), "val: 1 of 1 images have no label, e.g. .*1.jpg"),
        (lambda p: None, "no validation images: .* has no folder val, validation, test; give --data.validation-path"),
        (lambda p: class_folders(p / "val", ["ant", "dog"]), "1 of 2 classes do not occur in training, e.g. 'dog'"),
        (lambda p: shard(p / "val" / "x.tar", [0, None]), "1 of 2 images have no label|2 of 2 images have no label"),
        (lambda p: shard(p / "val" / "x.tar", [0, "dog"]), "a class must be a number, found b'dog'"),
    ],
)
def test_what_is_wrong_with_a_validation_set_is_one_line(tmp_path, make, message):
    class_folders(tmp_path / "train", ["ant", "bee"])
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        open_validation(tmp_path, open_training(tmp_path).classes)
    assert "\n" not in str(error.value)


def test_builtin_scenes_are_disjoint_and_bear_their_label(tmp_path):
    train = builtin_labelled("scenes", tmp_path, 6, 48, train=True)
    validation = builtin_labelled("scenes", tmp_path, 6, 48, train=False)
    assert len(train.classes) == 24 == len(set(train.classes))
    assert train.classes[4] == "stripes square"
    assert not {train.source.read(i) for i in range(6)} & {validation.source.read(i) for i in range(6)}
    assert train.labels.min() >= 0
    assert train.labels.max() < 24


def test_digits_are_scikit_learns():
    pytest.importorskip("sklearn")
    train, validation = (builtin_labelled("digits", None, 0, 0, train=part) for part in (True, False))
    assert len(train) + len(validation) == 1797
    assert len(validation) == 360
    assert np.bincount(validation.labels, minlength=10).min() > 20
    assert np.asarray(Image.open(io.BytesIO(train.source.read(0)))).shape == (8, 8)
