"""From a recipe's values to a run: command line, one-line errors, exit code.

    main(paper, MaskedImageModeling, demo=demo)

Exit codes: 0 complete, 75 saved on a signal (run the same command again), 2 wrong option, 1 any other error.
"""

import contextlib
import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from beit_fast.data.screening import TooManyBadImages
from beit_fast.train import engine
from beit_fast.train.config import RunConfig
from beit_fast.train.distributed import launch
from beit_fast.train.distributed.world import LostRank
from beit_fast.train.memory import OutOfMemory
from beit_fast.train.task import Task

Config = TypeVar("Config", bound=RunConfig)

EXPECTED_ERRORS = (
    ValueError,
    OSError,
    ModuleNotFoundError,
    TooManyBadImages,
    engine.PersistentNonFiniteGradients,
    LostRank,
    OutOfMemory,
)
"""Errors whose message is written for the user; any other is a bug and shows its traceback."""


def parse(default: Config, arguments: Sequence[str]) -> Config:
    """`default` with the fields given on the command line replaced; exits with 2 and one line on a wrong option."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config, unknown = tyro.cli(type(default), default=default, args=list(arguments), return_unknown_args=True)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        fail(_one_line(captured.getvalue()), code=2)
    if unknown:
        options = option_names(default)
        wrong = unknown[0].split("=")[0].replace("_", "-")
        if not wrong.startswith("--"):
            fail(f"unexpected argument {unknown[0]!r}; options look like --optim.lr 1e-3, --help lists them", code=2)
        leaves = {name.rsplit(".", 1)[-1].lstrip("-"): name for name in options}
        leaf = wrong.rsplit(".", 1)[-1].lstrip("-")
        near = [leaves[leaf]] if leaf in leaves else difflib.get_close_matches(wrong, options, n=1)
        near = near or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1)]
        fail(f"unknown option {wrong}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"), code=2)
    return config


def option_names(config: object, prefix: str = "--") -> list[str]:
    """Every option of a configuration, dotted."""
    import dataclasses

    names: list[str] = []
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        name = prefix + f.name.replace("_", "-")
        names += option_names(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return names


def _one_line(box: str) -> str:
    """tyro's error box as one line: the text up to its first rule."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    text = []
    for line in lines:
        if re.fullmatch("─+", line):
            break
        text.append(line)
    return " ".join(text) or " ".join(box.split()) or "wrong command line; --help lists the options"


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and out."""
    rank = os.environ.get("RANK", "0")
    start = "error: " if rank == "0" else f"error (rank {rank}): "
    print(start + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(code)


def main(
    config: Config,
    task: Callable[[Config], Task],
    *,
    demo: Config | None = None,
    banner: Callable[[Config, Config], str] | None = None,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Run a recipe: its values `config`, overridden by the command line.

    Where `demo` is given and the parsed configuration names no data (`data.path` is None), the values of `demo` take
    the place of `config`'s, the command line overrides those, and `banner(config, demo)` is printed first.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parse(config, arguments)
    if demo is not None and getattr(getattr(chosen, "data", None), "path", None) is None:
        chosen = parse(demo, arguments)
        if banner is not None and os.environ.get("RANK", "0") == "0":
            print(banner(config, chosen), flush=True)
    try:
        if chosen.dry_run:
            from beit_fast.cli.plan import plan

            plan(task(chosen), chosen)
            raise SystemExit(0)
        if chosen.gpus is not None and not launch.is_worker():
            raise SystemExit(launch.launch(chosen.gpus, chosen.device))
        if chosen.replay is not None:
            from beit_fast.cli.replay import replay

            raise SystemExit(replay(task(chosen), chosen))
        result = engine.run(task(chosen), chosen)
    except EXPECTED_ERRORS as error:
        _keep_traceback(chosen)
        fail(_message(error), code=1)
    raise SystemExit(result.exit_code)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and not error.filename:
        return error.strerror
    return str(error) or type(error).__name__


def _keep_traceback(config: RunConfig) -> None:
    """The one line is for the user; where it came from is kept in the run folder."""
    with contextlib.suppress(OSError):
        if (config.output_dir / "config.json").exists():
            (config.output_dir / "traceback.txt").write_text(traceback.format_exc())
