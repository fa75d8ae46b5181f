"""Records sent to TensorBoard, Weights & Biases and MLflow: all of them on this machine, without a network."""

from __future__ import annotations

import time

import pytest
from fedms.config import ConfigError
from fedms.report.trackers import TRACKERS, Tracking
from fedms.storage.records import RunRecords
from synthetic import write_run


@pytest.fixture
def notes() -> list[str]:
    return []


def tracking(out, name: str, notes: list[str]) -> Tracking:
    return Tracking(out, [name], notes.append)


def test_an_unknown_tracker_is_refused_with_the_known_ones(tmp_path, notes):
    with pytest.raises(ConfigError, match="--track: got 'tensorbord'; accepted: tensorboard, wandb, mlflow"):
        tracking(tmp_path, "tensorbord", notes)


def test_a_missing_package_is_named_with_the_extra(tmp_path, notes, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed: pip install 'fedms\[track\]'"):
        tracking(tmp_path, "wandb", notes)


class Recorder:
    """A tracker that keeps what it is told."""

    made: list[Recorder] = []

    def __init__(self, run: RunRecords) -> None:
        self.run, self.logged, self.ended = run, [], None
        self.made.append(self)

    def log(self, step, values):
        self.logged.append((step, values))

    def end(self, values):
        self.ended = values


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(TRACKERS, "pytest", Recorder)  # by the name of a package that is there
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder


def test_every_round_is_sent_once_and_then_the_summary(tmp_path, notes, recorder):
    tracker = tracking(tmp_path, "pytest", notes)
    write_run(tmp_path / "fedms-seed0", rounds=(3, 2))
    tracker.round("stage1", 1)
    tracker.round("stage1", 2)
    write_run(tmp_path / "local-seed0", "local", rounds=(3, 2))
    tracker.close()
    assert [(made.run.method, [step for step, _ in made.logged]) for made in recorder.made] == [
        ("fedms", [1, 2, 3, 4, 5]), ("local", [1, 2, 3, 4, 5])]
    first = recorder.made[0]
    assert first.logged[0][1]["stage1/loss"] == first.run.rounds[0]["loss"]
    assert first.logged[4][1]["stage2/gate_mean"] == first.run.rounds[4]["gate_mean"]
    assert "stage1/gate_mean" not in first.logged[0][1] and "stage1/round" not in first.logged[0][1]
    assert first.ended["summary/personalized_accuracy.mean"] == first.run.summary["personalized_accuracy"]["mean"]
    assert not notes


def test_a_run_that_had_ended_before_is_left_alone_and_one_that_is_stopped_is_closed(tmp_path, notes, recorder):
    write_run(tmp_path / "local-seed0", "local")
    tracker = tracking(tmp_path, "pytest", notes)
    write_run(tmp_path / "fedms-seed0", stop_after=2)
    tracker.close()
    assert [made.run.method for made in recorder.made] == ["fedms"]
    assert len(recorder.made[0].logged) == 2 and recorder.made[0].ended == {}


@pytest.mark.parametrize("where", ["__init__", "log", "end"])
def test_a_tracker_that_fails_is_reported_and_the_run_goes_on(tmp_path, notes, recorder, monkeypatch, where):
    def fail(*_):
        raise OSError("no network")

    monkeypatch.setattr(recorder, where, fail)
    write_run(tmp_path / "earlier", rounds=(2, 1), stop_after=1)
    tracker = tracking(tmp_path, "pytest", notes)
    tracker.update()
    tracker.close()
    assert notes == [f"Recorder stopped: no network; the records in {tmp_path} are whole"]


def test_tensorboard(tmp_path, notes):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    tracker = tracking(folder, "tensorboard", notes)
    run = RunRecords.read(write_run(folder, rounds=(2, 1)))
    tracker.close()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("stage1/loss")] == pytest.approx([r["loss"] for r in run.rounds[:2]])
    assert events.Scalars("summary/macro_f1")[0].value == pytest.approx(run.summary["macro_f1"])
    assert not notes


def test_weights_and_biases_offline(tmp_path, notes, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = tracking(tmp_path / "run", "wandb", notes)
    write_run(tmp_path / "run", rounds=(2, 1))
    tracker.close()
    assert not notes
    [log] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    end = time.monotonic() + 30  # its service writes the file behind our back
    while time.monotonic() < end and b"summary/macro_f1" not in log.read_bytes():
        time.sleep(0.1)
    assert b"stage1/loss" in log.read_bytes() and b"summary/macro_f1" in log.read_bytes()


def test_mlflow_in_a_local_store(tmp_path, notes, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    from mlflow.tracking import MlflowClient

    tracker = tracking(tmp_path / "run", "mlflow", notes)
    run = RunRecords.read(write_run(tmp_path / "run", rounds=(2, 1)))
    tracker.close()
    assert not notes
    client = MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("fedms").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["run.method"] == "fedms"
    history = client.get_metric_history(found.info.run_id, "stage1/loss")
    assert [(m.step, m.value) for m in history] == [(i, r["loss"]) for i, r in enumerate(run.rounds[:2], 1)]
