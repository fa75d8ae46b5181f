"""What a run tells PyTorch and the C library about memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


ONE_LAYER_OF_MANY_SHAPES = """
from fedms.training.memory import hand_back_large_blocks, resident_memory
hand_back_large_blocks()
import torch
torch.set_num_threads(1)
x, weight = torch.ones(900, 384).bfloat16(), torch.ones(384, 384).bfloat16()
for rows in range(20, 620):
    torch.nn.functional.linear(x[:rows], weight)
    before = resident_memory() if rows == 120 else before if rows > 120 else 0
print((resident_memory() - before) // 2**20)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch has no oneDNN")
def test_kernels_for_products_of_16_bits_do_not_add_up(monkeypatch):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    said = subprocess.run([sys.executable, "-c", ONE_LAYER_OF_MANY_SHAPES], capture_output=True, text=True, check=True).stdout
    assert int(said) < 40     # MiB; 350 where each shape's kernel is kept


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the system has no large pages")
def test_large_tensors_of_a_run_get_large_pages(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert int(said) >= 32 * 1024     # KiB, of the 64 MiB of the tensor
