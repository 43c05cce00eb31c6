"""The words of `beit-fast` itself: its version, a command that there is not, a library that is missing."""

import pytest

from beit_fast.cli import main as command
from beit_fast.version import __version__


def test_version(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"beit-fast {__version__}\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian", "x"], "error: unknown command 'trian'; did you mean train?\n"),
        (["zzz"], "error: unknown command 'zzz'; there are train, evaluate, predict,"),
    ],
)
def test_an_unknown_command_ends_in_one_line(words, hint, capsys):
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(hint)
    assert error.count("\n") == 1


def test_a_missing_library_is_named_and_our_own_mistakes_are_not_hidden(monkeypatch, capsys):
    def needs(name):
        def run(arguments):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return run

    monkeypatch.setitem(command.COMMANDS, "tune", needs("tyro"))
    assert command.main(["tune"]) == 1
    assert capsys.readouterr().err == "error: tyro is not installed: pip install 'beit-fast[train]'\n"
    monkeypatch.setitem(command.COMMANDS, "tune", needs("beit_fast.nowhere"))
    with pytest.raises(ModuleNotFoundError, match=r"beit_fast\.nowhere"):
        command.main(["tune"])
