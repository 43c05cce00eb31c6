"""From a command line to a dataclass of options, and from an error to one line and an exit code."""

import collections
import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from beit_fast.data.screening import TooManyBadImages
from beit_fast.data.sources.source import SourceUnavailable
from beit_fast.train.config import expand_home

Options = TypeVar("Options")

USER_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    OSError,
    ModuleNotFoundError,
    TooManyBadImages,
    SourceUnavailable,
)
"""Errors whose message is written for the user; any other is a bug and shows its traceback."""


def parse(default: Options, arguments: Sequence[str], program: str | None = None, description: str = "") -> Options:
    """Return `default` with the fields given on the command line replaced.

    A wrong option ends the program with code 2 and one line; `--help` prints `description` and every option.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            parsed: Any = tyro.cli(
                type(default), prog=program, description=description or None, default=default, args=list(arguments),
                return_unknown_args=True,
            )  # fmt: skip
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        message = _one_line(captured.getvalue())
        reason = re.sub(r"^Error parsing [\w.-]+: (?=--)", "", message)  # from a dataclass that checks itself
        fail(reason, code=2 if reason == message else 1)
    options, unknown = parsed
    several = next((f.name for f in dataclasses.fields(default) if "Positional[tuple" in str(f.type)), None)  # type: ignore[arg-type]
    if several is not None:  # files behind an option that stands among them
        more = [Path(word) for word in unknown if not word.startswith("-")]
        options = dataclasses.replace(options, **{several: (*getattr(options, several), *more)})
        unknown = [word for word in unknown if word.startswith("-")]
    if unknown:
        wrong = unknown[0].split("=")[0].replace("_", "-")
        if not wrong.startswith("--"):
            fail(f"unexpected argument {unknown[0]!r}; options look like --optim.lr 1e-3, --help lists them", code=2)
        near = nearest_options(wrong, option_names(default))
        fail(f"unknown option {wrong}; {did_you_mean(near) or '--help lists them'}", code=2)
    for stream in (sys.stdout, sys.stderr):  # names of files and classes may be no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")
    result: Options = expand_home(options)
    return result


def option_names(config: object, prefix: str = "--") -> list[str]:
    """Every option of a configuration, dotted."""
    names: list[str] = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        name = prefix + field.name.replace("_", "-")
        names += option_names(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return names


def typed_options(config: object, arguments: Sequence[str]) -> set[str]:
    """Names of the fields of `config` that a command line sets, dotted: `--model.image-size 64` is model.image_size."""
    words = {word.split("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    names = {}
    for option in option_names(config):
        head, _, last = option.rpartition(".")
        negated = f"{head}.no-{last}" if head else f"--no-{last.removeprefix('--')}"
        names[option] = names[negated] = option.removeprefix("--").replace("-", "_")
    return {names[word] for word in words if word in names}


def nearest_options(wrong: str, options: Sequence[str]) -> list[str]:
    """Up to three options that `wrong` may stand for: that of the same last name, else the nearest ones."""
    last = wrong.rsplit(".", 1)[-1].lstrip("-")
    by_last_name = {name.rsplit(".", 1)[-1].lstrip("-"): name for name in options}
    if last in by_last_name:
        return [by_last_name[last]]
    return nearest(wrong, options) or [by_last_name[name] for name in nearest(last, list(by_last_name))]


def nearest(wrong: str, names: Sequence[str]) -> list[str]:
    """The nearest three names, best first; fewer where not so many are near."""
    return difflib.get_close_matches(wrong, names, n=3)


def did_you_mean(names: Sequence[str]) -> str:
    """`did you mean a? Or b? Or c?`; empty where `names` is."""
    return f"did you mean {'? Or '.join(names)}?" if names else ""


def _one_line(box: str) -> str:
    """tyro's error box, drawn with or without Unicode, as one line: the text between its first two rules."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    rules = [number for number, line in enumerate(lines) if re.search("(─|-){5,}$", line)]
    text = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else []
    return " ".join(text) or " ".join(box.split()) or "wrong command line; --help lists the options"


def output_names(images: Sequence[Path]) -> list[str]:
    """Name what is made of each image: by its stem, or, where two share one, by its path.

    Raises:
        ValueError: two images would still get one name.
    """
    parts = [path.absolute().parts for path in images]
    shared = len(Path(os.path.commonpath([path.absolute().parent for path in images])).parts)
    stems = collections.Counter(path.stem for path in set(images))
    names = [
        path.stem if stems[path.stem] == 1 else "_".join(part[shared:])
        for path, part in zip(images, parts, strict=True)
    ]
    first: dict[str, Path] = {}
    for name, path in zip(names, images, strict=True):
        if first.setdefault(name, path) != path:
            raise ValueError(f"{first[name]} and {path} would both be written as {name}; give them one after the other")
    return names


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr and end the program with `code`: 2 for a wrong command line, 1 for the rest."""
    rank = os.environ.get("RANK", "0")
    start = "error: " if rank == "0" else f"error (rank {rank}): "
    print(start + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextlib.contextmanager
def errors_in_one_line(on_error: Callable[[], None] | None = None, more: tuple[type[Exception], ...] = ()) -> Any:
    """End the program with one line and code 1 on an error written for the user, after `on_error()`; 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; there was nothing to save", code=130)
    except (*USER_ERRORS, *more) as error:
        if on_error is not None:
            on_error()
        text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
        fail(text or type(error).__name__, code=1)
