"""The notebooks of the tutorials hold what the pages hold; `make docs` writes and links them."""
from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks

SPEC = importlib.util.spec_from_file_location("notebooks", ROOT / "docs/notebooks.py")
notebooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(notebooks)
full = pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="minutes: make test-full")


@pytest.mark.parametrize("name", notebooks.TUTORIALS)
def test_a_notebook_has_a_cell_for_each_block_that_runs(name):
    page = ROOT / f"docs/{name}.md"
    made = notebooks.notebook(page)
    code = [cell["source"] for cell in made["cells"] if cell["cell_type"] == "code"]
    assert code == [("%%bash\n" if block.language == "sh" else "") + block.code.rstrip("\n") for block in blocks(page) if block.runs_here]
    assert code and len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
    text = "\n".join(cell["source"] for cell in made["cells"] if cell["cell_type"] == "markdown")
    assert text.startswith("# ") and ".md)" not in text and "```sh" not in text.replace("*Not run", "")


def test_notebooks_are_valid_and_written_to_a_folder(tmp_path):
    written = notebooks.write(tmp_path / "made")
    assert [path.stem for path in written] == [Path(name).name for name in notebooks.TUTORIALS]
    nbformat = pytest.importorskip("nbformat", reason="pip install '.[docs]'")
    for path in written:
        nbformat.validate(json.loads(path.read_text()))


def test_a_block_that_is_not_run_stays_text():
    cells = notebooks.cells("# A\n\n*Not run by the tests: long.*\n\n```sh\nrm x\n```\nSee [b](b.md), [c](https://c.d).\n\n"
                            "```python\n1\n```\n")
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code"]
    assert "```sh\nrm x\n```" in cells[0]["source"] and "See b, [c](https://c.d)." in cells[0]["source"] and cells[1]["source"] == "1"


@full
def test_a_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    nbformat, nbclient = (pytest.importorskip(name, reason="pip install '.[docs]'") for name in ("nbformat", "nbclient"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    made = nbformat.reads(json.dumps(notebooks.notebook(ROOT / "docs/start/peft.md")), as_version=4)
    nbclient.NotebookClient(made, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("times as fast" in output["text"] for output in outputs if output.output_type == "stream")
