"""Commands as a user types them."""

from beit_fast.cli.main import main


def beit(*words):
    """`beit-fast WORDS`; returns its exit code."""
    arguments = [part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])]
    try:
        return main(arguments)
    except SystemExit as done:
        return done.code or 0
