"""docs/tour.ipynb runs from its first cell to its last, in a clone."""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))


def test_the_released_checkpoint_is_small():
    folder = ROOT / "checkpoints" / "tinystories_attention"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def test_outside_a_clone_it_asks_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = next(cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    with pytest.raises(SystemExit, match="set REPOSITORY"):
        exec("".join(first["source"]), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_tour(capsys, monkeypatch):
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.syspath_prepend(str(ROOT))  # what the notebook adds is taken away again
    matplotlib.use("Agg")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(NOTEBOOK["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"tour.ipynb, cell {number}", "exec"), names)
    plt.close("all")
    said = capsys.readouterr().out
    assert "Once upon a time" in said and "validation loss" in said and "guessing is" in said
    assert float(said.split("largest difference: ")[1].split()[0]) < 1e-5
    assert all(cell["cell_type"] != "code" or not cell["execution_count"] for cell in NOTEBOOK["cells"]), "clear the outputs"
