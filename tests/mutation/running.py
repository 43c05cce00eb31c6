"""Run the tests that a mutant can change, each mutant in a forked process."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from mutation.changes import Functions, Mutant, functions_of, replace_code

ERROR = 99
"""Exit code of a forked process that failed outside the tests."""

STARTUP = """
import atexit
import os
from importlib.machinery import SourceFileLoader
from pathlib import Path

original = SourceFileLoader.get_code


def get_code(self, name):
    path = os.environ.get("MUTATED_FILE")
    if path and os.path.realpath(self.path) == path:
        return compile(Path(os.environ["MUTATED_TEXT"]).read_text(), self.path, "exec")
    return original(self, name)


def trace(path, folder):
    import coverage

    test = (folder / "test").read_text()
    found = coverage.Coverage(folder / f"lines.{os.getpid()}", include=[path], context=test, config_file=False)
    found.start()
    atexit.register(lambda: (found.stop(), found.save()))


SourceFileLoader.get_code = get_code
if "TRACED_FILE" in os.environ:
    trace(os.environ["TRACED_FILE"], Path(__file__).parent)
"""
"""`sitecustomize` of every process that the tests start: a mutant counts there too, and so do the lines it runs."""


@dataclass
class Trace:
    """What one run of the tests without a mutant showed."""

    lines: dict[int, set[str]]
    """Line of the file to the tests that run it."""
    at_import: set[int]
    """Lines that run when the tests are collected."""
    seconds: dict[str, float]
    """Processor time of each test."""
    imported: list[str]
    """Names of the modules that were imported."""


def forked(action: Callable[[], int], seconds: float | None) -> int:
    """The exit code of `action` in a forked process; 1 where it takes more than `seconds` of processor time.

    The clock on the wall counts only where the process waits: a busy machine must not kill a mutant.
    """
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        result = ERROR
        try:
            os.setpgid(0, 0)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            if seconds is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**33,) * 2)
            result = action()
        finally:
            os._exit(result)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done or (seconds is not None and time.monotonic() - began > 300 + 20 * seconds):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # and whatever it started
            return os.waitstatus_to_exitcode(status) if done else (os.waitpid(pid, 0), 1)[1]
        time.sleep(0.01)


class Session:
    """pytest's plugin: collect, then run `loop(session)` in place of all tests."""

    def __init__(self, tests: list[str], folder: Path, loop: Callable[[pytest.Session], object]):
        self.tests, self.folder, self.loop = tests, folder, loop

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.loop(session)
        return True

    def run(self, *others: object) -> int:
        off = [f"-pno:{name}" for name in ("cacheprovider", "xdist", "cov")]
        folder = f"--basetemp={self.folder / 'tests'}"
        return int(pytest.main([*off, folder, "--hypothesis-profile=ci", *self.tests], plugins=[self, *others]))


def run_items(items: list[pytest.Item]) -> int:
    """1 at the first test that fails, 0 when all pass."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if item.session.testsfailed:
            return 1
    return 0


class Tracing:
    """pytest's plugin: which lines each test runs, what a fixture runs counting for every test that uses it."""

    def __init__(self, path: Path, folder: Path):
        import coverage

        self.path, self.folder = str(path), folder
        self.coverage = coverage.Coverage(data_file=None, include=[self.path], config_file=False)
        self.contexts: dict[str, set[str]] = {"": set()}
        self.seconds: dict[str, float] = {}
        self.test = ""
        os.environ["TRACED_FILE"] = self.path
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        fixtures = {f"fixture {id(f)}" for chain in item._fixtureinfo.name2fixturedefs.values() for f in chain}
        self.test, self.contexts[item.nodeid] = item.nodeid, fixtures
        self.coverage.switch_context(item.nodeid)
        (self.folder / "test").write_text(item.nodeid)
        began = sum(os.times()[:4])
        result = yield
        self.seconds[item.nodeid] = sum(os.times()[:4]) - began
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        self.coverage.switch_context(f"fixture {id(fixturedef)}")
        result = yield
        self.coverage.switch_context(self.test)
        return result

    def result(self) -> Trace:
        import coverage

        self.coverage.stop()
        users = defaultdict(set)
        for test, fixtures in self.contexts.items():
            for context in (test, *fixtures):
                users[context].add(test)
        data = self.coverage.get_data()
        for file in self.folder.glob("lines.*"):  # of other processes; what was killed has left none
            other = coverage.CoverageData(str(file))
            other.read()
            data.update(other)
        found = data.contexts_by_lineno(self.path)
        lines = {line: set().union(*(users[c] for c in contexts)) - {""} for line, contexts in found.items()}
        at_import = {line for line, contexts in found.items() if "" in contexts}
        return Trace(lines, at_import, self.seconds, list(sys.modules))


