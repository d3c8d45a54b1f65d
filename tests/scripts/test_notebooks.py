"""The notebooks are run, cell by cell, as Jupyter would: the value of a cell's last line is shown."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

from shortstack.artifacts.results import load_results
from tests import pico
from tests.retraining.material import texts

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
SHORT: dict[str, Any] = {"REMOVE": 1, "WINDOWS": 3, "STEPS": 2}


@pytest.fixture(autouse=True)
def plots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plots are drawn and not shown."""
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    plt.close("all")
    matplotlib.use(before)


def run_notebook(path: Path, change: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(what its cells left, what Jupyter would show). `change` is laid over the cell that is tagged `parameters`."""
    names: dict[str, Any] = {"__name__": "notebook"}
    shown = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name} {cell['id']}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"{path.name} {cell['id']}", "eval"), names)
            shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
        if "parameters" in cell["metadata"].get("tags", ()):
            assert {"MODEL", "TEXT", "WORK"} <= names.keys()
            names |= {name: value for name, value in change.items() if name in names}
    return names, shown


def looked_at(path: Path, names: dict[str, Any], shown: list[str]) -> None:
    results = load_results(names["WORK"] / "ppl.json").results
    assert len(results) == {"five-minutes": 2, "heal-and-compare": 3}[path.stem]
    assert any("<table>" in one for one in shown)
    assert all(axes.has_data() for number in plt.get_fignums() for axes in plt.figure(number).axes)
    assert len(plt.get_fignums()) == {"five-minutes": 2, "heal-and-compare": 1}[path.stem]
    if path.stem == "heal-and-compare":
        assert (names["WORK"] / "report.html").is_file()
        assert len(names["points"]) >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_on_a_pico_model(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pico.build(tmp_path / "model", "llama", max_position_embeddings=256)
    text = texts(tmp_path / "text.jsonl", rows=30, words=120)
    change = {"MODEL": str(model), "TEXT": str(text), "WORK": tmp_path, **SHORT}
    looked_at(path, *run_notebook(path, change))
    printed = capsys.readouterr()
    assert "1 of 6 blocks" in printed.out
    assert printed.err == "" or "Warning" not in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_as_it_stands(path: Path, tmp_path: Path) -> None:
    names, shown = run_notebook(path, {"WORK": tmp_path})
    looked_at(path, names, shown)
    assert names["plan"].removed == (5, 7, 9)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    record = json.loads(path.read_text())
    assert (record["nbformat"], record["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in record["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in record["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]


def test_notebooks_are_linked() -> None:
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        assert f"docs/notebooks/{path.name}" in (ROOT / "README.md").read_text()
        assert f"notebooks/{path.stem}.md" in (ROOT / "docs/index.md").read_text()
        assert f"notebooks/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text()
