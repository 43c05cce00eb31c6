"""Tar shards behind a server that loses connections give the images of the folder, in its order, or one line."""

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.reading import ScreenedReader
from beit_fast.data.screening import BadImages
from beit_fast.data.sources import files as files_module
from beit_fast.data.sources import open_source
from beit_fast.data.sources.files import LocalFiles
from beit_fast.data.sources.source import SourceUnavailable
from tests.data.flaky_server import serving


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("BEIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files_module.time, "sleep", lambda seconds: None)
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as server:
        yield server


def png(number, size=(40, 30)):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder, shards=3, images=10, labels=True):
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as archive:
            for number in range(images):
                key = f"{shard}{number:03d}"
                for name, data in ((f"{key}.png", png(100 * shard + number)), (f"{key}.cls", str(shard).encode())):
                    if labels or name.endswith(".png"):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))


def contents(source):
    return [(source.read(i), source.label(i)) for i in range(len(source))]


@pytest.mark.parametrize("drop_every", [0, 10, 3])
def test_remote_shards_are_the_local_ones(server, drop_every):
    write_shards(server.folder)
    server.drop_every = drop_every
    local = open_source(server.folder)
    remote = open_source(f"{server.url}/train-{{000..002}}.tar")
    assert contents(remote) == contents(local)
    assert remote.name(12) == f"{server.url}/train-001.tar:1002.png"
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(remote.read, list(range(30)) * 3)) == [local.read(i) for i in range(30)] * 3


def test_the_list_of_members_is_kept_and_made_anew_when_a_shard_changes(server, monkeypatch):
    write_shards(server.folder, shards=1)
    url = f"{server.url}/train-000.tar"
    first = open_source(url)
    before = server.sent
    again = open_source(url)
    assert server.sent - before < 2048  # no bytes of the shard: only questions for its size
    assert contents(again) == contents(first)
    write_shards(server.folder, shards=1, images=4)
    assert len(open_source(url)) == 4


@pytest.mark.slow
def test_a_member_larger_than_a_block_and_headers_across_blocks(server, monkeypatch):
    from beit_fast.data.sources import shards

    write_shards(server.folder, shards=1)
    expected = contents(open_source(server.folder))
    for size in (512, 700, 1024, 5000):
        monkeypatch.setattr(shards._Blocks, "BYTES", size)
        monkeypatch.setenv("BEIT_FAST_CACHE", str(server.folder.parent / f"cache{size}"))
        assert contents(open_source(f"{server.url}/train-000.tar")) == expected


def test_what_cannot_be_reached_ends_in_one_line(server):
    write_shards(server.folder, shards=1)
    with pytest.raises(SourceUnavailable, match=r"nothing\.tar: FileNotFoundError; is the address right") as failure:
        open_source(f"{server.url}/nothing.tar")
    assert "\n" not in str(failure.value)
    source = open_source(f"{server.url}/train-000.tar")
    server.drop_every = 1
    with pytest.raises(SourceUnavailable, match=r"train-000\.tar: cannot be reached after 8 tries") as failure:
        source.read(0)
    assert "\n" not in str(failure.value)
    with pytest.raises((SourceUnavailable, ModuleNotFoundError), match="nosuchscheme"):
        open_source("nosuchscheme://host/a.tar")


def test_a_shard_that_ends_early_is_named(server):
    write_shards(server.folder, shards=1)
    path = server.folder / "train-000.tar"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"train-000\.tar: cut off at byte 9000"):
        open_source(f"{server.url}/train-000.tar")


def test_a_source_that_disappears_ends_the_run_and_skips_no_image(server):
    """A lost server must not count as bad images."""
    write_shards(server.folder, shards=1)
    source = open_source(f"{server.url}/train-000.tar")
    bad = BadImages(len(source), None, 1.0)
    reader = ScreenedReader(source, seed=0, bad_images=bad, threads=2)
    assert reader.read(3).data == png(3)
    server.drop_every = 1
    with pytest.raises(SourceUnavailable):
        reader.read(4)
    assert len(bad) == 0
    reader.close()


def test_the_output_of_a_command_is_kept(server, tmp_path, monkeypatch):
    write_shards(server.folder, shards=2)
    monkeypatch.setenv("BEIT_FAST_ALLOW_PIPE", "1")
    marker = tmp_path / "ran"
    source = open_source(f"pipe:echo x >> {marker}; cat {server.folder}/train-{{000..001}}.tar")
    assert contents(source) == contents(open_source(server.folder))
    open_source(f"pipe:echo x >> {marker}; cat {server.folder}/train-{{000..001}}.tar")
    assert marker.read_text() == "x\nx\n"  # once for each of the two commands
    awk = f"pipe:cat {server.folder}/train-000.tar; awk 'END {{ exit }}' {marker}"  # braces that are no choice stay
    assert contents(open_source(awk)) == contents(open_source(server.folder / "train-000.tar"))
    with pytest.raises(SourceUnavailable, match=r"pipe:cat /nowhere\.tar: exit code 1 \(.*No such file"):
        open_source("pipe:cat /nowhere.tar")
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_many_local_files_need_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "OPEN_FILES", 8)
    paths = []
    for number in range(100):
        paths.append(tmp_path / f"{number}.tar")
        paths[-1].write_bytes(str(number).encode() * 5)
    files = LocalFiles(paths)
    before = len(list(Path("/proc/self/fd").iterdir()))
    order = list(np.random.default_rng(0).integers(0, 100, 2000))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda number: files.read(int(number), 0, 1000), order))
    assert read == [str(number).encode() * 5 for number in order]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 8
