"""`python -m beit_fast <command>`; training itself is in `recipes/`."""

import difflib
import sys
from pathlib import Path


def doctor(arguments: list[str]) -> int:
    """doctor              what is installed, what is missing, what to do"""
    from beit_fast.doctor import report

    lines, ready = report()
    print("\n".join(lines))
    return 0 if ready else 1


def plot(arguments: list[str]) -> int:
    """plot RUN_FOLDER     draw the loss of a run, finished or not, into its loss.png"""
    from beit_fast.visualize.run_report import loss_picture

    if len(arguments) != 1 or not (Path(arguments[0]) / "metrics.jsonl").is_file():
        print("error: plot takes one run folder, which holds a metrics.jsonl", file=sys.stderr)
        return 2
    print(loss_picture(Path(arguments[0])))
    return 0


def evaluate(arguments: list[str]) -> int:
    """evaluate CHECKPOINT [--data.path DIR]       top-1, top-5 and loss of a classifier"""
    from beit_fast.train.commands import evaluate_command

    return evaluate_command(arguments)


def predict(arguments: list[str]) -> int:
    """predict CHECKPOINT IMAGE...                 the five likeliest classes of images"""
    from beit_fast.train.commands import predict_command

    return predict_command(arguments)


def tune(arguments: list[str]) -> int:
    """tune                time the kernels' launch configurations on this GPU and keep the faster ones"""
    from beit_fast.kernels.tune import main as tune_kernels

    return tune_kernels(arguments)


COMMANDS = {"doctor": doctor, "plot": plot, "evaluate": evaluate, "predict": predict, "tune": tune}


def main(arguments: list[str]) -> int:
    """Run a command; 2 where there is none of that name."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n\n" + "\n".join(f"  {command.__doc__}" for command in COMMANDS.values()))
        return 0
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1) or list(COMMANDS)
        print(f"error: unknown command {arguments[0]!r}; did you mean {' or '.join(near)}?", file=sys.stderr)
        return 2
    return COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
