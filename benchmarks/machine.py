"""What a record must say about where and how it was made."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "triton",
    "timm",
    "transformers",
    "liger-kernel",
    "xformers",
    "apex",
    "nvidia-dali-cuda130",
    "numpy",
)
INSTRUCTION_SETS = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""Variables that hold the libraries below torch, and torch itself, to what an older processor has."""


def device_slug(device: torch.device) -> str:
    """Names a machine in the file name of a record: `nvidia-h200`, `xeon-2.5ghz-2cpu`, `...-avx2` where it is held."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    model = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.split(":", 1)[1]
            break
    model = re.sub(r"\((r|tm)\)|intel|amd|cpu|processor|@", " ", model.lower())
    model = re.sub(r"(\d\.\d)0ghz", r"\1ghz", model)
    held = "-avx2" if INSTRUCTION_SETS.keys() & os.environ.keys() else ""
    return f"{slug(model)}-{len(os.sched_getaffinity(0))}cpu{held}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, threads, and how busy the machine was."""
    found: dict[str, Any] = {
        "command": command(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "held_to": {name: os.environ[name] for name in INSTRUCTION_SETS if name in os.environ},
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "capability": [properties.major, properties.minor],
            "memory_gib": properties.total_memory / 2**30,
        }
    return found


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def command() -> str:
    """What was typed, without the folders of this machine: of an absolute path the last name stays."""
    first, *rest = sys.argv
    name = Path(first).name
    if name == "__main__.py":
        name = f"python -m {Path(first).parent.name}"
    return " ".join([name, *(shlex.quote(re.sub(r"(^|=)/(\S*/)?", r"\1", word)) for word in rest)])


def commit() -> str:
    """Short hash of the checkout, `+` behind it where tracked files differ from it; "unknown" outside of one."""
    try:
        found = _git("rev-parse", "--short=10", "HEAD")
        return found + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
