"""Real kills and real full disks. FEDMS_CRASHES=30 (`make test-full`) for more of them."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CRASHES = int(os.environ.get("FEDMS_CRASHES", 4))


def crashes(*arguments):
    process = subprocess.run([sys.executable, Path(__file__).with_name("crashes.py"), *map(str, arguments)],
                             capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(process.stdout)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_killed_runs_end_in_the_same_bytes():
    said = crashes("--kills", CRASHES)
    assert said.count("same bytes") == CRASHES and "killed at write" in said


def _can_mount(folder):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", folder], check=True)
    return mounted


def test_full_disks_are_survived(tmp_path):
    if not _can_mount(tmp_path):
        pytest.skip("mounting a small file system needs root")
    said = crashes("--disks", CRASHES)
    assert said.count("records whole") == said.count("same bytes") == CRASHES and "full" in said
