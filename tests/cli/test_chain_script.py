"""chain.sh as it stands, by the checkout and by a wheel in an environment of its own, away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.docs.toy import labelled
from tests.images import write_kinds

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STUBS = "from torchvision_stubs import make_torchvision_importable\nmake_torchvision_importable()\n"
"""Run first by Python where torch and torchvision are of two kinds, which timm refuses to be imported with."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of JPEGs with classes, and with label maps."""
    root = tmp_path_factory.mktemp("data")
    write_kinds(root / "images", 12)
    labelled(root / "scenes", "train/images", "train/labels", "val/images", "val/labels")
    (root / "scenes" / "classes.txt").write_text("sky\ngrass\nwater\n")
    return root


def run(command, folder, environment):
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def environment_of(commands, folder, *modules):
    """Variables with which `beit-fast` is that of `commands`, and torchvision can be imported."""
    stubs = folder / "stubs"
    stubs.mkdir()
    shutil.copy(ROOT / "benchmarks" / "baselines" / "torchvision_stubs.py", stubs)
    (stubs / "sitecustomize.py").write_text(STUBS)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    paths = os.pathsep.join(map(str, (stubs, *modules)))
    return kept | {"PATH": f"{commands}{os.pathsep}{kept['PATH']}", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1"}  # fmt: skip


def check(python, data, folder, environment):
    """The script, then what it left."""
    output = run(["bash", HERE / "chain.sh", data / "images", data / "scenes"], folder, environment)
    assert output.count("largest difference") == 8
    assert "-NN top-1" in output
    assert "on 12 images" in output
    assert "mIoU" in output
    lines = [json.loads(line) for line in (folder / "classes.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert {entry["name"] for line in lines for entry in line["classes"]} == {"kind_0", "kind_1", "kind_2"}
    assert len(list((folder / "segments").glob("*_segments.png"))) == 4
    compared = run([python, HERE / "compare_logits.py", data / "images" / "val"], folder, environment)
    assert compared.count(" of logits that spread by ") == 9


@pytest.mark.slow
def test_by_the_checkout(data, tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "beit-fast").write_text(f'#!/bin/sh\nexec {sys.executable} -m beit_fast "$@"\n')
    (commands / "beit-fast").chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    check(sys.executable, data, work, environment_of(commands, tmp_path, ROOT))


@pytest.mark.slow
def test_by_an_installed_wheel(data, tmp_path):
    """A wheel in a new virtual environment, whose other packages are those of this one, lent through a .pth file.

    An editable installation of this checkout is none of them: such a file's own .pth files are not read.
    """
    source, dist, work = tmp_path / "source", tmp_path / "dist", tmp_path / "work"
    work.mkdir()
    listing = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT, os.environ)
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", dist]
    run([*wheel, source], tmp_path, {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", *dist.glob("*.whl")], tmp_path, plain)
    packages = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], work, plain).strip())
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(
        [python, "-c", "import beit_fast, beit_fast._C as c; print(beit_fast.__file__, c.__file__)"], work, plain
    )
    assert all(path.startswith(str(packages)) for path in where.split())
    check(python, data, work, environment_of(tmp_path / "venv" / "bin", tmp_path))
