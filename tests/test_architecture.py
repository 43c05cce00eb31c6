"""The layers of the house: nothing imports upwards, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "beit_fast"

# What each folder may import from, itself always included.
ALLOWED = {
    "kernels": set(),
    "nn": {"kernels"},
    "models": {"kernels", "nn"},
    "integrations": {"kernels", "nn", "models"},
    "data": {"kernels", "_C"},
    "tokenizers": {"kernels"},
    "visualize": {"kernels", "nn", "models", "tokenizers"},
    "train": {"kernels", "nn", "models", "tokenizers", "data", "visualize"},
}


def imported_folders(module, source):
    """Folders of the package that a module imports from, wherever in its text the import stands."""
    for node in ast.walk(ast.parse(source)):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = [*module[: len(module) - node.level], *base]
            names = [[*base, alias.name] for alias in node.names]
        for name in names:
            if name[0] == "beit_fast" and len(name) > 1:
                yield node.lineno, name[1]


@pytest.mark.parametrize("folder", ALLOWED)
def test_nothing_imports_upwards(folder):
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files or folder in ("integrations", "visualize"), f"no files in {folder}"
    allowed = ALLOWED[folder] | {folder, "version"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports beit_fast.{name}"
        for path in files
        for line, name in imported_folders(path.relative_to(ROOT).with_suffix("").parts, path.read_text())
        if name not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_check_sees_an_upward_import():
    """The rule above must be able to fail."""
    source = "from ..train import engine\nfrom beit_fast.models import Beit\n"
    found = imported_folders(("beit_fast", "nn", "imaginary"), source)
    assert {name for _, name in found} == {"train", "models"}


def test_importing_the_package_takes_none_of_the_heavy_ones():
    heavy = ("nvidia.dali", "torchvision", "timm", "transformers", "tyro", "rich", "matplotlib", "beit_fast._C")
    code = f"import sys, beit_fast; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("statement", ["from kernels import bias_gelu", "import kernels; kernels.bias_gelu"])
def test_the_kernels_folder_gives_nothing_under_another_name(statement):
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "import beit_fast.kernels" in done.stderr


def test_the_kernels_folder_does_not_pass_for_hugging_faces_package():
    """transformers imports a package named `kernels` to see whether it is there; from the root it finds this folder."""
    code = "import kernels; assert getattr(kernels, '__version__', 'none') == 'none'; import kernels.backend"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "No module named 'kernels.backend'" in done.stderr


def test_no_file_is_too_long_to_hold_at_once():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "csrc").glob("*")]
    long = {str(p.relative_to(ROOT)): n for p in files if p.is_file() and (n := len(p.read_text().splitlines())) > 430}
    assert not long
