"""What the documents say is so."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedms.config import reference

ROOT = Path(__file__).parents[2]


def blocks(language):
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for number, code in enumerate(re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)):
            yield pytest.param(code, id=f"{path.name}-{number}")


def test_the_configuration_page_is_current():
    assert (ROOT / "docs/configuration.md").read_text() == reference(), "run: make docs"


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_blocks_run(code, tmp_path):
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert "://" in target or (path.parent / target).exists(), f"{path.name}: {target}"
