"""The small mistakes in a file: cosmic-ray's operators, and in which functions each changes something."""

from __future__ import annotations

import ast
import difflib
import gc
import inspect
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType


@dataclass
class Mutant:
    """A changed text of the file, what changed in it, and in which functions (None: in code that runs at import)."""

    name: str
    code: str
    lines: set[int]
    functions: list[tuple[CodeType, CodeType]] | None


def mutants_of(code: str, operators: list[str]) -> list[Mutant]:
    """One mutant for each place of each operator, named "old line -> new line" (with a number where names repeat)."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    compiled, statements = compile(code, "mutant", "exec"), list(_statements(code))
    mutants: dict[str, Mutant] = {}
    names: Counter[str] = Counter()
    for operator_name in operators:
        operator, occurrence = get_operator(f"core/{operator_name}")(), 0
        while True:
            try:
                changed = mutate_code(code, operator, occurrence)
            except AttributeError:  # ExceptionReplacer meets a dotted name
                changed = code
            if changed is None:
                break
            occurrence += 1
            diff = list(difflib.unified_diff(code.splitlines(), changed.splitlines(), n=0, lineterm=""))[2:]
            old, new = (" ".join(line[1:].strip() for line in diff if line[0] == sign) for sign in "-+")
            name = f"{old} -> {new}"
            if old == new or changed in mutants:
                continue
            names[name] += 1
            line = int(re.match(r"@@ -(\d+)", diff[0])[1])
            around = min((lines for lines in statements if line in lines), key=len, default=range(line, line + 1))
            try:
                functions = _changed_functions(compiled, compile(changed, "mutant", "exec"))
            except SyntaxError:
                continue
            name += f" ({names[name]})" * (names[name] > 1)
            mutants[changed] = Mutant(name, changed, set(around), functions)
    return list(mutants.values())


def _statements(code: str) -> Iterator[range]:
    """The lines of each statement; of a compound one those of its head."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            body = getattr(node, "body", None)
            yield range(node.lineno, max(body[0].lineno if body else node.end_lineno + 1, node.lineno + 1))


def _parts(code: CodeType) -> list[CodeType]:
    return [value for value in code.co_consts if isinstance(value, CodeType)]


def _same(old: CodeType, new: CodeType, deep: bool = True) -> bool:
    """Whether both do the same, wherever their lines stand."""

    def text(code: CodeType) -> tuple:
        constants = [value for value in code.co_consts if not isinstance(value, CodeType)]
        # Two sets of the same words may be listed in two orders.
        values = [sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value) for value in constants]
        return code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, values

    parts = list(zip(_parts(old), _parts(new), strict=False))
    alike = text(old) == text(new) and len(_parts(old)) == len(_parts(new))
    return alike and (not deep or all(_same(*pair) for pair in parts))


def _changed_functions(old: CodeType, new: CodeType) -> list[tuple[CodeType, CodeType]] | None:
    """The functions of a module or class that differ; None where code that runs at import does."""
    if not _same(old, new, deep=False):
        return None
    found = []
    for before, after in zip(_parts(old), _parts(new), strict=True):
        if _same(before, after):
            continue
        if before.co_flags & inspect.CO_OPTIMIZED:  # a function, or what is one inside: a comprehension runs at import
            inner = None if before.co_name.startswith("<") else [(before, after)]
        else:
            inner = _changed_functions(before, after)
        if inner is None:
            return None
        found += inner
    return found


Functions = dict[tuple[str, int], list[FunctionType]]
"""Functions by name and first line; more than one where a function makes them."""


def functions_of(path: Path) -> Functions:
    """The functions of an imported file."""
    found: Functions = {}
    for function in gc.get_objects():
        if type(function) is FunctionType and os.path.realpath(function.__code__.co_filename) == str(path):
            found.setdefault(_key(function.__code__), []).append(function)
    return found


def replace_code(existing: Functions, changed: list[tuple[CodeType, CodeType]]) -> None:
    """Give the functions of an imported file the code of a mutant."""
    for old, new in changed:
        for function in existing[_key(old)]:
            function.__code__ = new


def _key(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno
