"""The model of this checkout beside that of another one, in interleaved rounds on this machine's CPU.

    git worktree add ../old 073a3e4
    python -m benchmarks.other_checkout ../old                 # BEiT-B cut to 4 blocks, 15 rounds, one thread
    python -m benchmarks.other_checkout ../old --json FILE     # also a record

Each checkout runs in a process of its own, and the two take turns in random order; both compute the same numbers from
the same weights, or nothing is timed. Times are seconds of CPU, because the machine may be busy with something else
(the wall clock's are in the record too). A ratio is the other's time over this one's: above 1 this checkout is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness import ratio_of
from benchmarks.machine import ROOT, environment

WORKER = """
import sys, time
import torch
from beit_fast import Beit, BeitConfig, BeitForMaskedImageModeling

work, file, threads, batch, depth = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(threads)
torch.manual_seed(0)
config = BeitConfig.from_preset("base", depth=depth, drop_path_rate=0.0)
images = torch.randn(batch, 3, 224, 224)
masked = torch.rand(batch, 196).argsort(1) < 75
tokens = torch.randint(0, 8192, (batch, 196))
mim = work.startswith("masked")
model = BeitForMaskedImageModeling(config) if mim else Beit(config.for_classification(1000))
model.train(not work.endswith("inference"))
model.load_state_dict(torch.load(file)[mim])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

def run():
    if not model.training:
        with torch.inference_mode():
            return model(images).square().mean()
    optimizer.zero_grad()
    loss = model(images, masked, tokens).loss if mim else model(images).square().mean()
    loss.backward()
    optimizer.step()
    return loss

print(float(run().detach()), flush=True)
run()
for _ in sys.stdin:
    start = time.perf_counter(), time.process_time()
    run()
    print(time.perf_counter() - start[0], time.process_time() - start[1], flush=True)
"""
WORKS = ("masked image modelling, step", "classifier, step", "classifier, inference")


def save_weights(path: Path, depth: int) -> None:
    """Weights of both models, by whether they are those of masked image modelling."""
    from beit_fast import Beit, BeitConfig, BeitForMaskedImageModeling

    torch.manual_seed(1)
    config = BeitConfig.from_preset("base", depth=depth)
    models = {True: BeitForMaskedImageModeling(config), False: Beit(config.for_classification(1000))}
    for model in models.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    torch.save({mim: model.state_dict() for mim, model in models.items()}, path)


def compare(work: str, roots: dict[str, Path], weights: Path, rounds: int, options: list[int]) -> dict[str, object]:
    """CPU seconds of every round by checkout, and the ratio of the other's to this one's."""
    processes = {}
    for name, root in roots.items():
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        processes[name] = subprocess.Popen(
            [sys.executable, "-c", WORKER, work, str(weights), *map(str, options)], cwd=root, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=kept | {"PYTHONPATH": str(root)},
        )  # fmt: skip

    def answer(name: str) -> list[float]:
        line = processes[name].stdout.readline()  # type: ignore[union-attr]
        if not line:
            sys.exit(f"the checkout in {roots[name]} failed, its message is above")
        return [float(word) for word in line.split()]

    losses = {name: answer(name)[0] for name in processes}
    if abs(losses["other"] - losses["this"]) > 1e-4 * abs(losses["this"]):
        sys.exit(f"{work}: the two compute different numbers, so their times mean nothing: {losses}")
    wall: dict[str, list[float]] = {name: [] for name in processes}
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    order, generator = list(processes), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            processes[name].stdin.write("\n")  # type: ignore[union-attr]
            processes[name].stdin.flush()  # type: ignore[union-attr]
            for times, value in zip((wall, seconds), answer(name), strict=True):
                times[name].append(value)
    for process in processes.values():
        process.kill()
        process.wait()
    ratio = ratio_of(seconds["other"], seconds["this"])
    return {"work": work, "cpu_s": seconds, "wall_s": wall, "other_over_this": ratio._asdict(), "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write a record there")
    given = parser.parse_args()
    if not (given.other / "beit_fast").is_dir():
        parser.error(f"{given.other} is no checkout of beit_fast: git worktree add {given.other} COMMIT")
    roots = {"this": ROOT, "other": given.other.resolve()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        save_weights(weights, given.depth)
        for work in WORKS:
            row = compare(work, roots, weights, given.rounds, [given.threads, given.batch, given.depth])
            rows.append(row)
            middle = {name: 1e3 * median(times) for name, times in row["cpu_s"].items()}  # type: ignore[attr-defined]
            ratio = row["other_over_this"]
            print(
                f"{work:30s} this {middle['this']:8.1f} ms, other {middle['other']:8.1f} ms: other over this "
                "{median:.3f} [{low:.3f}, {high:.3f}], n={pairs}".format(**ratio),  # type: ignore[arg-type]
                flush=True,
            )
    if given.json:
        head = ["git", "-C", str(given.other), "rev-parse", "--short=10", "HEAD"]
        record = {
            "other_checkout": rows, "other_commit": subprocess.check_output(head, text=True).strip(),
            "threads": given.threads, "B": given.batch, "depth": given.depth,
            "beit_fast": environment(torch.device("cpu")),
        }  # fmt: skip
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
