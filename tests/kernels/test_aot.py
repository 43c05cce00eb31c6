"""Ahead-of-time compilation: what every shipped kernel costs on each architecture, without a GPU."""

import re
from pathlib import Path

import pytest
import torch

from beit_fast.kernels import aot
from beit_fast.kernels.aot import Cost, faults, measure, recorded_costs
from beit_fast.kernels.aot_specs import ARCHITECTURES, FOLDERS, AotSpec, all_specs
from beit_fast.kernels.launch_table import SHIPPED, forget, launch_config

triton = pytest.importorskip("triton")


@pytest.mark.aot
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_configuration_stays_within_its_recorded_costs(folder: str, capability: int) -> None:
    recorded = recorded_costs().get(triton.__version__)
    if recorded is None:
        pytest.skip(f"no costs recorded for Triton {triton.__version__}; have {', '.join(recorded_costs())}")
    specs = {name: spec for name, spec in all_specs([folder]).items() if capability in spec.architectures}
    if not specs:
        pytest.skip(f"{folder} has no Triton kernel")
    wrong = []
    for name, spec in specs.items():
        wrong += faults(spec, capability, measure(spec, capability), recorded.get(f"{name} sm_{capability}"))
    assert not wrong, "\n".join(wrong)


def test_labels_and_table_agree() -> None:
    """No stale row, no configuration without one, for the Triton version at hand."""
    recorded = recorded_costs().get(triton.__version__)
    if recorded is None:
        pytest.skip(f"no costs recorded for Triton {triton.__version__}")
    assert {f"{name} sm_{arch}" for name, spec in all_specs().items() for arch in spec.architectures} == set(recorded)


SPEC = AotSpec("name", kernel=None, signature={}, constants={}, has_matmul=True)
GOOD = Cost(registers=128, stack=0, shared=49152, hmma=80, hgmma=13, narrow=0, waits=5, utcmma=25)


@pytest.mark.parametrize(
    ("change", "capability", "complaint"),
    [
        ({"stack": 8}, 90, "8 bytes of stack"),
        ({"stack": 40}, 80, "40 bytes of stack"),
        ({"registers": 137}, 90, "137 registers"),
        ({"shared": 228 * 1024}, 90, "shared memory, limit"),
        ({"shared": 50000}, 80, "shared memory, recorded"),
        ({"narrow": 8}, 90, "8 loads or stores"),
        ({"hgmma": 0}, 90, "no HGMMA"),
        ({"waits": 6}, 90, "6 waits for HGMMA, recorded 5"),
        ({"waits": 13}, 90, "each runs alone"),
        ({"utcmma": 0}, 100, "no UTCMMA"),
        ({"hmma": 0}, 120, "no HMMA"),
        ({"stack": 8}, 100, "8 bytes of stack"),
        ({"shared": 100 * 1024}, 86, "shared memory, limit"),
        ({"hmma": 0}, 80, "no HMMA"),
    ],
)
def test_each_kind_of_regression_is_named(change: dict[str, int], capability: int, complaint: str) -> None:
    assert faults(SPEC, capability, GOOD, GOOD) == []
    found = faults(SPEC, capability, Cost(**{**GOOD.__dict__, **change}), GOOD)
    assert any(complaint in line for line in found)
    assert any("not in static_costs.json" in line for line in faults(SPEC, capability, GOOD, None))


def test_launch_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's table comes first, then the architecture's row, then the default; a damaged file is named."""
    path = tmp_path / "launch.json"
    monkeypatch.setenv("BEIT_FAST_LAUNCH", str(path))
    forget()
    try:
        assert launch_config("gelu_forward", "sm_86") == SHIPPED["default"]["gelu_forward"]
        assert launch_config("residual_norm_forward", "sm_86", 4096)["num_warps"] == 16
        assert launch_config("residual_norm_forward", "sm_86", 1024)["num_warps"] == 4
        assert launch_config("gelu_forward", torch.device("cpu")) == SHIPPED["interpreter"]["gelu_forward"]
        path.write_text('{"sm_86": {"gelu_forward": {"ROWS": 1, "COLS": 64, "num_warps": 2, "num_stages": 1}}}')
        forget()
        assert launch_config("gelu_forward", "sm_86")["num_warps"] == 2
        assert launch_config("gelu_forward", "sm_90") == SHIPPED["default"]["gelu_forward"]
        with pytest.raises(ValueError, match="no row"):
            launch_config("nothing", "sm_90")
        path.write_text("{")
        forget()
        with pytest.raises(ValueError, match=re.escape(str(path))):
            launch_config("gelu_forward", "sm_90")
    finally:
        monkeypatch.undo()
        forget()


def test_the_table_can_be_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "TABLE", tmp_path / "costs.json")
    aot.write({"gelu/a sm_80": GOOD, "mim_loss/b sm_80": GOOD})
    aot.write({"gelu/c sm_80": GOOD}, folders=["gelu"])
    assert recorded_costs() == {triton.__version__: {"gelu/c sm_80": GOOD, "mim_loss/b sm_80": GOOD}}
