"""The ledger: durable before anything leaves, never shortened, and it stops a run before its budget is exceeded."""
import json
import os
import signal
import subprocess
import sys

import pytest

from fedms.privacy.accounting import epsilon_of
from fedms.privacy.ledger import BudgetSpent, Ledger, LedgerError, Release, read_ledger


def release(number, z=2.0, **values):
    return Release(f"{number:064x}", "stage1", number, 0, z, **values)


def ledger(path, budget=None):
    return Ledger(path / "privacy.jsonl", 1e-5, "pld", None, budget)


def test_epsilon_of_what_was_released(tmp_path):
    book = ledger(tmp_path)
    assert book.epsilon == 0 and not (tmp_path / "privacy.jsonl").exists()
    for number in (1, 2):
        assert book.charge(release(number)) == pytest.approx(epsilon_of([2.0] * number, 1e-5))
    again = ledger(tmp_path)
    assert again.epsilon == book.epsilon and again.releases == [release(1), release(2)]
    lines = [json.loads(line) for line in (tmp_path / "privacy.jsonl").read_text().splitlines()]
    assert lines[1]["epsilon"] == book.epsilon and lines[1]["delta"] == 1e-5 and lines[1]["accountant"] == "pld"
    assert os.stat(tmp_path / "privacy.jsonl").st_mode & 0o777 == 0o600


def test_same_release_costs_nothing_again_and_another_one_of_the_same_round_does(tmp_path):
    book = ledger(tmp_path)
    once = book.charge(release(1))
    assert book.charge(release(1)) == once and len(read_ledger(book.path)) == 1
    assert book.charge(Release("f" * 64, "stage1", 1, 0, 2.0)) > once and len(read_ledger(book.path)) == 2


def test_stops_before_the_budget_is_exceeded(tmp_path):
    budget = epsilon_of([2.0] * 3, 1e-5)
    book = ledger(tmp_path, budget)
    for number in (1, 2, 3):
        book.charge(release(number))
    with pytest.raises(BudgetSpent, match=r"stage1, round 4: releasing it would bring epsilon to .*above privacy.epsilon"):
        book.charge(release(4))
    assert len(read_ledger(book.path)) == 3 and ledger(tmp_path, budget).epsilon <= budget


def test_parts_of_a_release_cost_together(tmp_path):
    cost = ledger(tmp_path).charge(release(1, 3.0, score=4.0))
    assert cost == pytest.approx(epsilon_of([2.4], 1e-5))


def test_cut_off_line_is_dropped_and_the_next_one_is_whole(tmp_path):
    book = ledger(tmp_path)
    book.charge(release(1))
    with open(book.path, "ab") as file:
        file.write(b'{"tag": "ab')
    again = ledger(tmp_path)
    assert again.releases == [release(1)]
    again.charge(release(2))
    assert read_ledger(book.path) == [release(1), release(2)]


@pytest.mark.parametrize("line", ["[]", "{}", "7", '{"tag": "a"}', "not json", json.dumps(
    {"tag": "a", "stage": "stage1", "round": 1, "attempt": 0, "update": -1.0, "score": None, "counts": None}), json.dumps(
    {"tag": "a", "stage": "stage1", "round": "1", "attempt": 0, "update": 1.0, "score": None, "counts": None})])
def test_damaged_line_is_no_reason_to_start_at_zero(tmp_path, line):
    (tmp_path / "privacy.jsonl").write_text(line + "\n")
    with pytest.raises(LedgerError, match=r"privacy.jsonl, line 1: not a release"):
        ledger(tmp_path)


def test_folder_that_is_gone(tmp_path):
    book = ledger(tmp_path)
    book.path = tmp_path / "gone" / "privacy.jsonl"
    with pytest.raises(LedgerError, match="nothing was released"):
        book.charge(release(1))
    assert book.epsilon == 0


CHILD = """
import os, signal, sys
from pathlib import Path
from fedms.privacy.ledger import Ledger, Release
book = Ledger(Path(sys.argv[1]), 1e-5, "pld", None, None)
for number in range(1000):
    book.charge(Release(f"{number:064x}", "stage1", number, 0, 2.0))
    print(number, flush=True)           # stands for a model that leaves
"""


def test_survives_kill_9(tmp_path):
    """Every model that left is in the ledger."""
    path = tmp_path / "privacy.jsonl"
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
    left = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    left += [int(line) for line in process.stdout.read().split()]
    process.wait()
    assert {release.round for release in read_ledger(path)} >= set(left)
