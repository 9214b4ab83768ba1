"""The example notebook, cell by cell, as a notebook's kernel runs and shows it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from bundled import needs_bundled, use_tiny_bundled

NOTEBOOK = Path(__file__).parent.parent / "examples/train_and_chat.ipynb"


@pytest.fixture
def no_window() -> Iterator[None]:
    from matplotlib import pyplot

    with matplotlib.rc_context({"backend": "agg"}):
        yield
    pyplot.close("all")


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "outputs are not for the repository"
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells() -> list[Any]:
    """What the last expression of each cell is worth."""
    names: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for text in cells():
        tree = ast.parse(text)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(NOTEBOOK), "exec"), names)
        values.append(eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names) if last else None)
    return values


def check_shown(values: list[Any]) -> None:
    shown = [value._repr_html_() for value in values if type(value).__module__.startswith("buleyean_rl.")]
    assert len(shown) == 4
    assert all(text.startswith("<pre") for text in shown)
    assert "my-model.gguf" in shown[-1]
    assert Path("my-model.gguf").exists()


@pytest.mark.usefixtures("no_window")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_bundled(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    check_shown(run_cells())


@pytest.mark.slow
@needs_bundled
@pytest.mark.usefixtures("no_window")
def test_the_notebook_runs_with_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_shown(run_cells())
