"""The allow-list of the unpickler: exactly these names, nothing else of Python, and inert classes."""

import builtins
import io
import pickle
import sys
from pathlib import Path

import pytest
import torch

from beit_fast.tokenizers import TokenizerError, unpickle
from beit_fast.tokenizers.unpickle import _Record, _TensorUnpickler, read_tensors

STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
ALLOWED = {
    ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    ("collections", "OrderedDict"), ("builtins", "set"), ("__builtin__", "set"),
    *(("torch", name) for name in STORAGES),
}  # fmt: skip
INERT = {("torch", "device"), ("torch", "Size"), ("argparse", "Namespace")}


def find(module, name):
    return _TensorUnpickler(io.BytesIO()).find_class(module, name)


def test_the_list_is_exactly_this():
    assert set(unpickle._ALLOWED) == ALLOWED
    assert unpickle._INERT_NAMES == INERT
    assert unpickle._INERT_PACKAGES == ("torch.nn.", "dall_e.")
    for name, dtype in STORAGES.items():
        assert find("torch", name).dtype == dtype


@pytest.mark.parametrize("module", ["builtins", "__builtin__"])
def test_everything_else_in_builtins_is_refused(module):
    names = set(dir(builtins)) | {f"set.{name}" for name in dir(set)} | {"set.__class__.__base__"}
    for name in names - {"set"}:
        with pytest.raises(pickle.UnpicklingError, match="it wants to call"):
            find(module, name)
    assert find(module, "set") is set


def test_everything_public_in_other_modules_is_refused():
    """Of what a pickle likes to call, and of the modules whose names are on the list."""
    refused = 0
    modules = "os posix subprocess sys importlib operator functools collections torch torch._utils torch.hub argparse"
    for module in [*modules.split(), "torch.serialization", "pickle", "copyreg", "types"]:
        for name in dir(sys.modules.get(module) or __import__(module)):
            if (module, name) not in ALLOWED | INERT:
                with pytest.raises(pickle.UnpicklingError):
                    find(module, name)
                refused += 1
    assert refused > 1000


@pytest.mark.parametrize(
    ("module", "name"), [*sorted(INERT), ("torch.nn", "Linear"), ("torch.nn.modules.conv", "Conv2d"),
                         ("dall_e", "Encoder"), ("dall_e.encoder", "Encoder")],
)  # fmt: skip
def test_classes_of_modules_are_inert(module, name):
    made = find(module, name)
    assert issubclass(made, _Record)
    assert made.__name__ == name
    assert made.__module__ == module
    record = made(1, two=2)
    assert record.__dict__ == {}
    record.__setstate__({"a": 3})
    record.__setstate__(("not", "a", "dict"))
    assert record.__dict__ == {"a": 3}


@pytest.mark.parametrize(
    ("module", "name"), [("torch.nn", "Linear.__init__"), ("torch.nnx", "Linear"), ("dall_evil", "x"),
                         ("xtorch.nn", "x"), ("torch", "nn"), ("", "set"), ("collections", "OrderedDict.fromkeys")],
)  # fmt: skip
def test_names_that_only_look_like_allowed_ones_are_refused(module, name):
    with pytest.raises(pickle.UnpicklingError):
        find(module, name)


def test_what_is_given_out_cannot_be_changed_for_others():
    first, second = find("torch._utils", "_rebuild_tensor_v2"), find("torch._utils", "_rebuild_tensor_v2")
    first.evil = True
    assert not hasattr(second, "evil")
    with pytest.raises(AttributeError):
        find("torch", "FloatStorage").dtype = torch.int8


def reference(*changes, room=400, earlier=()):
    """What a persistent id gives: storage "0" of ten floats, with some parts of the id changed."""
    pid = ["storage", find("torch", "FloatStorage"), "0", "cpu", 10]
    for place, value in changes:
        pid[place:] = [value] if place >= len(pid) else [value, *pid[place + 1 :]]
    unpickler = _TensorUnpickler(io.BytesIO(), room)
    for other in earlier:
        unpickler.persistent_load(other)
    return unpickler.persistent_load(tuple(pid))


def test_storages():
    assert reference().shape == (10,)
    assert reference(room=40).dtype == torch.float32
    assert reference((5, None)).shape == (10,)
    view = reference((5, ("0", 2, 3)))
    assert (view.shape, view.storage_offset()) == ((3,), 2)
    assert reference((4, 0)).shape == (0,)
    same = ("storage", find("torch", "FloatStorage"), "0", "cpu", 10)
    assert reference(earlier=[same], room=40).shape == (10,), "a second reference takes no more room"
    assert _TensorUnpickler(io.BytesIO()).persistent_load(("module", dict, "file", "source")) is dict


