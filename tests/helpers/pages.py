"""The blocks of a page in docs/, carried out as a reader would: one folder a page, one block after the other.

A block that cannot run in the tests says so above itself, visibly: `*Not run by the tests: REASON.*`. One that another
test runs names it in a comment: `<!-- run by tests/system/test_x.py -->`.
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
NOT_RUN = re.compile(r"^\*Not run by the tests: .+\.\*$", re.S)
ELSEWHERE = re.compile(r"^<!-- run by (\S+) -->$")


@dataclass(frozen=True)
class Block:
    """language: sh, python, toml, ... above: the paragraph before it."""

    language: str
    code: str
    above: str

    @property
    def runs_here(self) -> bool:
        return self.language in ("sh", "python") and not NOT_RUN.match(self.above) and not ELSEWHERE.match(self.above)


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in re.finditer(r"^```(\S*)[^\n]*\n(.*?)^```$", text, re.M | re.S):
        yield Block(found[1], found[2], text[:found.start()].rstrip().rpartition("\n\n")[2])


def run_page(page: Path, folder: Path, python: str = sys.executable) -> str:
    """Runs all blocks in `folder` with the commands of an environment's interpreter; returns what they printed.

    Raises:
        AssertionError: with the block and its output, for one that fails.
    """
    path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])
    printed = ""
    for block in blocks(page):
        if not block.runs_here:
            continue
        command = ["bash", "-e", "-c"] if block.language == "sh" else [python, "-c"]
        done = subprocess.run([*command, block.code], cwd=folder, env={**os.environ, "PATH": path},
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}:\n{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        printed += done.stdout
    return printed


def check_predictions(printed, folder):
    """What the two walks of docs/guide/models.md end in."""
    assert "review,label,probability,gate_weight\nThe kettle: terrible and a waste,bad," in printed
    reviews, cells = pd.read_parquet(folder / "predicted.parquet"), pd.read_csv(folder / "predicted.csv")
    assert reviews.label.tolist() == ["bad", "good"] and len(cells) == 20
    for table in (reviews, cells):
        assert table.probability.between(0.5, 1).all() and table.gate_weight.between(0, 1).all()
    assert set(cells.label) <= {"cracked_cell", "sound_cell"}
    assert (folder / "adapters/client-2/adapter_model.safetensors").is_file()
    assert (folder / "runs/again/summary.json").is_file()
