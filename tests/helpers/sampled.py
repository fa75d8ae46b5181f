"""A sample of the combinations of values that a test could try, the same one in every run."""

from __future__ import annotations

import itertools
import os
from typing import Any

FULL = "FEDMS_FULL" in os.environ


def combined(*values: list[Any], full: bool = FULL) -> list[tuple[Any, ...]]:
    """Return combinations of one value of each list, for `pytest.mark.parametrize`.

    With `full` they are all combinations. Otherwise they are as many as the longest list has values, and every value of every list
    occurs. A list that begins again is shifted, each by another number of places, so that lists of one length meet in many ways.
    """
    if full:
        return list(itertools.product(*values))
    longest = max(map(len, values))
    return [tuple(each[(i + shift * (i // len(each))) % len(each)] for shift, each in enumerate(values)) for i in range(longest)]
