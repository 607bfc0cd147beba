"""The notebook's cells run in order, offline, and show what the text describes."""

import json

import matplotlib
import pytest
from markdown_pages import ROOT


@pytest.fixture
def cells(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    matplotlib.use(backend)


@pytest.mark.slow
def test_the_notebook_runs_and_fg_survives_swapped_backgrounds(cells):
    namespace = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "notebook.ipynb", "exec"), namespace)
    swapped = namespace["accuracy"]["test_swapped"]
    assert swapped["fg"] > swapped["full"] + 0.2
    assert namespace["without_box"].objects[0].source == "full"
