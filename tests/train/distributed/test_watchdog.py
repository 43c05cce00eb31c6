"""A rank that stands still reports, and does not end before the others have, however slow they are."""

import subprocess
import sys
import time

PROGRAM = """
import sys, time
from pathlib import Path
from beit_fast.train.distributed import watchdog
folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
watchdog.TICK_S, watchdog.OTHERS_S = 0.02, float(sys.argv[4])
dog = watchdog.Watchdog(folder, rank, ranks, 600.0, lambda: f"rank {rank} of {ranks} stands still")
print("watching", flush=True)
sys.stdin.readline()

def stuck_here():
    dog.timeout_s = 0.1
    dog.beat()
    time.sleep(600)

stuck_here()
"""


class Rank:
    """A process with a watchdog, whose clock begins when it is told to stand still."""

    def __init__(self, folder, rank, ranks, others_s=600):
        words = [str(value) for value in (folder, rank, ranks, others_s)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, *words], text=True, **pipes)
        assert self.process.stdout.readline() == "watching\n"

    def stand_still(self):
        print(file=self.process.stdin, flush=True)

    def end(self):
        """Exit code and errors."""
        errors = self.process.communicate()[1]
        return self.process.returncode, errors


def test_no_rank_ends_before_the_last_has_reported(tmp_path):
    (tmp_path / "hang_rank1.txt").write_text("of an earlier start\n")
    ranks = [Rank(tmp_path, number, 2) for number in range(2)]
    ranks[0].stand_still()
    while not (tmp_path / "hang_rank0.txt").exists():
        assert ranks[0].process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    assert ranks[0].process.poll() is None, "it ended although rank 1 has not reported since both began"
    ranks[1].stand_still()
    for number, rank in enumerate(ranks):
        code, errors = rank.end()
        assert code == 1
        assert f"error: rank {number} of 2 stands still: no progress for 0 s (--hang-timeout-s)" in errors
        report = (tmp_path / f"hang_rank{number}.txt").read_text()
        assert f"rank {number} of 2 stands still" in report
        assert "in stuck_here" in report
    assert not list(tmp_path.glob("*.tmp"))


def test_a_rank_that_never_reports_is_not_waited_for_for_ever(tmp_path):
    rank = Rank(tmp_path, 0, 2, others_s=0.2)
    rank.stand_still()
    assert rank.end()[0] == 1
