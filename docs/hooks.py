"""Hooks of the documentation site.

Files outside of docs/ that its pages link to come along, under their own paths; the table of errors is filled in.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import errors  # noqa: E402

ERRORS = re.compile(r"<!-- errors: (.+) -->")
LINK = re.compile(r"(\]\()([^)#\s:]+)")  # of Markdown links to files: no anchors, no other sites


def on_files(files: Files, config: Any) -> Files:
    """Add every file of the repository that a page links to by a path that leads out of docs/."""
    pending = [file.src_uri for file in files.documentation_pages()]
    while pending:
        uri = pending.pop()
        file = files.get_file_from_path(uri)
        assert file is not None
        for path in outside(uri, file.content_string):
            if files.get_file_from_path(path) is None and (ROOT / path).is_file():
                added = File.generated(config, path, abs_src_path=str(ROOT / path))
                files.append(added)
                if added.is_documentation_page():
                    pending.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that lead out of docs/ into links to the files that came along, and fill in the tables of errors."""
    uri = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        target = repository_path(uri, match[2])
        return match[1] + (os.path.relpath(site_path(target), PurePosixPath(uri).parent) if target else match[2])

    return ERRORS.sub(lambda match: errors.table(match[1]), LINK.sub(moved, markdown))


def outside(uri: str, markdown: str) -> list[str]:
    """Site paths, which are repository paths without a leading docs/, of the files that a page links to."""
    return [site_path(target) for match in LINK.finditer(markdown) if (target := repository_path(uri, match[2]))]


def repository_path(uri: str, link: str) -> str | None:
    """What a link in the page `uri` means, as a path from the root of the repository; None where there is no file."""
    home = PurePosixPath("docs", uri) if (ROOT / "docs" / uri).exists() else PurePosixPath(uri)
    target = os.path.normpath(home.parent / link)
    return target if (ROOT / target).is_file() else None


def site_path(target: str) -> str:
    return target.removeprefix("docs/")
