"""Intervals by seed and average ranks, against numbers that are worked out by hand or published."""
from __future__ import annotations

import math
import random

import pytest
from fedms.report.intervals import average_ranks, by_seed


def test_clients_of_a_seed_count_as_one():
    """Three seeds with means 1, 2 and 6: mean 3, standard deviation sqrt(7), t(0.975, 2) = 4.3027."""
    draw = random.Random(0)
    gaps = {}
    for seed, mean in enumerate((1.0, 2.0, 6.0)):
        noise = [draw.gauss(0, 5) for _ in range(20)]
        gaps |= {(seed, client): mean + each - sum(noise) / 20 for client, each in enumerate(noise)}
    found = by_seed(gaps)
    assert (found.mean, found.seeds) == (pytest.approx(3.0), 3)
    assert found.half == pytest.approx(4.3027 * math.sqrt(7) / math.sqrt(3), rel=1e-4)
    assert found.shows == "no difference shown"
    assert by_seed({key: 3 + gap / 1000 for key, gap in gaps.items()}).shows == "better"
    assert by_seed({key: -3 + gap / 1000 for key, gap in gaps.items()}).shows == "worse"
    assert by_seed({(0, 1): 0.5, (0, 2): 0.7}).shows == "one seed" and by_seed({}) is None


def test_ranks_and_their_critical_difference():
    """Four classifiers on 14 data sets (Demsar 2006, table 6): CD = 2.569 * sqrt(4 * 5 / (6 * 14)) = 1.25."""
    blocks = [{"a": 0.9, "b": 0.8, "c": 0.8, "d": 0.1, **({"e": 0.5} if i else {})} for i in range(14)]
    found = average_ranks(blocks)
    assert found.mean == {"a": 1.0, "b": 2.5, "c": 2.5, "d": 4.0} and found.blocks == 14
    assert found.critical == pytest.approx(2.569 * math.sqrt(20 / 84), rel=1e-3)
    assert found.p < 1e-6 and found.alike("b") == ["c"] and found.alike("a") == []
    assert average_ranks(blocks[:1]) is None and average_ranks([]) is None
