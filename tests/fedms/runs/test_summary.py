"""A run in five steps: what its last ones leave can be made again from what is on disk."""
from __future__ import annotations

import json
import shutil

import pytest

from fedms.config import load_config
from fedms.errors import RunFolderError
from fedms.exports.trained_run import read_trained_run
from fedms.runs import run
from fedms.runs.summary import summarize
from fedms.storage.run_folder import RunFolder

CONFIG = load_config("digits", ["run.method=fedms", "data.max_samples=120", "clients.count=2", "clients.unseen=1", "stage1.rounds=1",
                                "stage2.rounds=1", "run.threads=1", "lora.rank=2"])


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    out = tmp_path_factory.mktemp("ended") / "run"
    return out, run.run(CONFIG, out)


def test_the_summary_is_made_again_from_the_records(ended, tmp_path):
    folder, summary = shutil.copytree(ended[0], tmp_path / "run"), ended[1]
    before = (folder / "summary.json").read_bytes()
    (folder / "summary.json").unlink()
    assert json.loads(json.dumps(summarize(folder))) == summary
    out = RunFolder.resume(folder, CONFIG)
    out.write_summary(summarize(folder))
    out.close()
    assert (folder / "summary.json").read_bytes() == before


def test_a_run_that_was_not_evaluated_has_no_summary(ended, tmp_path):
    folder = shutil.copytree(ended[0], tmp_path / "run")
    (folder / "outcome.json").unlink()
    with pytest.raises(RunFolderError, match="holds no outcome.json, so the run has not been evaluated"):
        summarize(folder)


def test_what_an_older_version_did_not_keep_is_added_without_training(ended, tmp_path):
    folder, summary = shutil.copytree(ended[0], tmp_path / "run"), ended[1]
    before, rounds = (folder / "final/shared.safetensors").read_bytes(), (folder / "rounds.jsonl").read_bytes()
    shutil.rmtree(folder / "final")
    with pytest.raises(RunFolderError, match=r"older version made the run; `fedms run .*config.toml --out .* --resume` adds it"):
        read_trained_run(folder)
    assert run.run(CONFIG, folder, resume=True) == summary
    assert (folder / "final/shared.safetensors").read_bytes() == before and (folder / "rounds.jsonl").read_bytes() == rounds
    trained = read_trained_run(folder)
    assert set(trained.private) == {0, 1} and trained.final.stage == "done" and trained.elsewhere == frozenset()


def test_a_damaged_end_of_a_run_is_named(ended, tmp_path):
    folder = shutil.copytree(ended[0], tmp_path / "run")
    file = folder / "final/shared.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(RunFolderError, match="final/shared.safetensors: cannot be read: it is cut off"):
        read_trained_run(folder)
