"""The layers of the package: nothing imports upwards or in a circle, files and folders stay small, names are plain."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "beit_fast": ROOT / "beit_fast",
    "beit_fast.kernels": ROOT / "kernels",
    "beit_fast.recipes": ROOT / "recipes",
}

ALLOWED = {
    "kernels": {"_C"},
    "nn": {"kernels"},
    "network": set(),
    "models": {"kernels", "nn", "network"},
    "integrations": {"kernels", "nn", "models"},
    "data": {"kernels", "_C"},
    "tokenizers": {"kernels", "models", "network"},
    "visualize": {"kernels", "nn", "models", "tokenizers"},
    "train.values": {"data", "train.distributed"},
    "train.distributed": {"nn", "models", "train.values"},
    "train.checkpoint": {"data", "train.values", "train.distributed"},
    "train": {"data", "models", "visualize", "train.values", "train.distributed", "train.checkpoint"},
    "train.evaluation": {"kernels", "models", "tokenizers", "data", "visualize", "train", "train.values",
                         "train.distributed", "train.checkpoint"},
    "train.tasks": {"kernels", "nn", "models", "tokenizers", "data", "visualize", "train", "train.values",
                    "train.distributed", "train.checkpoint", "train.evaluation"},
    "cli": {"kernels", "models", "tokenizers", "data", "visualize", "integrations", "train", "train.values",
            "train.distributed", "train.checkpoint", "train.evaluation", "train.tasks"},
    "recipes": {"cli", "train.values", "train.tasks"},
    "__init__": {"kernels", "models", "integrations"},
    "__main__": {"cli"},
}  # fmt: skip
"""What each layer may import from, itself and `version` always included."""

VALUES = {"config", "optim", "progress"}
"""Files of train/ that checkpoint/ and distributed/ may import: configuration, optimizer state, durations as text."""

LAZY = {
    "beit_fast.cli.doctor": {"beit_fast.train.optim"},
    "beit_fast.cli.main": {"beit_fast.cli.train", "beit_fast.cli.evaluate", "beit_fast.cli.predict",
                           "beit_fast.cli.export", "beit_fast.cli.embed", "beit_fast.cli.verify",
                           "beit_fast.cli.pictures", "beit_fast.cli.doctor", "beit_fast.cli.stats",
                           "beit_fast.kernels.tune"},
    "beit_fast.cli.train": {"beit_fast.cli.plan", "beit_fast.cli.replay"},
    "beit_fast.data.sampling": {"beit_fast._C"},
    "beit_fast.kernels.backend": {"beit_fast._C"},
    "beit_fast.tokenizers.load": {"beit_fast.tokenizers.vqkd"},
    "beit_fast.train.run_log": {"beit_fast.visualize.run_report"},
}  # fmt: skip
"""Imports inside functions and under TYPE_CHECKING, which the layers count as any other."""

INVENTED = {
    "rival", "rivals", "Rival", "RIVALS", "in_turns", "turns", "untouched", "fusible", "BeitTrunk", "StepWork",
    "branch_of", "PretrainViews", "TrainingViews", "ViewSampling", "CpuViews", "spread_table", "fold_bias",
    "background_save", "masked_rows", "everywhere", "chunk_rows",
}  # fmt: skip
"""Names of this project's first year that the field has other words for; none may be an identifier again."""


class Import(NamedTuple):
    line: int
    module: str
    lazy: bool
    """Inside a function or under TYPE_CHECKING."""


def module_files() -> dict[str, Path]:
    """Every module of the package by its full name; kernels and recipes lie behind symlinks."""
    files = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package != "beit_fast" or parts[0] not in ("kernels", "recipes"):
                files[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return files


MODULES = module_files()


def imports(name: str, source: str, is_package: bool = False) -> Iterator[Import]:
    """What module `name` imports from the package, wherever in its text the import stands."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            targets: list[str] = []
            if isinstance(child, ast.Import):
                targets = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                parent = name.split(".") if is_package else name.split(".")[:-1]
                above = parent[: len(parent) + 1 - child.level] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                full = [f"{base}.{alias.name}" for alias in child.names]
                targets = [module if module in MODULES or module == "beit_fast._C" else base for module in full]
            yield from (Import(child.lineno, t, lazy) for t in targets if t.split(".")[0] == "beit_fast")
            yield from visit(child, lazy or inside or checking)

    yield from visit(ast.parse(source), False)


def layer(module: str) -> str:
    """The layer of a module, `beit_fast.train.tasks.probe` -> `train.tasks`."""
    parts = module.split(".")[1:] or ["__init__"]
    if parts[0] != "train":
        return parts[0]
    if len(parts) > 1 and f"train.{parts[1]}" in ALLOWED:
        return f"train.{parts[1]}"
    return "train.values" if parts[1:] and parts[1] in VALUES else "train"


@functools.cache
def all_imports() -> dict[str, list[Import]]:
    """What each module of the package imports from it."""
    return {name: list(imports(name, path.read_text(), path.name == "__init__.py")) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", ALLOWED)
def test_nothing_imports_upwards(name):
    modules = [module for module in MODULES if layer(module) == name]
    assert modules, f"no files in {name}"
    allowed = ALLOWED[name] | {name, "version"}
    wrong = [
        f"{module}:{found.line} imports {found.module}"
        for module in modules
        for found in all_imports()[module]
        if layer(found.module) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_belongs_to_a_layer():
    assert {layer(module) for module in MODULES} <= {*ALLOWED, "version"}


def test_the_check_sees_an_upward_import():
    """The rule above must be able to fail."""
    source = (
        "from ..train import engine\nfrom beit_fast.models import Beit\n"
        "if TYPE_CHECKING:\n    import beit_fast.cli.train\ndef f():\n    from beit_fast.data import loader\n"
    )
    found = list(imports("beit_fast.nn.imaginary", source))
    assert [(layer(i.module), i.lazy) for i in found] == [
        ("train", False), ("models", False), ("cli", True), ("data", True),
    ]  # fmt: skip


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others: strongly connected parts of two and more."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        queue = list(graph[start])
        while queue:
            module = queue.pop()
            if module not in seen:
                seen.add(module)
                queue += graph.get(module, ())
        reach[start] = seen
    parts = {
        frozenset(m for m in reach[start] if start in reach.get(m, ())) for start in graph if start in reach[start]
    }
    return sorted(sorted(part) for part in parts)


def test_no_modules_import_each_other():
    """Imports inside functions and under TYPE_CHECKING count. A package's own __init__ gathers its files."""
    graph = {name: {i.module for i in found if i.module != name} for name, found in all_imports().items()}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles(graph) == []


def test_imports_inside_functions_are_few_and_known():
    """Outside of kernels, whose Triton text is imported only where it runs."""
    lazy = {
        module: {found.module for found in entries if found.lazy} - LAZY.get(module, set())
        for module, entries in all_imports().items()
        if not module.startswith("beit_fast.kernels")
    }
    assert {module: targets for module, targets in lazy.items() if targets} == {}


def test_in_kernels_only_triton_text_and_the_compiled_module_are_imported_late():
    late = {found.module for module, entries in all_imports().items() if layer(module) == "kernels" for found in entries
            if found.lazy}  # fmt: skip
    known = ("_C", "kernel", "forward", "backward", "bias", "one_pass", "tiles")
    assert {module for module in late if module.rsplit(".", 1)[-1] not in known} == set()


def test_importing_the_package_takes_none_of_the_heavy_ones():
    heavy = (
        "torch._dynamo",
        "nvidia.dali",
        "torchvision",
        "timm",
        "transformers",
        "tyro",
        "rich",
        "matplotlib",
        "beit_fast._C",
    )
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
    files = [*MODULES.values(), *(ROOT / "csrc").iterdir(), *(ROOT / "benchmarks").rglob("*.py"), ROOT / "setup.py"]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files if path.is_file()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_folder_holds_more_than_sixteen_files():
    counts: dict[str, int] = {}
    for path in MODULES.values():
        folder = str(path.parent.relative_to(ROOT))
        counts[folder] = counts.get(folder, 0) + 1
    del counts["recipes"]
    assert {folder: count for folder, count in counts.items() if count > 16} == {}


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z", *patterns], capture_output=True, text=True, cwd=ROOT)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def empty_headings(text: str) -> list[str]:
    """Headings with nothing between them and the next heading of the same or a higher level."""
    text = re.sub(r"^```.*?^```", "code", text, flags=re.S | re.M)
    found = []
    heading: tuple[int, str] | None = None
    for line in [*text.splitlines(), "# end"]:
        match = re.match(r"(#+) ", line)
        if match and heading and len(match[1]) <= heading[0]:
            found.append(heading[1])
        if match or line.strip():
            heading = (len(match[1]), line) if match else None
    return found


def test_no_heading_is_empty():
    assert empty_headings("# A\n\n## B\ntext\n## C\n\n# D\n```\n# x\n```\n") == ["## C"]
    pages = [page for page in tracked("*.md") if page.name != "CHANGELOG.md"]  # it collects under fixed headings
    assert pages or not (ROOT / ".git").exists()
    empty = {str(page.relative_to(ROOT)): empty_headings(page.read_text()) for page in pages}
    assert {page: headings for page, headings in empty.items() if headings} == {}


def identifiers(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names |= {node.asname or node.name.rsplit(".", 1)[-1]}
    return names


def test_no_invented_name_is_an_identifier():
    assert identifiers("def f(rival=1): return x.turns(fusible)") & INVENTED == {"rival", "turns", "fusible"}
    files = [*MODULES.values(), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    names = {str(path.relative_to(ROOT)): identifiers(path.read_text()) & INVENTED for path in files}
    assert {name: used for name, used in names.items() if used} == {}
