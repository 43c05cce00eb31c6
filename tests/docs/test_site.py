"""The documentation builds without a network and without a warning, and nothing on it is dead or empty."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.site import problems

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # 15 s, and what most changes cannot break; .ci/run has it
def test_the_site_builds_strictly_and_has_no_dead_link_empty_heading_or_blank_picture(tmp_path):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert problems(tmp_path / "site") == []
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in (tmp_path / "site").glob("*.html")}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="b.html">b</a>', "dead link b.html"),
        ('<a href="#x">x</a>', "dead anchor #x"),
        ('<a href="a.html#x">x</a>', "dead anchor a.html#x"),
        ('<h2><a id="h"></a>¶</h2>', "a heading without text"),
        ('<img src="white.png" alt="w">', "white.png is blank"),
        ('<img src="empty.svg" alt="e">', "empty.svg is blank"),
        ('<img src="none.png" alt="n">', "no picture none.png"),
        ('<img src="half.png">', "has no alternative text"),
        ('<script src="https://example.com/x.js"></script>', "fetches https://example.com/x.js"),
    ],
)
def test_every_problem_is_found(tmp_path, body, problem):
    Image.new("RGB", (4, 4), "white").save(tmp_path / "white.png")
    half = Image.new("RGB", (4, 4), "white")
    half.putpixel((0, 0), (0, 0, 0))
    half.save(tmp_path / "half.png")
    (tmp_path / "empty.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>')
    (tmp_path / "a.html").write_text(f"<h1 id='top'>A</h1><a href='#top'>up</a>{body}")
    (found,) = problems(tmp_path)
    assert problem in found
