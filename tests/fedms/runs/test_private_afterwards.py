"""What can be done with a private run once it is there: its folder, exports, comparisons, searches."""
from __future__ import annotations

import json

import pytest
from private_runs import COUNT, MODES, configuration, new_key
from rich.console import Console

from fedms.errors import ConfigError
from fedms.exports import export
from fedms.exports.trained_run import read_trained_run
from fedms.privacy.key_file import create_key, derive
from fedms.progress import Progress
from fedms.report import watch
from fedms.report.page import render
from fedms.runs import batch, run, tune
from fedms.runs.experiment import LoadedTask
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.records import RunRecords

@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return new_key(tmp_path_factory.mktemp("key"))


@pytest.fixture
def configure(key):
    return lambda *sets: configuration(key, "stage1.rounds=1", "stage2.rounds=1", *sets)


@pytest.mark.parametrize("mode", ["central", "secure"])
def test_hash_of_the_data_is_keyed(mode, tmp_path, configure, key):
    """Else whoever has guessed the data could see that the guess is right."""
    config = configure(*MODES[mode], "stage1.rounds=1", "stage2.rounds=0")
    run.run(config, tmp_path / "a")
    told = json.loads((tmp_path / "a/data.json").read_text())["fingerprint"]
    bare = LoadedTask(config, Progress()).dataset.fingerprint
    assert told == derive(key.read_bytes(), "data", bare).hex() != bare
    for path in (tmp_path / "a").rglob("*"):
        assert not path.is_file() or bare.encode() not in path.read_bytes()
    create_key(tmp_path / "other", bytes(32))
    with pytest.raises(ConfigError, match="now holds other data than when .* was begun"):
        run.run(config.model_copy(update={"privacy": config.privacy.model_copy(update={"key": str(tmp_path / "other")})}),
                tmp_path / "a", resume=True)


def test_export_holds_the_shared_expert_and_no_client_s_own(tmp_path, configure):
    config = configure(*MODES["central"])
    run.run(config, tmp_path / "a")
    snapshot, _ = CheckpointFolder(tmp_path / "a/checkpoint").load()
    assert snapshot.private
    trained = read_trained_run(tmp_path / "a")
    assert not trained.private and trained.elsewhere == frozenset(range(COUNT))
    out = export(tmp_path / "a", tmp_path / "peft", "peft")
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"base", "global"}
    with pytest.raises(ConfigError, match="client 1 is not in this export, as privacy.mode does not protect it"):
        export(tmp_path / "a", tmp_path / "merged", "merged", client="1")
    run.run(configure(*MODES["central"], "run.method=fedavg"), tmp_path / "b")
    assert read_trained_run(tmp_path / "b").elsewhere == frozenset()


def test_compare_watch_and_tune(tmp_path, configure):
    """Runs are compared by what they release; a search would release more, so it is refused."""
    config = configure(*MODES["central"], "stage1.rounds=1", "stage2.rounds=0")
    batch.compare(config, ["fedavg", "fedms"], [0, 1], tmp_path / "out")
    runs = [RunRecords.read(path) for path in sorted((tmp_path / "out").iterdir())]
    page = render(runs)
    assert "differentially private with epsilon" in page and len(runs) == 4
    assert all(run.summary["personalized_accuracy"]["mean"] is not None for run in runs)
    console = Console(record=True, width=120)
    console.print(watch.view(watch.read_states(tmp_path / "out")))
    assert "fedms" in console.export_text() and watch.over(watch.read_states(tmp_path / "out"))
    with pytest.raises(ConfigError, match="privacy.mode: got .central.; trials are judged by the clients' validation"):
        tune.tune(config, ["fedms"], tmp_path / "tuned")
