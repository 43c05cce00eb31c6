"""Every error message in the sources, and the way out of each: the table of docs/errors.md.

A message names its own way out after its last semicolon or full stop, or `RULES` has one for it. A test demands one or
the other of every message.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AREAS = {
    "Command line": ("beit_fast/cli",),
    "Runs and checkpoints": ("beit_fast/train",),
    "Images, labels and caches": ("beit_fast/data",),
    "Tokenizers": ("beit_fast/tokenizers",),
    "Models and weights": ("beit_fast/models", "beit_fast/nn", "beit_fast/integrations"),
    "Kernels": ("kernels",),
    "Pictures": ("beit_fast/visualize",),
}
SAYS_IT = re.compile(
    r"; (?:[^;]+)$|: --|: mean or"
    r"|: (?:put|give|choose|use|raise|lower|write|pip|return|name|for|leave|read|install|mask|repeat|save"
    r"|load|call|pass|set|make|start|remove|keep|run|name|`)\b"
    r"|(?:[.] |, )(?:Fetch|If you|use|give)\b"
    r"|pip install|did you mean|[Ww]ithout a network|see |must be the …|one of them must|--help"
)
"""Messages that name their way out themselves."""

RULES = [
    (
        r"^(evaluate|predict|segment|report|compare|tokens|visualize|embed|export|knn|stats) ?.*(takes|RUN, )",
        "Type it as the message shows.",
    ),
    (r"^…$|^… ?…$", "The message is that of the error underneath; `traceback.txt` in the run folder has the rest."),
    (
        r"is not a run folder",
        "Give the folder that `--output-dir` named, of a run of the kind that the command is for.",
    ),
    (
        r"classes, the classifier has|names of classes, but",
        "Evaluate on data with the classes of the training, under the same names.",
    ),
    (r"is none of the steps", "Take a step number from `anomalies.jsonl`, and the `--output-dir` of that run."),
    (
        r"sound checkpoint|no checkpoint",
        "All of them are damaged or none was written yet: start again with `--fresh`, or give a file of weights.",
    ),
    (r"has not finished", "Let the run finish (the same command continues it), or name a file of weights."),
    (r"averaged weights", "Continue without `--optim.ema-decay`, or start anew with `--fresh`."),
    (
        r"optimizer state|of the checkpoint (lacks|holds)|has shape …, the model",
        "The checkpoint is of another model: repeat the settings of its run, or take another `--output-dir`.",
    ),
    (
        r"MANIFEST|manifest|crc32|bytes instead of",
        "The run goes back to the checkpoint before it, by itself; delete this one. If disks fail, copy the "
        "run elsewhere.",
    ),
    (
        r"did not write its part|lost another one",
        "Another process failed first: its own message says why. The same command continues the run.",
    ),
    (r"not divisible by the … processes", "Take a `--batch-size` that is a multiple of the number of processes."),
    (
        r"CUDA device|torch sees no CUDA|is not one of auto, cpu|is on …, the step runs on",
        "Take a `--device` or `--gpus` that this machine has; `beit-fast doctor` lists them.",
    ),
    (
        r"has no blocks|finds no tensors|no tensors can be found|unreachable|do not describe",
        "Leave the option out, or report it: with a model of this library it does not happen.",
    ),
    (r"^--cuda-graph", "Leave out `--cuda-graph`, or meet what the message says."),
    (
        r"predecessor|does not know split|context is exchanged|only views that repeat|masks of one size|"
        r"random weights$|16 bits|exceeds --",
        "Change the option as the message says.",
    ),
    (
        r"no such (folder|file)|not found|is not a file|is a file",
        "Check the path; relative paths start where the command was typed.",
    ),
    (r"permission denied", "Give the user of the run the right to read it."),
    (
        r"no images|not one of its images|nothing usable|NOTHING_USABLE|Not one",
        "Check the path; the message says which files count as images.",
    ),
    (r"have no label|no label", "Add the missing label files, or take the images out."),
    (r"^backend 'xformers'", "Install the xformers that fits this PyTorch, or take another backend: `auto`, `sdpa`."),
    (r"^accelerate takes", "Give the model itself, as the message shows."),
    (r"^--resume-from", "Name one of the steps or folders that the message lists."),
    (r"^cannot read", "Check that the file is still there and may be read; the same command continues the run."),
    (r"^--weights is missing", "Give `--weights`, or `--scratch` for random ones."),
    (
        r"stands? for|are not in it|two classes for",
        "Make the classes of training and validation agree: same folder names, or numbers, in both.",
    ),
    (r"of remote data", "Give tar shards by their addresses, as the message shows."),
    (r"size of a member|negative size|pax record|extended header", "The shard is damaged: fetch or pack it again."),
    (r"a class must be a number", "Write the number of the class into the `.cls` entry."),
    (
        r"tar archive|cut off at byte|the archive|member at byte",
        "Fetch or pack the file again; tar shards must not be compressed.",
    ),
    (r"CIFAR|persistent objects|text in", "Extract the archive of CIFAR-100 again, or take its binary version."),
    (r"column …|parquet", "Give a parquet file whose image column holds bytes."),
    (
        r"bad images|unusable|_summary",
        "Repair or remove the files in `bad_files.tsv`, or raise `--data.max-bad-share`.",
    ),
    (
        r"labels: |expected numbers|parameter groups|settings of the token cache|tokens must|indices must|"
        r"positions must|entry each",
        "A mistake in code that calls the library: pass what the message says.",
    ),
    (r"another process|another rank", "Look at the message above it; free memory or disk space and start again."),
    (r"only labelled scenes|no label maps", "Leave the two options apart: they exclude each other."),
    (r"has no (en|de)coder|encoder or decoder", "Put the missing file beside the other, or ask for it when loading."),
    (
        r"sha256|has changed since",
        "Fetch the published file again; if you replaced it on purpose, delete the kept hash or demand the new one.",
    ),
    (
        r"is not the … of DALL-E|holds neither|holds no tokenizer|beit_fast knows|holds no tensors",
        "Give a tokenizer: `dalle`, `demo`, or a file of DALL-E's or of a `DiscreteVAE`.",
    ),
    (
        r"is damaged|cannot be read|not a readable|is not a JSON|unreadable|truncated|damaged",
        "Fetch or copy the file again.",
    ),
    (r"HTTP|^…: …$|could not be fetched", "Check the network; without one, put the file where the message says."),
    (r"holds no classifier|holds no segmentation head|holds no", "Give weights of the right kind, or fine-tune first."),
    (
        r"not the weights of a BEiT|has neither relative|does not fit|do not fit|belongs to no|"
        r"the same name|come to the same|names no",
        "Give the weights of a BEiT of this size; the message names the tensor.",
    ),
    (
        r"in the file and … in the model|has no place in the model|describes no|another kind of model|"
        r"claims shape|not a checkpoint|not a state dict|nothing that can be read|is compressed|is … but",
        "Give weights of a BEiT of the model's own shape, written by the official code, timm, transformers or"
        " beit_fast.",
    ),
    (r"no counterpart|are of two kinds", "Convert the weights of one whole model of one library."),
    (r"no picture", "The file is no image: repair or remove it."),
    (r"lies outside the grid", "Take a row and a column within the grid of patches."),
    (r"cuobjdump|labelled …", "Only `make aot` needs it: install the CUDA toolkit."),
    (r"bias is on …", "Move both tensors to one device."),
    (
        r"unknown|is not known|not supported|cannot be split|no weights are published",
        "Take one of the names that the message lists.",
    ),
    (r"fetch|hub", "Check the network and the name, or give a path."),
    (
        r"needs|must|has to|have to|should|expected|got|is …, |exceeds|not a multiple|multiples|is not|"
        r"at least|none of|floating|longer than|out of",
        "Pass what the message says.",
    ),
    (r"second derivatives?|differentiated twice", '`beit_fast.use_backend("reference")` computes them.'),
]
"""Pattern of a message, and what to do."""

_AGAIN = "Check the address, the server and the network, then type the same command again: the run continues."
BY_CLASS = {
    "SourceUnavailable": _AGAIN,
    "ConnectionError": _AGAIN,
    "_Broken": "The image is replaced by another, counted and listed in `bad_files.tsv`: repair or remove it.",
    "UnpicklingError": "The file is refused and nothing in it was run: fetch it from a source that you trust.",
    "TooManyBadImages": "Repair or remove the files in `bad_files.tsv`, or raise `--data.max-bad-share`.",
    "DamagedCheckpoint": "The run goes back to the checkpoint before it, by itself; delete this one.",
}


@dataclass(frozen=True)
class Message:
    """One message: `…` stands for what is filled in."""

    area: str
    text: str
    kind: str
    place: str

    @property
    def way_out(self) -> str:
        """What to do; "" where nothing is said."""
        if self.kind in BY_CLASS:
            return BY_CLASS[self.kind]
        if SAYS_IT.search(self.text):
            return "As the message says."
        return next((way for pattern, way in RULES if re.search(pattern, self.text)), "")


def messages() -> list[Message]:
    """Every message that is raised or printed as an error, once each."""
    found: dict[tuple[str, str], Message] = {}
    for area, folders in AREAS.items():
        for folder in folders:
            for path in sorted((ROOT / folder).rglob("*.py")):
                for message in in_file(area, path):
                    found.setdefault((area, message.text), message)
    return list(found.values())


def in_file(area: str, path: Path) -> Iterator[Message]:
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        kind = ast.unparse(call.func).rpartition(".")[2]
        if not isinstance(node, ast.Raise) and kind != "fail":
            continue
        texts = [text for argument in call.args if (text := template(argument)).strip("… :.")]
        if texts and not kind.endswith("Exit") and kind not in ("AssertionError", "NotImplementedError", "TypeError"):
            yield Message(area, texts[-1], kind, str(path.relative_to(ROOT)))


def template(node: ast.expr) -> str:
    """The text of a message; "" for what is not a text at all."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + (template(node.right) or "…")
    return ""


def table(area: str) -> str:
    """The messages of one area as Markdown."""
    lines = ["| message | way out |", "|---|---|"]
    for message in sorted((m for m in messages() if m.area == area), key=lambda m: m.text.strip("…'-: ").lower()):
        text = " ".join(message.text.split()).replace("|", "\\|").replace("`", "'")
        lines.append(f"| `{text}` | {message.way_out} |")
    return "\n".join(lines)
