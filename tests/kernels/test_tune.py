"""`python -m beit_fast tune`: what it tries, what it keeps, where it writes."""

import importlib
import json
import pickle
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from beit_fast.kernels import backend, launch_table, tune
from beit_fast.kernels.launch_table import SHIPPED, find_config, forget, launch_config, recording, trial
from beit_fast.kernels.tune import Subject, best_row


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "deep" / "launch.json"
    monkeypatch.setenv("BEIT_FAST_LAUNCH", str(path))
    forget()
    yield path
    monkeypatch.undo()
    forget()


CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only where a test lets them: how busy the machine is must not decide what is faster."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


clock = Clock()


@pytest.fixture(autouse=True)
def own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "time", clock)


def sleeper(fastest: int) -> Subject:
    """A kernel that takes the longer the further its row is from the best one."""

    def run() -> None:
        warps = launch_config("gelu_forward", CPU)["num_warps"]
        clock.seconds += 0.004 * (1 + abs(warps - fastest))

    return Subject("gelu_forward", None, run, {"num_warps": (1, 2, 4, 8)})


def test_keeps_what_is_faster_and_nothing_else(own_table: Path) -> None:
    assert tune.tune([sleeper(fastest=4)], CPU, own_table, say=lambda _: None) == 0
    assert not own_table.exists()
    own_table.parent.mkdir()
    own_table.write_text(json.dumps({"sm_90": {"cross_entropy": {"BLOCK": 1}}}))
    assert tune.tune([sleeper(fastest=2)], CPU, own_table, say=lambda _: None) == 1
    written = json.loads(own_table.read_text())
    assert written["sm_90"] == {"cross_entropy": {"BLOCK": 1}}
    expected = dict(SHIPPED["interpreter"]["gelu_forward"]) | {"num_warps": 2}
    assert written["interpreter"] == {"gelu_forward": expected}
    assert launch_config("gelu_forward", CPU) == expected
    assert list(own_table.parent.iterdir()) == [own_table]


def test_a_trial_ends() -> None:
    with trial("gelu_forward", None, {"ROWS": 1}):
        assert launch_config("gelu_forward", "sm_90") == {"ROWS": 1}
    assert launch_config("gelu_forward", "sm_90") == SHIPPED["default"]["gelu_forward"]


def test_rows_that_do_not_fit_are_passed_over_and_real_faults_are_not() -> None:
    from triton.runtime.errors import OutOfResources

    def too_large() -> None:
        if launch_config("gelu_forward", CPU)["num_warps"] != 4:
            raise OutOfResources(300_000, 232_448, "shared memory")

    subject = Subject("gelu_forward", None, too_large, {"num_warps": (2, 8)})
    assert best_row(subject, CPU, lambda run: run() or 1.0) is None  # type: ignore[func-returns-value]

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        best_row(Subject("gelu_forward", None, broken, {"num_warps": (2,)}), CPU, lambda run: run() or 1.0)  # type: ignore[func-returns-value]


def test_rows_of_a_rival_kernel_are_tried_against_what_runs_without_them() -> None:
    def run() -> None:
        row = find_config("attention_backward_one_pass", CPU, 208)
        clock.seconds += 0.01 if row is None else 0.002 * row["KEYS"]

    slow, fast = {"KEYS": 8}, {"KEYS": 2}
    found = [
        best_row(Subject("attention_backward_one_pass", "208", run, {}, rows), CPU, tune._wall_clock)
        for rows in ([slow, fast], [slow])
    ]
    assert found == [fast, None] or found == [fast, slow]
    assert find_config("attention_backward_one_pass", CPU, 208) is None


def test_every_row_is_a_job_for_a_process() -> None:
    """What is to be compiled is listed without running it, and can be sent to another process and found there."""
    with recording():  # whose own inputs some kernels would make
        subjects = tune.subjects(CPU, 1, 5, 32, 2, 24, torch.float32)
    for subject in subjects:
        jobs = set()
        for row in subject.all_rows(CPU):
            with trial(subject.kernel, subject.bucket, row), recording() as launches:
                subject.run()
            jobs |= {tune.compile_job(*launch) for launch in launches}
        warps = {row["num_warps"] for row in subject.all_rows(CPU)}
        assert warps <= {dict(constants)["num_warps"] for *_, constants in jobs}
        for module, name, kinds, constants in map(pickle.loads, map(pickle.dumps, jobs)):
            kernel = getattr(importlib.import_module(module), name)
            assert len(kinds) + len(dict(constants).keys() & set(kernel.arg_names)) == len(kernel.arg_names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


class Watched(UserDict[str, int]):
    """Knows which of its values were read."""

    def __init__(self, row: dict[str, int]) -> None:
        self.read: set[str] = set()
        super().__init__(row)

    def __getitem__(self, name: str) -> int:
        self.read.add(name)
        return super().__getitem__(name)


def test_every_subject_runs(triton_device: str) -> None:
    """Each launches its kernel with the row on trial, under names the launch table knows."""
    device = torch.device(triton_device)
    names = set()
    for subject in tune.subjects(device, 1, 5, 32, 2, 24, torch.float32):
        row = dict(subject.all_rows(device)[0])
        assert set(subject.axes) <= set(row)
        watched = Watched(row)
        with trial(subject.kernel, subject.bucket, watched):
            subject.run()
        assert watched.read == set(row), subject.name
        names.add(subject.kernel)
    assert names <= set(SHIPPED["default"])


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], torch.device]]:
    """`card(major, minor)` is a GPU of that compute capability, as far as it is asked for its name."""
    asked = (launch_table._architecture, backend.device_runs_triton)
    for function in asked:
        function.cache_clear()

    def of(major: int, minor: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A card")
        return torch.device("cuda", 0)

    yield of
    for function in asked:
        function.cache_clear()


def test_an_unknown_card_gets_the_safe_rows_and_one_line(
    card: Callable[[int, int], torch.device], own_table: Path, recwarn: pytest.WarningsRecorder
) -> None:
    device = card(10, 3)
    for kernel, row in SHIPPED["default"].items():
        name, _, bucket = kernel.partition("/")
        assert launch_config(name, device, bucket or None) == row
    (line,) = (str(warning.message) for warning in recwarn)
    assert line.startswith("A card: no launch rows for sm_103, the safe ones are used; `python -m beit_fast tune`")


def test_a_card_too_old_for_the_kernels_gets_plain_torch_and_one_line(
    card: Callable[[int, int], torch.device], recwarn: pytest.WarningsRecorder
) -> None:
    device = card(7, 0)
    assert not any(backend.device_runs_triton(device.index) for _ in range(3))
    (line,) = (str(warning.message) for warning in recwarn)
    assert line == "A card: compute capability 7.0 is below 8.0, torch's operators are used"
