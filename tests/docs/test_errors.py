"""Every error message of the program has a way out on docs/errors.md."""

import sys

import pytest

from tests.docs.pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import errors


def test_every_message_has_a_way_out():
    """One that has none: end the message with "; what to do", or add a rule to docs/errors.py."""
    messages = errors.messages()
    assert len(messages) > 300
    assert [f"{message.place}: {message.text}" for message in messages if not message.way_out] == []


def test_every_area_is_on_the_page():
    page = (ROOT / "docs/errors.md").read_text()
    assert [area for area in errors.AREAS if f"## {area}\n\n<!-- errors: {area} -->" not in page] == []


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise ValueError(f'--steps is {n}, it must be at least 1')", "--steps is …, it must be at least 1"),
        ("fail('report takes one run folder', code=2)", "report takes one run folder"),
        ("raise OSError(errno.ENOSPC, f'{root}: the disk is full')", "…: the disk is full"),
        ("raise module.Broken('no header')", "no header"),
    ],
)
def test_messages_are_found(tmp_path, monkeypatch, source, text):
    path = tmp_path / "module.py"
    path.write_text(f"def f():\n    {source}\n")
    monkeypatch.setattr(errors, "ROOT", tmp_path)
    (message,) = errors.in_file("Area", path)
    assert message.text == text


def test_a_message_without_a_way_out_is_noticed():
    assert errors.Message("Area", "it went wrong", "ValueError", "x.py").way_out == ""
    assert errors.Message("Area", "no such folder: …", "ValueError", "x.py").way_out.startswith("Check the path")
    assert errors.Message("Area", "it is full; free some space", "OSError", "x.py").way_out == "As the message says."
