"""The pages of the documentation and what stands in their code blocks."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.stem for page in PAGES]


@dataclass(frozen=True)
class Block:
    """A fenced block of code of one page."""

    language: str
    code: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block."""
        joined = self.code.replace("\\\n", " ")
        lines = [line.split("  #")[0].strip() for line in joined.splitlines()]
        return [shlex.split(line) for line in lines if line and not line.startswith("#")]


def page(name: str) -> Path:
    return PAGES[NAMES.index(name)]


def blocks(name: str) -> list[Block]:
    """The blocks of a page, in order; ones without a language are output and are left out."""
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```", page(name).read_text(), re.S | re.M)]


def inline(name: str) -> list[str]:
    """Code within sentences."""
    text = re.sub(r"^```.*?^```", "", page(name).read_text(), flags=re.S | re.M)
    return re.findall(r"`([^`\n]+)`", text)
