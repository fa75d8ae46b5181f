from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

# pytest has put this folder on the path, where tests/fedms would pass for the package of that name.
sys.path.remove(str(Path(__file__).parent))
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