@pytest.mark.parametrize(
    ("changes", "earlier", "message"),
    [
        ([(0, "storages")], [], "unknown kind"),
        ([(1, torch.float32)], [], "unknown kind"),
        ([(2, 0)], [], "malformed storage"),
        ([(4, 10.0)], [], "malformed storage"),
        ([(4, True)], [], "malformed storage"),
        ([(4, -1)], [], "malformed storage"),
        ([(4, 101)], [], "larger than the file"),
        ([], [(4, 11)], "two types or sizes"),
        ([], [(1, "IntStorage")], "two types or sizes"),
        ([], [(2, "1"), (4, 91)], "larger than the file"),
    ],
)
def test_storages_that_are_refused(changes, earlier, message):
    other = ["storage", find("torch", "FloatStorage"), "0", "cpu", 10]
    for place, value in earlier:
        other[place] = find("torch", value) if place == 1 else value
    with pytest.raises(pickle.UnpicklingError, match=message):
        reference(*changes, earlier=[tuple(other)] if earlier else [])


@pytest.mark.parametrize("pid", [(), "storage", None, ("storage",), ("storage", 1, 2, 3)])
def test_references_of_other_kinds_are_refused(pid):
    with pytest.raises(pickle.UnpicklingError, match="unknown kind"):
        _TensorUnpickler(io.BytesIO()).persistent_load(pid)


FLAT = torch.arange(12.0)


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(0, (12,), (1,)), (2, (2, 5), (5, 1)), (11, (1,), (1,)), (0, (), ()),
                                   (0, (3, 4), (1, 3)), (12, (0,), (1,)), (11, (1, 1), (100, 100))],
)  # fmt: skip
def test_tensors_are_views_of_their_storage(offset, size, stride):
    rebuilt = find("torch._utils", "_rebuild_tensor_v2")(FLAT, offset, size, stride, False, {})
    assert torch.equal(rebuilt, torch.as_strided(FLAT, size, stride, offset))


@pytest.mark.parametrize(
    ("storage", "offset", "size", "stride"),
    [
        (FLAT, 0, (13,), (1,)),
        (FLAT, 1, (12,), (1,)),
        (FLAT, 0, (2, 2), (11, 1)),
        (FLAT, -1, (2,), (1,)),
        (FLAT, 0, (-2,), (1,)),
        (FLAT, 0, (2,), (-1,)),
        (FLAT, 0, (2,), (1, 1)),
        (FLAT, 0, (2.0,), (1,)),
        (FLAT, 0, (13,), (0,)),
        (FLAT, 12, (1,), (1,)),
        ([1.0], 0, (1,), (1,)),
    ],
)
def test_malformed_tensors_are_refused(storage, offset, size, stride):
    with pytest.raises(pickle.UnpicklingError):
        find("torch._utils", "_rebuild_tensor")(storage, offset, size, stride)


def test_room_is_counted_to_the_byte():
    byte = find("torch", "ByteStorage")
    with pytest.raises(pickle.UnpicklingError, match="larger than the file"):
        _TensorUnpickler(io.BytesIO()).persistent_load(("storage", byte, "0", "cpu", 1))
    assert _TensorUnpickler(io.BytesIO()).persistent_load(("storage", byte, "0", "cpu", 0)).numel() == 0
    with pytest.raises(pickle.UnpicklingError, match="larger than the file"):
        reference(room=39)
    with pytest.raises(pickle.UnpicklingError, match="unknown kind"):
        _TensorUnpickler(io.BytesIO()).persistent_load(("storage", byte, "0", "cpu"))


@pytest.mark.parametrize("info", [{"little_endian": False}, {"little_endian": True}, {}, [1]])
def test_streams_of_other_machines(tmp_path, info):
    """Magic number, version, facts of the machine, the state dict and the keys of no storages."""
    file = tmp_path / "encoder.pkl"
    parts = [unpickle._STREAM_MAGIC, unpickle._STREAM_PROTOCOL, info, {}, []]
    file.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    message = "big-endian" if info == {"little_endian": False} else "holds no tensors"
    with pytest.raises(TokenizerError, match=message):
        unpickle.read_tensors(file)


@pytest.mark.parametrize("text", ["Saving to: x", "a\nHTTP request sent, awaiting response", "--2021-06-15 10:00:00--"])
def test_each_mark_of_a_log_is_enough(tmp_path, text):
    (tmp_path / "encoder.pkl").write_text(text)
    with pytest.raises(TokenizerError, match="log of wget"):
        unpickle.read_tensors(tmp_path / "encoder.pkl")


def test_tensors_may_take_twice_the_file():
    """Views of one storage: two are a shared weight, three are refused; a file of just half their size is not."""
    one = torch.zeros(2**20 // 4)
    written = {}
    for count in (2, 3):
        buffer = io.BytesIO()
        torch.save({f"t{n}": one for n in range(count)}, buffer, _use_new_zipfile_serialization=False)
        written[count] = buffer.getvalue()
    assert len(read_tensors(Path("two"), written[2])) == 2
    with pytest.raises(TokenizerError, match=r"three is refused: its tensors take 3 MiB, the file 1\. Fetch the"):
        read_tensors(Path("three"), written[3])
    half = written[3].ljust(3 * 2**19, b"\0")
    assert len(read_tensors(Path("half"), half)) == 3
    with pytest.raises(TokenizerError, match="is refused"):
        read_tensors(Path("less"), half[:-1])
