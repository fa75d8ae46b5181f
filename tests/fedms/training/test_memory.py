"""What a run tells PyTorch and the C library about memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# A process of its own: PyTorch reads the variable once, at its first tensor.
SCRIPT = """
import re
from fedms.runs.run import run
from fedms.training.memory import hand_back_large_blocks
import torch
hand_back_large_blocks()
kept = torch.ones(2**24)
print(sum(map(int, re.findall(r"AnonHugePages: +(\\d+)", open("/proc/self/smaps").read()))))
"""


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the system has no large pages")
def test_large_tensors_of_a_run_get_large_pages(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert int(said) >= 32 * 1024     # KiB, of the 64 MiB of the tensor
