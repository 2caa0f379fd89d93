"""The Python of the docs runs: the page about own methods, and the notebook."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
OWN_METHOD = (DOCS / "how-to/own-method.md").read_text()


@pytest.mark.parametrize("page", ["how-to/python.md", "../README.md"])
def test_python_of_other_pages_runs_as_written(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.S)
    exec(compile("\n".join(blocks), page, "exec"), {})
    method, exact, acceptance, seconds = capsys.readouterr().out.splitlines()[0].split()
    assert (method, exact) == ("cspd", "False")
    assert 0 < float(acceptance) < 1 and float(seconds) > 0


def test_own_method_runs_as_written(capsys):
    """Its assertions compare it with `target` and `draft`, pixel by pixel."""
    blocks = re.findall(r"```python\n(.*?)```", OWN_METHOD, flags=re.S)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "own-method.md", "exec"), names)
    assert names["statistics"].target_calls + names["statistics"].draft_calls == 8
    assert "steps of the target" in capsys.readouterr().out
    example = [line for line in blocks[0].splitlines() if line.strip()]
    assert 30 <= len(example) <= 45


def kinds(cell) -> list[str]:
    """What kind of outputs a cell has: printed text, or the forms of a shown result."""
    return [output.get("name") or ",".join(sorted(output["data"])) for output in cell.outputs]


def test_notebook_runs_and_shows_what_it_is_stored_with():
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    stored = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    fresh = nbformat.from_dict(stored)
    # Not quiet: the bar is a widget, which a stored notebook could not show.
    loud = 'pipe("sneaker", num_iter=2, head_steps=2, quiet=False);'
    fresh.cells.append(nbformat.v4.new_code_cell(loud))
    fresh = nbclient.NotebookClient(fresh, timeout=300, kernel_name="python3").execute()
    bar = fresh.cells.pop()
    assert any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds(bar))
    cells = [(a, b) for a, b in zip(stored.cells, fresh.cells, strict=True) if "outputs" in a]
    assert all(kinds(a) == kinds(b) for a, b in cells)
    assert any("image/png" in kind for a, _ in cells for kind in kinds(a))
    printed = [output.text for output in cells[-1][1].outputs]
    assert printed == ["num_iter is 64, expected 1..49, the number of tokens of an image\n"]
