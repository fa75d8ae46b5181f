from __future__ import annotations

import os
import random

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """FEDMS_SHARD=i/n keeps every n-th test from the i-th on: bench/run_gpu.py runs such shares side by side."""
    share, _, shares = os.environ.get("FEDMS_SHARD", "0/1").partition("/")
    items[:] = items[int(share) :: int(shares)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have to show although they passed: the properties `shown` that they recorded."""
    for found in terminalreporter.getreports("passed"):
        for name, value in found.user_properties:
            if name == "shown":
                terminalreporter.write_line(value)
