"""What has to be said beside a number: why a row is slower, and which slowdowns between two records are accepted.

Every row in which beit_fast is slower than a rival needs a line in `WHY`, or `report.py --check` fails.
"""

from __future__ import annotations

import re

# (pattern of the comparison's title, pattern of the rival) -> the reason. The first that fits is shown.
WHY: dict[tuple[str, str], str] = {
    ("checkpoint, save", r"torch\.save|safetensors"): (
        "beit_fast also computes a crc32 of every file, syncs file and folder, and renames; `torch.save` alone leaves "
        "the data in the page cache"
    ),
    ("checkpoint, verify and read", "safetensors"): (
        "beit_fast first reads every byte to check its crc32; safetensors maps the file and checks nothing"
    ),
    (
        "tokenizer",
        "beit_fast, masked positions only",
    ): "the same encoder with less to do: not a rival but the fast path",
    ("residual and LayerNorm, .*forward:", "torch.compile"): (
        "it fuses the sum with the norm, a pass over 5 MB less; the rounds differ widely, and the interval holds 1"
    ),
    ("bias and exact GELU", "torch.compile"): (
        "its C++ adds the bias and takes GELU in one pass; torch's own operations, which we call, need two"
    ),
    ("import in a fresh interpreter", "torch alone"): "torch is a part of every one of these imports",
}

# (device, comparison, rival) -> why a slowdown against the record before it is right.
ACCEPTED: dict[tuple[str, str, str], str] = {}


def why(group: str, rival: str) -> str | None:
    """The reason for a slower row, or None if nobody gave one."""
    for (of_group, of_rival), reason in WHY.items():
        if re.search(of_group, group) and re.search(of_rival, rival):
            return reason
    return None
