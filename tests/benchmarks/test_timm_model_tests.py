"""timm's own tests on our models: how the runner reads and judges them, and, where timm's sources are, the tests."""

import os
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.timm_model_tests import BEGIN, END, PAGE, REFUSED, broken, compare, outcome, table, unpacked

THEIRS = {"test_a[beit_x]": ("passed", ""), "test_jit[beit_x]": ("passed", ""), "test_b[beit_x]": ("skipped", "large")}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("", ("passed", "")),
        ('<failure message="TypeError: no&#10;more"/>', ("failed", "TypeError: no")),
        ('<error message="no fixture"/>', ("failed", "no fixture")),
        ('<skipped message="too large"/>', ("skipped", "too large")),
    ],
)
def test_outcomes_are_read_from_pytests_report(body, expected):
    case = ElementTree.fromstring(f'<testcase name="test_a[x]">{body}</testcase>')
    assert outcome(case) == ("test_a[x]", expected)


@pytest.mark.parametrize(
    ("ours", "worse"),
    [
        ({"test_a[beit_x]": ("passed", ""), "test_jit[beit_x]": ("passed", "")}, 0),
        ({"test_a[beit_x]": ("passed", ""), "test_jit[beit_x]": ("failed", f"TypeError: {REFUSED} ...")}, 0),
        ({"test_a[beit_x]": ("passed", ""), "test_jit[beit_x]": ("failed", "RuntimeError")}, 1),
        ({"test_a[beit_x]": ("skipped", "x"), "test_jit[beit_x]": ("passed", "")}, 1),
        ({"test_jit[beit_x]": ("passed", "")}, 1),
    ],
)
def test_what_passes_for_timm_has_to_pass_or_be_refused(ours, worse):
    assert len(broken(THEIRS, ours)) == worse
    rows = table(THEIRS, ours).splitlines()
    assert rows[-1].startswith("| `test_jit` | `beit_x` | passed | ")
    assert ("| refused |" in rows[-1]) == (REFUSED in ours["test_jit[beit_x]"][1])


def test_sources_are_a_folder_or_an_archive(tmp_path):
    (tmp_path / "timm-1/tests").mkdir(parents=True)
    (tmp_path / "timm-1/tests/test_models.py").touch()
    with tarfile.open(tmp_path / "timm-1.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "timm-1", "timm-1")
    assert unpacked(tmp_path / "timm-1", tmp_path) == unpacked(tmp_path, tmp_path) == tmp_path / "timm-1"
    assert unpacked(tmp_path / "timm-1.tar.gz", tmp_path / "new") == tmp_path / "new/timm-1"
    with pytest.raises(ValueError, match="give timm's source distribution"):
        unpacked(tmp_path / "timm-1/tests", tmp_path)


def test_the_page_shows_no_test_that_is_worse_than_timms():
    shown = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    rows = [line for line in shown.splitlines() if line.startswith("| `test_")]
    assert len(rows) >= 28
    assert {row.split("|")[-2].strip() for row in rows} == {"passed", "refused"}
    assert all("torchscript" in row for row in rows if "refused" in row)


@pytest.mark.slow
def test_timms_tests_pass_for_a_base_model():
    """The other names take an hour: `python -m benchmarks.timm_model_tests`."""
    sources = os.environ.get("TIMM_SOURCES")
    if sources is None:
        pytest.skip("TIMM_SOURCES names no unpacked source distribution of timm")
    theirs, ours = compare(Path(sources), "beit_base_patch16_224 and not prune_intermediate")
    assert len(ours) >= 14
    assert broken(theirs, ours) == []
