"""The notebook runs from top to bottom, and every picture that it ends a cell with shows something."""

import ast
import json

from PIL import Image

from tests.docs.pages import ROOT


def test_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs/tour.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in notebook["cells"] if cell.get("outputs")]  # pictures are made, not kept
    names, pictures = {}, []
    for cell in cells:
        *body, last = ast.parse(cell).body
        assert isinstance(last, ast.Expr)  # what Jupyter shows
        exec(compile(ast.Module(body, []), "tour", "exec"), names)
        pictures.append(eval(compile(ast.Expression(last.value), "tour", "eval"), names))
    assert len(pictures) == 6
    for picture in pictures:
        assert isinstance(picture, Image.Image)
        assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 50
    assert names["masks"].sum().item() == 4 * 26
    assert [tuple(m.shape) for m in names["maps"]] == [(1, 192, 14, 20)] * 4
