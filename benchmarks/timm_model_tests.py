"""timm's own model tests, run for timm's BEiT and for ours: fetched with timm's source distribution, never copied.

    python -m benchmarks.timm_model_tests            # fetches the sources of the installed timm, writes docs/drop-in.md
    python -m benchmarks.timm_model_tests --sources DIR_OR_TAR_GZ --check

Loaded into pytest as a plugin, it points timm's `create_model` at ours for the names that we have.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.baselines.torchvision_stubs import make_torchvision_importable
from benchmarks.machine import ROOT
from benchmarks.report import replaced

PAGE = ROOT / "docs/drop-in.md"
BEGIN, END = "<!-- timm's tests: begin -->", "<!-- timm's tests: end -->"
LIBRARY = "BEIT_FAST_TIMM_TESTS"
"""The environment variable that says whose models the tests get: timm or beit_fast."""
CHOSEN = "{} and not pretrained"
"""Pytest's `-k` for a name; what fetches weights is left out, since it fails for every library without a network."""
NAMES = (
    "beit_base_patch16_224",
    "beit_base_patch16_384",
    "beit_large_patch16_384",
    "beit_large_patch16_512",
    "beit_large_patch16_224 and not prune_intermediate",
    "beit_large_patch16_224 and prune_intermediate",
)
"""Pytest's expressions for timm's five names; the slowest test, ten minutes for BEiT-L, is one of its own."""
REFUSED = "BEiT cannot be scripted"

Results = dict[str, Any]
"""Test -> (passed, failed or skipped; the first line of its message)."""


def pytest_configure(config: Any) -> None:
    """Pytest's hook: called in the subprocess, before timm's tests are imported."""
    make_torchvision_importable()
    import timm

    import beit_fast

    if os.environ[LIBRARY] == "beit_fast":
        theirs, names = timm.create_model, set(beit_fast.list_models())

        def create_model(name: str, *arguments: Any, **options: Any) -> Any:
            make = beit_fast.create_model if name.split(".")[0] in names else theirs
            return make(name, *arguments, **options)

        timm.create_model = create_model


def fetch(folder: Path) -> Path:
    """Download the source distribution of the timm that is installed here."""
    version = importlib.metadata.version("timm")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"timm=={version}"], check=True)
    return next(folder.glob("timm-*.tar.gz"))


def unpacked(sources: Path, folder: Path) -> Path:
    """The folder that holds `tests/test_models.py`.

    Raises:
        ValueError: the sources have no such file.
    """
    if sources.is_file():
        with tarfile.open(sources) as archive:
            archive.extractall(folder, filter="data")
        sources = folder
    found = [
        path.parents[1] for path in (*sources.glob("tests/test_models.py"), *sources.glob("*/tests/test_models.py"))
    ]
    if not found:
        raise ValueError(f"{sources} holds no tests/test_models.py: give timm's source distribution, not its wheel")
    return found[0]


def run(sources: Path, library: str, chosen: list[str]) -> Results:
    """What became of timm's tests with the models of `library`.

    Args:
        sources: the unpacked source distribution.
        library: "timm" or "beit_fast".
        chosen: which tests, as pytest takes them.

    Raises:
        RuntimeError: pytest came to no result.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.timm_model_tests", "-p", "no:cacheprovider"]
        command += ["-W", "ignore", f"--junit-xml={report}", *chosen]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        environment |= {LIBRARY: library, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"timm's tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return dict(outcome(case) for case in ElementTree.parse(report).iter("testcase"))


def compare(sources: Path, name: str) -> list[Results]:
    """Timm's results of one model, and ours of the tests that pass for it."""
    theirs = run(sources, "timm", ["tests/test_models.py", "-k", CHOSEN.format(name)])
    passed = [f"tests/test_models.py::{test}" for test, (result, _) in theirs.items() if result == "passed"]
    return [theirs, run(sources, "beit_fast", passed) if passed else {}]


def outcome(case: ElementTree.Element) -> tuple[str, tuple[str, str]]:
    for kind, name in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            message = found.get("message", "").strip()
            return case.get("name", ""), (name, message.splitlines()[0] if message else "")
    return case.get("name", ""), ("passed", "")


def broken(theirs: Results, ours: Results) -> list[str]:
    """The tests that pass for timm and not for us, scripting excepted where it is refused."""
    return [
        f"{name}: {ours.get(name, ('missing', ''))}"
        for name, (result, _) in theirs.items()
        if result == "passed" and ours.get(name, ("missing", ""))[0] != "passed" and not is_refused(ours, name)
    ]


def is_refused(results: Results, name: str) -> bool:
    return results.get(name, ("", ""))[0] == "failed" and REFUSED in results[name][1]


def table(theirs: Results, ours: Results) -> str:
    """The lines between the markers of docs/drop-in.md: counts, then a row a test and name."""
    passed = sorted(test for test, (result, _) in theirs.items() if result == "passed")
    word = {name: "refused" if is_refused(ours, name) else ours.get(name, ("missing", ""))[0] for name in passed}
    names = sorted({found for test in theirs for found in re.findall(r"beit_\w+_patch16_\d+", test)})
    others = count([result for result, _ in theirs.values() if result != "passed"])
    lines = [
        f"timm {importlib.metadata.version('timm')}, {', '.join(f'`{name}`' for name in names)}: of {len(theirs)} "
        f"tests {len(passed)} pass for timm's models ({others}); of these for ours {count(list(word.values()))}.",
        "",
        "| test | parameters | timm | beit_fast |",
        "|---|---|---|---|",
    ]
    for test in passed:
        function, _, parameters = test.rstrip("]").partition("[")
        lines.append(f"| `{function}` | `{parameters}` | passed | {word[test]} |")
    return "\n".join(lines)


def count(words: list[str]) -> str:
    return ", ".join(
        f"{words.count(word)} {word}" for word in ("passed", "refused", "skipped", "failed") if word in words
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timm_model_tests", description="timm's tests on ours.")
    parser.add_argument("--sources", type=Path, help="timm's source distribution, packed or not; fetched if not given")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a test is worse than timm's")
    parser.add_argument(
        "--keep", type=Path, help="a JSON file: keeps the results of each name, which are not made again"
    )
    given = parser.parse_args(arguments)
    kept = json.loads(given.keep.read_text()) if given.keep and given.keep.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        sources = unpacked(given.sources or fetch(Path(folder)), Path(folder))
        for name in NAMES:
            if name not in kept:
                kept[name] = compare(sources, name)
                if given.keep:
                    given.keep.write_text(json.dumps(kept, indent=1))
    theirs, ours = ({t: r for results in kept.values() for t, r in results[which].items()} for which in (0, 1))
    text = table(theirs, ours)
    if not given.check:
        PAGE.write_text(replaced(PAGE, text, BEGIN, END))
    print(text)
    problems = broken(theirs, ours)
    for problem in problems:
        print(f"worse than timm: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
