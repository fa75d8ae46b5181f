"""Opinions that outlast a visit: fewer passes through the model, and the same records."""
from __future__ import annotations

import pytest
import tiny_language_models

from fedms.config import load_config, with_run
from fedms.progress import Progress
from fedms.runs.batch import BatchRun, BatchRunner
from fedms.storage.records import RunRecords, comparable
from fedms.training import kept_opinions
from fedms.training.expert_model import ExpertModel

DIGITS = ["data.max_samples=60", "clients.count=2", "clients.unseen=0", "stage1.rounds=2", "stage2.rounds=2", "run.threads=1"]
METHODS = ["local", "ditto"]


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return tiny_language_models.write_federation(tmp_path_factory.mktemp("lm"), ["ann", "bob"], 12, lambda who, i: f"{who} {i}")


@pytest.mark.parametrize("sets", [["digits", "sal.cache_bytes=20000"], ["tokens", "sal.cache_dtype=bf16"]], ids=",".join)
def test_what_a_visit_ended_with_is_not_computed_again_by_the_next(sets, federation, tmp_path, monkeypatch):
    kind, *sets = sets
    config = load_config("digits", [*DIGITS, *sets]) if kind == "digits" else tiny_language_models.configuration(
        federation, "clients.count=2", "stage1.rounds=2", *sets)
    passes, in_chunks, found = [0], ExpertModel.in_chunks, {}

    def counted(*arguments):
        passes[0] += 1
        return in_chunks(*arguments)
    monkeypatch.setattr(ExpertModel, "in_chunks", counted)
    runner = BatchRunner()
    for most in (kept_opinions.MAX_BYTES, 0):
        monkeypatch.setattr(kept_opinions, "MAX_BYTES", most)
        passes[0] = 0
        for method in METHODS:
            folder = tmp_path / f"{method}-{most}"
            runner(BatchRun(with_run(config, method=method), folder), Progress(), lambda: False)
            found.setdefault(method, []).append(comparable(RunRecords.read(folder)))
        found.setdefault("passes", []).append(passes[0])
    fewer, all_of_them = found.pop("passes")
    assert fewer < 0.9 * all_of_them
    for method, (kept, computed) in found.items():
        assert kept == computed, method
