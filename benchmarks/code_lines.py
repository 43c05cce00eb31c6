"""Lines of code of the Python outside tests, without blank lines, comments and docstrings.

    python -m benchmarks.code_lines             # this checkout, by folder
    python -m benchmarks.code_lines FOLDER      # another one

A docstring is any statement that is a string alone, attribute docstrings included. The total was 20,530 at 073a3e4.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """Number of lines of a module that hold code."""
    strings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for t in tokens if t.type not in LAYOUT for line in range(t.start[0], t.end[0] + 1)}
    return len(lines - strings)


def by_folder(root: Path) -> Counter[str]:
    """Lines of code under `root` that git knows and that are no tests, by folder (two levels inside the packages)."""
    names = subprocess.check_output(["git", "-C", str(root), "ls-files", "*.py"], text=True).splitlines()
    lines: Counter[str] = Counter()
    for name in names:
        parts = name.split("/")
        if parts[0] != "tests":
            deep = parts[0] in ("beit_fast", "kernels", "benchmarks") and len(parts) > 2
            lines["/".join(parts[: 2 if deep else 1])] += code_lines((root / name).read_text())
    return lines


if __name__ == "__main__":
    counted = by_folder(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])
    for folder, number in sorted(counted.items()):
        print(f"{number:6d} {folder}")
    print(f"{counted.total():6d} total")
