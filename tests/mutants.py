"""Mutate a module in small ways and see whether its tests notice: `make mutants MODULE=schedules`.

The mistakes are cosmic-ray's operators; modules, tests and operators stand under [tool.mutants] of pyproject.toml. A
mutant lives in a forked process whose import of the module gives the changed text; no file is touched. The row of the
module in tests/mutants.md is replaced, and what survived is printed and listed there.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import os
import re
import signal
import sys
import tempfile
import time
import tomllib
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "mutants.md"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]
EQUIVALENT = re.compile(r"^- (\S+): `(.+)` : (.+)$", re.MULTILINE)
"""A line of the table's second part: module, mutant, why no test can tell it from the original."""


def mutants_of(code: str) -> dict[str, str]:
    """Description ("old line -> new line") to changed code; of equal ones the first."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    found: dict[str, str] = {}
    for name in SETTINGS["operators"]:
        operator, occurrence = get_operator(f"core/{name}")(), 0
        while (changed := mutate_code(code, operator, occurrence)) is not None:
            occurrence += 1
            lines = list(difflib.unified_diff(code.splitlines(), changed.splitlines(), n=0, lineterm=""))[3:]
            old, new = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
            if old != new:
                found.setdefault(f"{old} -> {new}", changed)
    return found


def run_tests(
    path: Path, code: str, tests: list[str], limit_s: float | None, imported: Path | None = None
) -> tuple[int, float]:
    """Run the tests with `code` in place of the file.

    Returns:
        pytest's exit code (1 too where it takes longer than allowed), and seconds. `imported` gets the names of the
        modules that were imported.
    """
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        original = SourceFileLoader.get_code

        def get_code(self, name):
            source = Path(self.path).resolve() == path
            return compile(code, self.path, "exec") if source else original(self, name)

        SourceFileLoader.get_code = get_code
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *tests]
        result = 1
        try:
            result = int(pytest.main(arguments))
            if imported is not None:
                imported.write_text("\n".join(sys.modules))
        finally:
            os._exit(result)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        took = time.monotonic() - began
        if done:
            return os.waitstatus_to_exitcode(status), took
        if limit_s is not None and took > limit_s:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 1, took
        time.sleep(0.01)


def preload(imported: Path) -> None:
    """Import what the tests import from elsewhere once, here, instead of in every mutant."""
    for name in imported.read_text().split():
        if name.split(".")[0] in SETTINGS["preload"]:
            with contextlib.suppress(Exception):  # what cannot be imported alone is left to the tests
                importlib.import_module(name)


def write_row(module: str, counts: tuple[int, int, int], survivors: list[str]) -> None:
    """Replace the module's row and its list of survivors in the table."""
    mutants, killed, equivalent = counts
    share = 100 * killed / max(mutants - equivalent, 1)
    text = TABLE.read_text()
    row = f"| {module} | {mutants} | {killed} | {equivalent} | {len(survivors)} | {share:.1f} % |"
    head, _, rest = text.partition("\n\n## Equivalent")
    rows = [line for line in head.splitlines() if not line.startswith(f"| {module} |")]
    equivalents, _, left = rest.partition("\n\n## Left")
    lines = [line for line in left.splitlines() if line and not line.startswith(f"- {module}: ")]
    lines += [f"- {module}: `{survivor}`" for survivor in survivors]
    body = "\n".join([*rows, row]) + "\n\n## Equivalent" + equivalents.rstrip() + "\n\n## Left\n"
    TABLE.write_text(body + "".join(f"\n{line}" for line in lines if not line.startswith("## ")) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", choices=sorted(SETTINGS["modules"]))
    options = parser.parse_args()
    settings = SETTINGS["modules"][options.module]
    if importlib.util.find_spec("cosmic_ray") is None:
        sys.exit("error: cosmic-ray is not installed: pip install '.[mutants]'")
    torch.set_num_threads(1)
    path = (ROOT / settings["file"]).resolve()
    code = path.read_text()
    with tempfile.TemporaryDirectory() as folder:
        imported = Path(folder) / "imported"
        result, _ = run_tests(path, code, settings["tests"], None, imported)
        if result:
            sys.exit(f"error: without a mutant these tests fail: pytest {' '.join(settings['tests'])}")
        preload(imported)
    stages = [
        (tests, run_tests(path, code, tests, None)) for tests in (settings["tests"], settings.get("also")) if tests
    ]
    for tests, (result, _) in stages[1:]:
        if result:
            sys.exit(f"error: without a mutant these tests fail: pytest {' '.join(tests)}")
    seconds = stages[0][1][1]
    known = {mutant for module, mutant, _ in EQUIVALENT.findall(TABLE.read_text()) if module == options.module}
    mutants = mutants_of(code)
    print(f"{options.module}: {len(mutants)} mutants, tests take {seconds:.1f} s", flush=True)
    survivors, equivalent, killed = [], 0, 0
    for mutant, changed in mutants.items():
        if mutant in known:
            equivalent += 1
        elif any(run_tests(path, changed, tests, 10 * took + 30)[0] for tests, (_, took) in stages):
            killed += 1
        else:
            survivors.append(mutant)
            print(f"survived: {mutant}", flush=True)
    write_row(options.module, (len(mutants), killed, equivalent), survivors)
    print(f"{killed} of {len(mutants) - equivalent} killed, {equivalent} equivalent; {TABLE.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
