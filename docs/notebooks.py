"""Writes the tutorials as Jupyter notebooks: the same text, and a cell for each block that the tests run.

    python docs/notebooks.py DIR

`make docs` does it too, and links each notebook from its page. A notebook is JSON (nbformat 4.5): text is a Markdown cell, a Python
block a code cell, a shell block a code cell that begins with %%bash.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
TUTORIALS = ("start/tutorial", "start/own_table", "start/language_model", "start/two_laptops", "start/method", "start/peft")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```\n?", re.M | re.S)


def cells(page: str) -> list[dict[str, object]]:
    """Return the cells of a page's text. A block below "*Not run by the tests: ...*" stays text."""
    found: list[dict[str, object]] = []
    text = ""
    for part in re.split(r"(^```(?:sh|python)\n.*?^```\n?)", page, flags=re.M | re.S):
        block = BLOCK.fullmatch(part)
        if block is None or text.rstrip().rpartition("\n\n")[2].startswith("*Not run by the tests"):
            text += part
            continue
        found += _markdown(text, len(found))
        text = ""
        code = ("%%bash\n" if block[1] == "sh" else "") + block[2].rstrip("\n")
        found.append({"cell_type": "code", "id": f"cell-{len(found)}", "metadata": {}, "execution_count": None, "outputs": [],
                      "source": code})
    return found + _markdown(text, len(found))


def _markdown(text: str, number: int) -> list[dict[str, object]]:
    """Return a Markdown cell, or nothing for an empty text. Links to other pages lead nowhere from a notebook: their words stay."""
    plain = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text).strip()
    return [{"cell_type": "markdown", "id": f"cell-{number}", "metadata": {}, "source": plain}] if plain else []


def notebook(page: Path) -> dict[str, object]:
    """Return the notebook of a page as plain values."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells(page.read_text()), "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def write(folder: Path) -> list[Path]:
    """Write all notebooks to a folder, NAME.ipynb each."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in TUTORIALS:
        written.append(folder / f"{Path(name).name}.ipynb")
        written[-1].write_text(json.dumps(notebook(DOCS / f"{name}.md"), indent=1, ensure_ascii=False) + "\n")
    return written


if __name__ == "__main__":
    for path in write(Path(sys.argv[1])):
        print(path)
