"""What `python -m beit_fast doctor` says, for a bug report."""

import pytest
import torch

from beit_fast import kernels
from beit_fast.cli.doctor import report
from beit_fast.kernels import self_test


def test_every_op_is_tested_against_its_definition():
    found = dict(self_test.self_test(torch.device("cpu")))
    assert set(found) == set(self_test.OPS)
    assert all(isinstance(error, float) and error < 1e-5 for error in found.values()), found


@pytest.mark.parametrize("name", sorted(self_test.OPS))
def test_a_wrong_op_is_found(monkeypatch, name):
    """The self-test can fail: one per cent more in a result, and an op that raises."""
    right = getattr(kernels, name)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        return (result[0] * 1.01, *result[1:]) if isinstance(result, tuple) else result * 1.01

    monkeypatch.setattr(kernels, name, wrong)
    assert dict(self_test.self_test(torch.device("cpu")))[name] > self_test.LIMIT

    def broken(*arguments, **options):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(kernels, name, broken)
    assert dict(self_test.self_test(torch.device("cpu")))[name] == "RuntimeError: no kernel image"
    lines, ready = report()
    assert not ready
    assert any(line.startswith("  WRONG") and name in line for line in lines)


def test_the_report_names_what_a_bug_report_needs():
    text = "\n".join(report()[0])
    for word in (
        "beit_fast",
        "Python",
        "torch",
        "gloo",
        "cores",
        "GiB of memory",
        "CUDA of torch",
        "free disk",
        "DALI",
    ):
        assert word in text
