"""The first screen: short, and every link, extra and make target that it names is there."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "recipes/README.md"]


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert len(README.split()) <= 1200
    cells = [cell for line in lines if line.startswith("|") for cell in line.split("|")]
    assert max(map(len, cells), default=0) <= 200
    assert any(line.startswith("pip install") for line in lines[:30])
    assert any("benchmarks/pictures/" in line and line.startswith("![") for line in lines[:20])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_make_target_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set()
    for page in [*PAGES, *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md", ROOT / "kernels/README.md"]:
        named |= set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE))
    assert named - targets == set()


def test_the_badges_say_what_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(name for name in project["dependencies"] if name.startswith("torch>="))
    said = {
        "python": project["requires-python"].removeprefix(">=") + " or newer",
        "torch": torch.removeprefix("torch>=") + " or newer",
        "licence": project["license"],
    }
    for name, value in said.items():
        assert f">{value}</text>" in (ROOT / f"docs/assets/badge-{name}.svg").read_text()
        assert f"badge-{name}.svg" in README
