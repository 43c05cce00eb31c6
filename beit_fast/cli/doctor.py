"""`beit-fast doctor`: what is installed, what is missing, and what to do about it."""

import importlib
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata

import torch
from torch import distributed

from beit_fast.kernels.backend import obstacle
from beit_fast.kernels.self_test import LIMIT, self_test
from beit_fast.version import __version__


def _compiled() -> str:
    importlib.import_module("beit_fast._C")
    return "built"


def _version(package: str, *modules: str) -> Callable[[], str]:
    def probe() -> str:
        for module in modules:
            importlib.import_module(module)
        return metadata.version(package)

    return probe


def _dali() -> str:
    importlib.import_module("nvidia.dali")
    names = [d for d in metadata.packages_distributions().get("nvidia", []) if d.startswith("nvidia-dali")]
    return " ".join(f"{name} {metadata.version(name)}" for name in sorted(set(names)))


def _apex() -> str:
    from beit_fast.train.optim import load_apex

    load_apex()
    return "NVIDIA's, with CUDA extensions"


REQUIRED: dict[str, tuple[Callable[[], str], str]] = {
    "beit_fast._C": (
        _compiled,
        "training needs it, and on a CPU is faster by it: a C++20 compiler and `pip install .`",
    ),
    "DALI": (_dali, "images are then decoded by Pillow, more slowly: pip install '.[train]'"),
    "tyro": (_version("tyro", "tyro"), "recipes need it: pip install '.[train]'"),
    "rich": (_version("rich", "rich"), "recipes need it: pip install '.[train]'"),
    "matplotlib": (_version("matplotlib", "matplotlib"), "the loss picture needs it: pip install '.[train]'"),
    "Pillow": (_version("pillow", "PIL"), "the built-in images need it: pip install '.[train]'"),
}
OPTIONAL: dict[str, tuple[Callable[[], str], str]] = {
    "triton": (_version("triton", "triton"), "on a GPU: pip install triton; elsewhere torch's operators are used"),
    "xformers": (_version("xformers", "xformers"), "an attention backend to compare with: pip install xformers"),
    "apex": (_apex, ""),
}


def parallel_lines() -> list[str]:
    """What several processes can talk by, and what of this machine bears on it."""
    names = [name for name in ("gloo", "nccl", "mpi") if getattr(distributed, f"is_{name}_available")()]
    nccl = f" {'.'.join(map(str, torch.cuda.nccl.version()))}" if "nccl" in names and torch.cuda.is_available() else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    attention = "torch CPU"
    if torch.cuda.is_available():
        reason = obstacle(torch.cuda.current_device())
        attention = f"torch ({reason})" if reason else "Triton"
    return [
        f"processes talk by: {', '.join(names)}{nccl}; {os.cpu_count()} cores, {memory:.0f} GiB of memory, "
        f"{platform.platform()}",
        f"CUDA of torch: {torch.version.cuda or 'none'}, cuDNN {torch.backends.cudnn.version() or 'none'}, attention "
        f"on this machine: {attention}",
    ]


def doctor_command(arguments: Sequence[str]) -> int:
    """Print the report; returns 0 where training can start."""
    lines, ready = report()
    print("\n".join(lines))
    return 0 if ready else 1


def report() -> tuple[list[str], bool]:
    """Lines to print, and whether training can start here."""
    lines = [
        f"beit_fast {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            lines.append(
                f"GPU {index}: {p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
            )
    else:
        lines.append("no CUDA device; everything runs on the CPU")
    ready = True
    for needed, probes in ((True, REQUIRED), (False, OPTIONAL)):
        for name, (probe, advice) in probes.items():
            try:
                lines.append(f"  ok       {name} {probe()}")
            except ImportError as error:
                lines.append(f"  {'MISSING ' if needed else 'without '} {name}: {advice or error}")
                ready &= not needed or name == "DALI"
    lines += parallel_lines()
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        for name, found in self_test(device):
            sound = isinstance(found, float) and found <= LIMIT
            ready &= sound
            text = f"largest error {found:.0e}" if isinstance(found, float) else found
            lines.append(f"  {'ok      ' if sound else 'WRONG   '} {name} on {device}: {text}")
    lines.append(f"free disk here: {shutil.disk_usage('.').free / 2**30:.0f} GiB")
    lines.append("training can start: beit-fast train pretrain_beit_large" if ready else "training cannot start yet")
    return lines, ready
