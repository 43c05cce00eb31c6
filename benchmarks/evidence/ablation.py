"""The paper's orderings at small scale: pre-training, fine-tuning, probes, nearest neighbours; one resumable command.

    python -m benchmarks.evidence.ablation --budget-hours 2      # and again, until everything is in the record
    python -m benchmarks.evidence.ablation --plan                # what is left, and how long it would take

PROTOCOL.md says what is run, in which order, and what would count as a result. The record, record.jsonl in the output
folder, grows by a line per finished run; run folders are continued where they were stopped.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from beit_fast.cli.options import errors_in_one_line, parse
from beit_fast.cli.train import RUN_ERRORS
from beit_fast.train import engine
from beit_fast.train.config import LogConfig
from beit_fast.train.tasks.finetune import Finetune
from beit_fast.train.tasks.pretrain import MaskedImageModeling
from beit_fast.train.tasks.probe import LinearProbe
from benchmarks import machine
from benchmarks.evidence import record as records
from benchmarks.evidence.protocol import (
    BASE,
    ROWS,
    TIERS,
    TUNING_SEED,
    Labels,
    Protocol,
    evaluation_folder,
    finetuning,
    hashes,
    pretraining,
    probing,
)
from benchmarks.evidence.record import Record

Kind = Literal["pretrain", "finetune", "probe"]
NEIGHBOURS = 20
RATES_TRIED = 4
"""Runs that choosing a rate takes, for the plan."""


@dataclass(frozen=True)
class Job:
    """One row of one seed: a pre-training, or what is measured of it, the choice of the rate included."""

    kind: Kind
    row: str
    seed: int
    labels: Labels | None = None

    def __str__(self) -> str:
        return " ".join([self.kind, self.row, *([self.labels] if self.labels else []), f"seed {self.seed}"])


def jobs(protocol: Protocol) -> Iterator[Job]:
    """All of them, so ordered that the first ones are worth something alone: a tier, a seed, a measure at a time."""
    for rows in TIERS[: protocol.tiers]:
        for seed in range(protocol.seeds):
            yield from (Job("pretrain", row, seed) for row in rows if ROWS[row].length)
            yield from (Job("finetune", row, seed, "scenes") for row in rows if ROWS[row].finetune_length == 1)
            yield from (Job("probe", row, seed, "scenes") for row in rows if ROWS[row].finetune_length == 1)
            yield from (Job("finetune", row, seed, "hues") for row in rows if ROWS[row].hues)
            yield from (Job("finetune", row, seed, "scenes") for row in rows if ROWS[row].finetune_length != 1)


def choose(top1_at: Callable[[float], float], rates: tuple[float, ...]) -> float:
    """The best of the rates: one with no better one on either side, tried up to a factor of 8 beyond those given."""
    tried = {rate: top1_at(rate) for rate in rates}
    while True:
        best = max(tried, key=tried.__getitem__)
        beyond = best / 2 if best == min(tried) else best * 2
        if min(tried) < best < max(tried) or not min(rates) / 8 <= beyond <= max(rates) * 8:
            return best
        tried[beyond] = top1_at(beyond)


def nearest_neighbours(folder: Path, neighbours: int = NEIGHBOURS) -> list[float]:
    """Top-1 in percent of every block by its nearest training images, from the features that a probe left in `folder`.

    Cosine similarity of the mean-removed features, votes weighted by exp(similarity / 0.07).
    """
    sets = [
        [np.load(folder / "features" / name / f"{part}.npy") for part in ("features", "labels")]
        for name in ("training", "validation")
    ]
    (train, classes), (test, expected) = [[torch.from_numpy(part) for part in parts] for parts in sets]
    mean = train.mean(0)
    percents = []
    for layer in range(train.shape[1]):
        keys, queries = (F.normalize(x[:, layer] - mean[layer], dim=-1) for x in (train, test))
        correct = 0
        for start in range(0, len(queries), 1000):
            near, index = (queries[start : start + 1000] @ keys.T).topk(min(neighbours, len(keys)))
            votes = torch.zeros(len(near), int(classes.max()) + 1)
            votes.scatter_add_(1, classes[index], (near / 0.07).exp())
            correct += int((votes.argmax(1) == expected[start : start + 1000]).sum())
        percents.append(100 * correct / len(queries))
    return percents


class Ablation:
    """Runs the jobs that the record lacks."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol, self.started = protocol, time.monotonic()
        self.record = Record(protocol.output / "record.jsonl", protocol.settings())

    def is_done(self, job: Job) -> bool:
        test = {"set": "test"} if job.labels else {}
        return self.record.find(kind=job.kind, row=job.row, seed=job.seed, labels=job.labels, **test) is not None

    def seconds(self, job: Job) -> float:
        """How long a job will take: as long as one like it took, or its steps at the measured step time."""
        took = [
            line["seconds"]
            for line in self.record.lines()
            if line["kind"] == "job" and line["job"] == job.kind and line["row"] == job.row
            and line["tuned"] == (job.kind != "pretrain" and job.seed == 0)
        ]  # fmt: skip
        if took:
            return median(took)
        protocol, row = self.protocol, ROWS[job.row]
        if job.kind == "pretrain":
            return protocol.pretrain_steps * row.length * self.step_seconds(job.row)
        runs = 1 + (RATES_TRIED if job.seed == 0 else 0)
        forward = self.step_seconds("finetune") / 96  # a third of a step, per image
        if job.kind == "finetune":
            steps = protocol.finetune_steps * row.finetune_length
            return runs * (steps * self.step_seconds("finetune") + 6 * protocol.test_images * forward)
        return runs * 2 * (protocol.probe_images + protocol.test_images) * forward

    def step_seconds(self, name: str) -> float:
        """Of pre-training a row, or of `finetune`: measured once over ten steps."""
        key = name if name in ("pixels", "finetune") else BASE
        line = self.record.find(kind="step_time", row=key)
        if line is None:
            scratch = finetuning(self.protocol, "scratch", "scenes", TUNING_SEED, 1e-3)
            config: Any = scratch if key == "finetune" else pretraining(self.protocol, key, 0)
            folder = self.protocol.output / "runs" / "step_time" / key
            log = LogConfig(every_steps=5, progress="none")
            config = replace(config, output_dir=folder, fresh=folder.is_dir(), max_steps=10, log=log)
            task: Any = Finetune if key == "finetune" else MaskedImageModeling
            line = {"kind": "step_time", "row": key, "step_ms": self.train(task, config)["step_ms"]}
            self.record.append(line)
        return float(line["step_ms"]) / 1e3

    def train(self, task: Callable[[Any], Any], config: Any) -> dict[str, Any]:
        """Train to the end, or find it trained; the last metrics."""
        result = engine.run(task(config))
        if result.exit_code:
            raise SystemExit(result.exit_code)
        return result.metrics

    def run(self) -> None:
        """Every job, as long as the budget lasts."""
        budget = self.protocol.budget_hours
        for job in jobs(self.protocol):
            if self.is_done(job):
                continue
            took, expected = time.monotonic() - self.started, self.seconds(job)
            if budget is not None and took + expected > 3600 * budget:
                print(f"{job} would take {expected / 60:.0f} min, more than is left of {budget:g} h", flush=True)
                return
            print(f"== {job}, about {expected / 60:.0f} min", flush=True)
            start = time.monotonic()
            {"pretrain": self.pretrain, "finetune": self.finetune, "probe": self.probe}[job.kind](job)
            tuned = job.kind != "pretrain" and job.seed == 0
            seconds = time.monotonic() - start
            self.record.append({"kind": "job", "job": job.kind, "row": job.row, "seed": job.seed, "labels": job.labels,
                                "tuned": tuned, "seconds": seconds})  # fmt: skip
            self.write()

    def pretrain(self, job: Job) -> None:
        metrics = self.train(MaskedImageModeling, pretraining(self.protocol, job.row, job.seed))
        self.record.append({"kind": "pretrain", "row": job.row, "seed": job.seed, "metrics": metrics})

    def rate(self, job: Job, top1_at: Callable[[float], float]) -> float:
        """Chosen for the row on the tuning set, from the pre-training of seed 0; every run tried is recorded."""
        key = {"kind": job.kind, "row": job.row, "labels": job.labels, "set": "tuning"}

        def measured(rate: float) -> float:
            line = self.record.find(**key, rate=rate)
            if line is None:
                line = key | {"rate": rate, "top1_percent": top1_at(rate)}
                self.record.append(line)
            return float(line["top1_percent"])

        return choose(measured, self.protocol.probe_rates if job.kind == "probe" else self.protocol.rates)

    def finetune(self, job: Job) -> None:
        def trained(seed: int, rate: float) -> tuple[dict[str, Any], Path]:
            assert job.labels is not None
            config = finetuning(self.protocol, job.row, job.labels, seed, rate)
            return self.train(Finetune, config), config.output_dir

        rate = self.rate(job, lambda rate: float(trained(TUNING_SEED, rate)[0]["top1_percent"]))
        metrics, folder = trained(job.seed, rate)
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        curve = [(line["step"], line["top1_percent"]) for line in lines if line["kind"] == "evaluation"]
        self.add(job, "finetune", rate=rate, top1_percent=metrics["top1_percent"], curve=curve)

    def probe(self, job: Job) -> None:
        """Linear probes and nearest neighbours; the block that counts is the best one on the tuning set."""

        def trained(seed: int, rate: float) -> tuple[dict[str, Any], Path]:
            assert job.labels is not None
            config = probing(self.protocol, job.row, job.labels, seed, rate)
            features = config.output_dir.with_name(f"features_{job.labels}_seed{seed}").resolve()
            features.mkdir(parents=True, exist_ok=True)  # the same for every rate
            config.output_dir.mkdir(parents=True, exist_ok=True)
            if not (config.output_dir / "features").exists():
                (config.output_dir / "features").symlink_to(features)
            return self.train(LinearProbe, config), config.output_dir

        rate = self.rate(job, lambda rate: float(trained(TUNING_SEED, rate)[0]["best_top1_percent"]))
        tuning, tuning_folder = trained(TUNING_SEED, rate)
        metrics, folder = trained(job.seed, rate)
        layers = [value for name, value in sorted(metrics.items()) if name.startswith("layer")]
        block = int(tuning["best_layer"])
        self.add(job, "knn", **self._neighbours(tuning_folder, folder))
        self.add(job, "probe", rate=rate, block=block, top1_percent=layers[block - 1], layers=layers)

    @staticmethod
    def _neighbours(tuning_folder: Path, folder: Path) -> dict[str, Any]:
        tuning, test = nearest_neighbours(tuning_folder), nearest_neighbours(folder)
        best = int(np.argmax(tuning))
        return {"block": best + 1, "top1_percent": test[best], "layers": test, "tuning_layers": tuning}

    def add(self, job: Job, kind: str, **values: Any) -> None:
        self.record.append(
            {"kind": kind, "row": job.row, "seed": job.seed, "labels": job.labels, "set": "test", **values}
        )

    def plan(self) -> str:
        """What is left, how long it would take, and what of it fits into the budget."""
        lines, total = [], 0.0
        budget = self.protocol.budget_hours
        for job in jobs(self.protocol):
            if not self.is_done(job):
                total += self.seconds(job)
                over = budget is not None and total > 3600 * budget
                lines.append(f"{total / 3600:7.2f} h  {job}{'  (over the budget)' if over else ''}")
        return "\n".join([*lines, f"{len(lines)} jobs left, {total / 3600:.1f} h"])

    def write(self) -> None:
        """Tables and curves of what has been measured."""
        (self.protocol.output / "table.md").write_text(records.report(self.record))
        records.draw(self.record, self.protocol.output / "curves.png")


def main() -> None:
    protocol = parse(Protocol(), sys.argv[1:])
    with errors_in_one_line(more=RUN_ERRORS):
        ablation = Ablation(protocol)
        test = hashes(evaluation_folder(protocol, "scenes"))
        digest = hashlib.sha256("".join(sorted(test)).encode()).hexdigest()
        device = engine.start_world(protocol.device).device
        ablation.record.append({"kind": "start", "test_images": len(test), "test_sha256": digest,
                                "machine": machine.environment(device)})  # fmt: skip
        print(ablation.plan(), flush=True)
        if not protocol.plan:
            ablation.run()
    ablation.write()
    print(f"\n{records.report(ablation.record)}\nrecord {ablation.record.path}")


if __name__ == "__main__":
    main()
