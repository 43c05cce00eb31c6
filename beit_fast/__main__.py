"""`python -m beit_fast <command>`; training itself is in `recipes/`."""

import difflib
import sys


def doctor(arguments: list[str]) -> int:
    """doctor              what is installed, what is missing, what to do"""
    from beit_fast.cli.doctor import report as look

    lines, ready = look()
    print("\n".join(lines))
    return 0 if ready else 1


def report(arguments: list[str]) -> int:
    """report RUN          write the report.html of a run folder, finished or not"""
    from beit_fast.cli.pictures import report_command

    return report_command(arguments)


def compare(arguments: list[str]) -> int:
    """compare RUN...      lay the curves of several runs over each other, in one page"""
    from beit_fast.cli.pictures import compare_command

    return compare_command(arguments)


def visualize(arguments: list[str]) -> int:
    """visualize reconstructions|attention|codes   what a pre-trained model or a tokenizer has learnt, as pictures"""
    from beit_fast.cli.pictures import visualize_command

    return visualize_command(arguments)


def tokens(arguments: list[str]) -> int:
    """tokens IMAGE...     the visual tokens of images and what they decode to, for any tokenizer"""
    from beit_fast.cli.pictures import tokens_command

    return tokens_command(arguments)


def evaluate(arguments: list[str]) -> int:
    """evaluate CHECKPOINT [--data.path DIR]       top-1, top-5 and loss of a classifier"""
    from beit_fast.cli.predict import evaluate_command

    return evaluate_command(arguments)


def predict(arguments: list[str]) -> int:
    """predict CHECKPOINT IMAGE...                 the five likeliest classes of images"""
    from beit_fast.cli.predict import predict_command

    return predict_command(arguments)


def segment(arguments: list[str]) -> int:
    """segment CHECKPOINT IMAGE...                 classes of every pixel as colours over images"""
    from beit_fast.cli.predict import segment_command

    return segment_command(arguments)


def tune(arguments: list[str]) -> int:
    """tune                time the kernels' launch configurations on this GPU and keep the faster ones"""
    from beit_fast.kernels.tune import main as tune_kernels

    return tune_kernels(arguments)


COMMANDS = {
    "doctor": doctor, "report": report, "compare": compare, "evaluate": evaluate, "predict": predict,
    "segment": segment, "visualize": visualize, "tokens": tokens, "tune": tune,
}  # fmt: skip


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
