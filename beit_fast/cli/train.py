"""From a recipe's values to a run, and `beit-fast train NAME`, which finds a recipe by its name.

Exit codes: 0 complete, 75 saved on a signal (run the same command again), 2 wrong option, 1 any other error, 130
Ctrl-C where there is nothing to save.
"""

import ast
import contextlib
import difflib
import os
import resource
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from beit_fast.cli.demo import banner, demo_of
from beit_fast.cli.options import did_you_mean, errors_in_one_line, fail, parse, typed_options
from beit_fast.train import engine
from beit_fast.train.config import RunConfig
from beit_fast.train.distributed import launch
from beit_fast.train.distributed.world import LostRank, OtherRankFailed
from beit_fast.train.memory import OutOfMemory
from beit_fast.train.task import Task
from beit_fast.train.tasks.start import with_images_seen
from beit_fast.train.tasks.weights import with_weights

Config = TypeVar("Config", bound=RunConfig)

RECIPES = Path(__file__).parents[1] / "recipes"
BY_NAME = "beit-fast train "
RUN_ERRORS = (engine.PersistentNonFiniteGradients, LostRank, OtherRankFailed, OutOfMemory)
"""Errors of a run whose message is written for the user, beside those of every command."""


def main(
    config: Config,
    task: Callable[[Config], Task],
    description: str | None = "",
    *,
    demo: bool = True,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Run a recipe: its values `config`, overridden by the command line.

    Args:
        config: values of the recipe.
        task: makes the task of a configuration.
        description: what `--help` says first; a recipe's docstring.
        demo: where the command line names no data (`data.path` is None), take the short values of `demo_of(config)`.
        arguments: of the command line; None takes those of this program.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    program = _program()
    chosen: Config | None = None
    with errors_in_one_line(lambda: _keep_traceback(chosen), RUN_ERRORS):
        chosen = parse(config, arguments, program, description or "")
        has_data = getattr(getattr(chosen, "data", None), "path", None) is not None
        short = demo_of(config) if demo and not has_data and not chosen.dry_run else None
        if short is not None:
            chosen = parse(short, arguments, program)  # type: ignore[assignment]
            if os.environ.get("RANK", "0") == "0":
                print(banner(config, chosen, f"torchrun --nproc-per-node 8 {_for_torchrun(program)}"), flush=True)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # shards, checkpoints and workers need many files at once
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if getattr(chosen, "weights", None) is not None and not getattr(chosen, "scratch", False):
            typed = typed_options(chosen, arguments)
            chosen = with_images_seen(with_weights(chosen, typed), typed)
        if chosen.dry_run:
            from beit_fast.cli.plan import plan

            plan(task, chosen, stand_in=demo)
            raise SystemExit(0)
        if chosen.gpus is not None and not launch.is_worker():
            raise SystemExit(launch.launch(chosen.gpus, chosen.device))
        if chosen.replay is not None:
            from beit_fast.cli.replay import replay

            raise SystemExit(replay(task(chosen)))
        raise SystemExit(engine.run(task(chosen)).exit_code)


def _program() -> str:
    """This program as it was typed: `beit-fast train NAME`, or the path of a recipe."""
    if sys.argv[0].startswith(BY_NAME):
        return sys.argv[0]
    path = Path(sys.argv[0])
    with contextlib.suppress(ValueError):
        path = path.resolve().relative_to(Path.cwd())
    return str(path)


def _for_torchrun(program: str) -> str:
    return program.replace("beit-fast", "-m beit_fast", 1) if program.startswith(BY_NAME) else program


def _keep_traceback(config: RunConfig | None) -> None:
    """The one line is for the user; where it came from is kept in the run folder."""
    with contextlib.suppress(OSError):
        if config is not None and (config.output_dir / "config.json").exists():
            (config.output_dir / "traceback.txt").write_text(traceback.format_exc())


def train_command(arguments: Sequence[str]) -> int:
    """Run the recipe named first with the options that follow; without a name, list the recipes."""
    recipes = {path.stem: path for path in sorted(RECIPES.glob("*.py"))}
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: beit-fast train RECIPE [options]; beit-fast train RECIPE --help lists the options\n")
        for name, path in recipes.items():
            about = ast.get_docstring(ast.parse(path.read_text())) or ""
            print(f"  {name:<30} {about.splitlines()[0]}")
        return 0
    name = Path(arguments[0]).stem if arguments[0].endswith(".py") else arguments[0]
    if name not in recipes:
        near = did_you_mean(difflib.get_close_matches(name, recipes, n=3, cutoff=0.4))
        fail(f"there is no recipe {name!r}; {near or 'beit-fast train lists them'}", code=2)
    sys.argv = [f"{BY_NAME}{name}", *arguments[1:]]
    runpy.run_module(f"beit_fast.recipes.{name}", run_name="__main__")
    return 0
