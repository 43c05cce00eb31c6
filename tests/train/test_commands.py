"""`python -m beit_fast`: doctor and plot."""

import json

import pytest

from beit_fast import doctor
from beit_fast.__main__ import COMMANDS, main


def test_help_lists_every_command(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_unknown_command_names_the_nearest(capsys):
    assert main(["docter"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'docter'; did you mean doctor?\n"


def test_doctor_here(capsys):
    assert main(["doctor"]) == 0
    assert "ok       beit_fast._C" in capsys.readouterr().out


def test_doctor_says_what_is_missing(monkeypatch, capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'tyro'")

    monkeypatch.setitem(doctor.REQUIRED, "tyro", (missing, "pip install '.[train]'"))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "MISSING  tyro: pip install '.[train]'" in text
    assert "cannot start yet" in text


@pytest.mark.parametrize("lines", [[], [{"kind": "train", "step": 1, "loss": 2.5, "lr": 0.1}]])
def test_plot_of_an_unfinished_run(tmp_path, capsys, lines):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(tmp_path / "nowhere")]) == 2
    assert "error: plot takes one run folder" in capsys.readouterr().err
