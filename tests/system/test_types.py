"""The annotations hold, as mypy sees them with the settings in pyproject.toml."""
from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_types():
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("THE TYPES ARE NOT CHECKED HERE: install mypy")
    process = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
