"""Mutate a module in small ways and see whether its tests notice: `make mutants MODULE=schedules`.

The mistakes are cosmic-ray's operators; modules, tests and operators stand under [tool.mutants] of pyproject.toml. Only
the tests that run the changed line are run, in a forked process; no file is touched. The row of the module in
tests/mutants.md is replaced, and what survived is printed and listed there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import re
import sys
import tempfile
import tomllib
from pathlib import Path

import torch
from mutation.changes import Mutant, mutants_of
from mutation.running import STARTUP, Run

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "mutants.md"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]
EQUIVALENT = re.compile(r"^- (\S+): `(.+)` : (.+)$", re.MULTILINE)
LEFT = re.compile(r"^- (\S+): `(.+)`$", re.MULTILINE)
"""Lines of the table's second and third part: module, mutant, why no test can tell it from the original."""


def preload(imported: list[str]) -> None:
    """Import what the tests import from elsewhere once, here, instead of in every mutant."""
    for name in imported:
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
    parser.add_argument("--again", action="store_true", help="only those that the table lists as left")
    options = parser.parse_args()
    settings = SETTINGS["modules"][options.module]
    for needed in ("cosmic_ray", "coverage"):
        if importlib.util.find_spec(needed) is None:
            sys.exit(f"error: {needed} is not installed: pip install '.[mutants]'")
    torch.set_num_threads(1)
    os.chdir(ROOT)
    path = (ROOT / settings["file"]).resolve()
    table = TABLE.read_text()
    known, left = ({m[1] for m in kind.findall(table) if m[0] == options.module} for kind in (EQUIVALENT, LEFT))
    everything = mutants_of(path.read_text(), SETTINGS["operators"])
    different = [mutant for mutant in everything if mutant.name not in known]
    mutants = [mutant for mutant in different if mutant.name in left] if options.again else different
    survivors: list[str] = []
    with os.fdopen(os.dup(1), "w") as output, tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "sitecustomize.py").write_text(STARTUP)
        os.environ["PYTHONPATH"] = f"{folder}:{ROOT}"
        exec(STARTUP, {})
        run = Run(path, [*settings["tests"], *settings.get("also", [])], folder)
        seconds, tried = sum(run.trace.seconds.values()), 0
        print(f"{options.module}: {len(mutants)} mutants, all tests take {seconds:.0f} s", file=output, flush=True)
        preload(run.trace.imported)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what pytest prints of every mutant

        def report(mutant: Mutant, killed: bool) -> None:
            nonlocal tried
            tried += 1
            if not killed:
                survivors.append(mutant.name)
                print(f"survived ({tried} tried): {mutant.name}", file=output, flush=True)

        run.run(mutants, report)
        killed = len(different) - len(survivors)
        print(f"{killed} of {len(different)} killed", file=output)
    write_row(options.module, (len(everything), killed, len(everything) - len(different)), survivors)
    return 0


if __name__ == "__main__":
    sys.exit(main())
