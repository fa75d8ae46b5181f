"""docs/models-and-data.md from top to bottom, as a new user would: each block in a shell, one after the other."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

PAGE = Path(__file__).parents[2] / "docs/models-and-data.md"


@pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="takes minutes: make test-full")
def test_the_walks_on_the_page(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    output = ""
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        done = subprocess.run(["bash", "-e", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=600)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        output += done.stdout
    assert "text,label,probability,gate_weight\nThe kettle: terrible and a waste,bad," in output
    reviews, cells = pd.read_parquet(tmp_path / "predicted.parquet"), pd.read_csv(tmp_path / "predicted.csv")
    assert reviews.label.tolist() == ["bad", "good"] and len(cells) == 20
    for table in (reviews, cells):
        assert table.probability.between(0.5, 1).all() and table.gate_weight.between(0, 1).all()
    assert set(cells.label) <= {"cracked_cell", "sound_cell"}
    assert (tmp_path / "adapters/client-2/adapter_model.safetensors").is_file()
    assert (tmp_path / "runs/again/summary.json").is_file()
