"""Every command and snippet of README and docs: its words are checked here, and the slow tests run it at toy size.

`python -m pytest -m slow tests/docs` runs each page from top to bottom in a folder of its own: paths under /data become
toy data, models and lengths toy sizes, and eight GPUs two processes on the CPU.
"""

import contextlib
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import beit_fast
from beit_fast.cli.main import COMMANDS
from beit_fast.cli.options import option_names, parse
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable
from tests.docs.pages import NAMES, PAGES, ROOT, blocks, inline
from tests.docs.toy import make_data, toy_words

make_torchvision_importable()

WITH_COMMANDS = [name for name in NAMES if any(block.language == "bash" for block in blocks(name))]
WITH_PYTHON = [name for name in NAMES if any(block.language == "python" for block in blocks(name))]
NEED_RUNS = ["finetuning", "segmentation"]
"""Pages whose Python reads what their commands wrote; it runs with them."""


def recipe(name):
    return runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["config"]


def check(words):
    """Whether a command can be what it says: programs, files, make targets, extras, recipes and options exist."""
    program, rest = words[0], words[1:]
    if program == "beit-fast" and rest[:1] == ["train"]:
        if len(rest) > 1:
            with contextlib.suppress(SystemExit) if "--help" in rest else contextlib.nullcontext():
                parse(recipe(rest[1]), rest[2:])
    elif program == "beit-fast":
        assert rest[0] in COMMANDS
    elif program == "python" and rest[0].startswith("recipes/"):
        parse(recipe(Path(rest[0]).stem), rest[1:])
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None
    elif program in ("torchrun", "sbatch"):
        script = next(place for place, word in enumerate(rest) if re.fullmatch(r"recipes/\w+\.py", word))
        assert all((ROOT / word).is_file() for word in rest[: script + 1] if word.startswith("recipes/"))
        parse(recipe(Path(rest[script]).stem), rest[script + 1 :])
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [extra for word in rest for extra in re.findall(r"\[(.+)\]", word)]
        assert {extra for names in named for extra in names.split(",")} <= set(extras)
    elif program == "pytest":
        assert (ROOT / rest[0]).is_dir()
    else:
        raise AssertionError(f"no test knows the command {' '.join(words)}")


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_commands_name_things_that_exist(name, capsys):
    for block in blocks(name):
        for words in block.commands if block.language == "bash" else []:
            try:
                check(words)
            except SystemExit:
                pytest.fail(f"{' '.join(words)}\n{capsys.readouterr().err}")


def known_options():
    names = set()
    for path in (ROOT / "recipes").glob("*.py"):
        names |= set(option_names(recipe(path.stem)))
    return {name.replace(".no-", ".") for name in names}


OTHER_OPTIONS = {"--master-port", "--tokens", "--block", "--ratios", "--flip", "--image-size", "--check", "--help",
                 "--record", "--channels", "--json"}  # fmt: skip
"""Options of commands other than recipes that sentences name."""


def recipe_options():
    names = {name for path in (ROOT / "recipes").glob("*.py") for name in option_names(recipe(path.stem))}
    return names | {re.sub(r"([.]|--)([^.]+)$", r"\1no-\2", name) for name in names}


@pytest.mark.parametrize("name", NAMES)
def test_code_within_sentences_names_things_that_exist(name):
    known = recipe_options() | OTHER_OPTIONS
    programs = ("beit-fast", "python", "torchrun", "sbatch", "make")
    for code in inline(name):
        words = code.split()
        if words[0].startswith("--"):
            assert [word for word in words if word.startswith("--") and word not in known] == []
        elif len(words) > 1 and words[0] in programs and "NAME" not in code:
            check([word for word in words if word not in ("RUN", "...")])


def run_python(code, names):
    """Run a snippet in the names of those before it; one that fetches weights is compiled only."""
    compiled = compile(code, "a page", "exec")
    if not code.startswith("# needs a network"):
        exec(compiled, names)


@pytest.mark.parametrize("name", [name for name in WITH_PYTHON if name not in (*NEED_RUNS, "drop-in")])
def test_snippets_run(name, tmp_path, monkeypatch):
    """Those of drop-in.md have a test of their own, tests/integrations/test_migration_page.py."""
    monkeypatch.chdir(tmp_path)
    names = {}
    if name == "continue-from-released-weights":  # a released file in small
        released = beit_fast.BeitForMaskedImageModeling(beit_fast.BeitConfig.from_preset("tiny", "plus"))
        torch.save({"model": released.state_dict()}, "beit_base_patch16_224_pt22k.pth")
    try:
        for block in blocks(name):
            if block.language == "python":
                small = re.sub('"beit_base_patch16_384"', '"beit_tiny_patch16_224"', block.code)
                run_python(small.replace('from_preset("base"', 'from_preset("tiny"'), names)
    finally:
        beit_fast.use_backend("auto")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_a_page_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path)
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "BEIT_FAST_CACHE": str(tmp_path / "cache"),
    }
    if "runs/pretrain_beit_base" in PAGES[NAMES.index(name)].read_text():
        start(["beit-fast", "train", "pretrain_beit_base", "--data.path", "/data/imagenet/train"], environ)
    names = {}
    for block in blocks(name):
        for words in block.commands if block.language == "bash" else []:
            start(words, environ)
        if block.language == "python" and name in NEED_RUNS:
            run_python(block.code, names)


def start(words, environ):
    """Run a command at toy size; installation, make and benchmarks are run elsewhere (CI, tests/test_packaging.py)."""
    if words[0] in ("pip", "make", "pytest", "sbatch"):
        return
    command = [sys.executable, *toy_words(words)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(words)}\n{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_every_test_that_a_page_names_exists():
    """The tables of docs/data.md and docs/unnoticed-mistakes.md say which test holds each line."""
    tests = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = {word for name in NAMES if name != "drop-in" for word in inline(name) if re.fullmatch(r"test_\w+", word)}
    assert len(named) > 45
    assert named - tests == set()
