"""`beit-fast <command>`, the same as `python -m beit_fast <command>`."""

import difflib
import sys
from collections.abc import Sequence

from beit_fast.version import __version__


def train(arguments: list[str]) -> int:
    """train RECIPE [OPTIONS]            train by a recipe of the paper; without a name it lists them"""
    from beit_fast.cli.train import train_command

    return train_command(arguments)


def evaluate(arguments: list[str]) -> int:
    """evaluate CHECKPOINT [OPTIONS]     top-1, top-5 and loss of a classifier, mIoU of a segmentation model"""
    from beit_fast.cli.evaluate import evaluate_command

    return evaluate_command(arguments)


def predict(arguments: list[str]) -> int:
    """predict CHECKPOINT IMAGE...       the five likeliest classes of images"""
    from beit_fast.cli.predict import predict_command

    return predict_command(arguments)


def segment(arguments: list[str]) -> int:
    """segment CHECKPOINT IMAGE...       the class of every pixel, as colours over images"""
    from beit_fast.cli.predict import segment_command

    return segment_command(arguments)


def embed(arguments: list[str]) -> int:
    """embed MODEL IMAGES FILE           features of images, as .npy or .parquet"""
    from beit_fast.cli.embed import embed_command

    return embed_command(arguments)


def knn(arguments: list[str]) -> int:
    """knn MODEL IMAGES                  k-NN accuracy of a model's features on a labelled set"""
    from beit_fast.cli.embed import knn_command

    return knn_command(arguments)


def stats(arguments: list[str]) -> int:
    """stats IMAGES                      mean, deviation and range of pixels, for --data.normalization"""
    from beit_fast.cli.stats import stats_command

    return stats_command(arguments)


def export(arguments: list[str]) -> int:
    """export RUN FOLDER --to TARGET     as files of timm, transformers, onnx or torch-export, compared with the run"""
    from beit_fast.cli.export import export_command

    return export_command(arguments)


def verify(arguments: list[str]) -> int:
    """verify NAME --data.path VAL       a published number beside what released weights give here"""
    from beit_fast.cli.verify import verify_command

    return verify_command(arguments)


def report(arguments: list[str]) -> int:
    """report RUN                        write the report.html of a run folder, finished or not"""
    from beit_fast.cli.pictures import report_command

    return report_command(arguments)


def compare(arguments: list[str]) -> int:
    """compare RUN RUN...                the curves of several runs on one page"""
    from beit_fast.cli.pictures import compare_command

    return compare_command(arguments)


def visualize(arguments: list[str]) -> int:
    """visualize KIND ...                reconstructions, attention or codes: what a model or a tokenizer has learnt"""
    from beit_fast.cli.pictures import visualize_command

    return visualize_command(arguments)


def tokens(arguments: list[str]) -> int:
    """tokens IMAGE...                   the visual tokens of images and what they decode to, for any tokenizer"""
    from beit_fast.cli.pictures import tokens_command

    return tokens_command(arguments)


def doctor(arguments: list[str]) -> int:
    """doctor                            what is installed, what is missing, what to do"""
    from beit_fast.cli.doctor import doctor_command

    return doctor_command(arguments)


def tune(arguments: list[str]) -> int:
    """tune                              time the kernels' launch configurations on this GPU and keep the faster ones"""
    from beit_fast.kernels.tune import main as tune_command

    return tune_command(arguments)


COMMANDS = {
    command.__name__: command
    for command in (
        train,
        evaluate,
        predict,
        segment,
        embed,
        knn,
        stats,
        export,
        verify,
        report,
        compare,
        visualize,
        tokens,
        doctor,
        tune,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; 2 where there is none of that name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print("usage: beit-fast COMMAND ...; beit-fast COMMAND --help lists the options of one\n")
        print("\n".join(f"  {command.__doc__}" for command in COMMANDS.values()))
        return 0
    if words[0] == "--version":
        print(f"beit-fast {__version__}")
        return 0
    if words[0] not in COMMANDS:
        near = "? Or ".join(difflib.get_close_matches(words[0], COMMANDS, n=3))
        hint = f"did you mean {near}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: unknown command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[words[0]](words[1:])
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("beit_fast"):
            raise
        print(f"error: {missing.name} is not installed: pip install 'beit-fast[train]'", file=sys.stderr)
        return 1