def traced(path: Path, tests: list[str], folder: Path) -> Trace:
    """Run the tests as they are, in another process."""

    def action() -> int:
        tracing, results = Tracing(path, folder), []
        code = Session(tests, folder, lambda session: results.append(run_items(session.items))).run(tracing)
        (folder / "trace").write_bytes(pickle.dumps(tracing.result()))
        return results[0] if results else code

    if forked(action, None):
        sys.exit(f"error: without a mutant these tests fail: pytest {' '.join(tests)}")
    return pickle.loads((folder / "trace").read_bytes())


class Run:
    """The mutants of one module."""

    def __init__(self, path: Path, tests: list[str], folder: Path):
        self.path, self.tests, self.folder = path, tests, folder
        self.trace = traced(path, tests, folder)

    def tests_of(self, mutant: Mutant) -> set[str]:
        """The tests that run what changed: all where it runs at import."""
        if mutant.functions is None or mutant.lines & self.trace.at_import:
            return set(self.trace.seconds)
        return set().union(*(self.trace.lines.get(line, ()) for line in mutant.lines))

    def killed(self, mutant: Mutant, session: pytest.Session | None, existing: Functions) -> bool:
        """Whether a test fails: those of the first file first, quick ones before slow ones.

        Args:
            mutant: The change.
            session: Collected tests, whose functions get the changed code; without one they are collected anew.
            existing: The functions of the file.
        """
        names, seconds = self.tests_of(mutant), self.trace.seconds
        text = self.folder / "mutant.py"
        text.write_text(mutant.code)

        def loop(collected: pytest.Session) -> int:
            files = list(dict.fromkeys(item.path for item in collected.items))
            items = [item for item in collected.items if item.nodeid in names]
            cost = {item: seconds[item.nodeid] for item in items}
            return run_items(sorted(items, key=lambda item: (cost[item] > 1, files.index(item.path), cost[item])))

        def action() -> int:
            os.environ.update(MUTATED_FILE=str(self.path), MUTATED_TEXT=str(text))
            if session is not None:
                replace_code(existing, mutant.functions)
                try:
                    return loop(session)
                except Exception:  # pytest itself, whose files a mutant may close, fails as in a fresh process
                    return 1
            results = []
            code = Session(self.tests, self.folder, lambda collected: results.append(loop(collected))).run()
            return results[0] if results else code

        result = forked(action, 10 * sum(seconds[name] for name in names) + 20) if names else 0
        if result == ERROR:
            raise RuntimeError(f"cannot be tried: {mutant.name}")
        return result != 0

    def run(self, mutants: list[Mutant], report: Callable[[Mutant, bool], None]) -> None:
        """Try all: first, in fresh processes, those that change what runs at import."""
        inside = [m for m in mutants if m.functions is not None and not m.lines & self.trace.at_import]
        for mutant in mutants:
            if mutant not in inside:
                report(mutant, self.killed(mutant, None, {}))

        def loop(session: pytest.Session) -> None:
            existing = functions_of(self.path)
            for mutant in inside:
                report(mutant, self.killed(mutant, session, existing))

        if code := Session(self.tests, self.folder, loop).run():
            raise RuntimeError(f"pytest ended with {code}")
