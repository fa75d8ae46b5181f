"""The live view of runs, and their records as frames."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import fedms
import pytest
from fedms import cli
from fedms.report.watch import RunState, over, read_states, sparkline, view
from fedms.storage.durable import FolderLock, owner
from fedms.errors import RunFolderError
from rich.console import Console
from synthetic import write_run
from typer.testing import CliRunner


def text(states: list[RunState]) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(view(states))
    return console.file.getvalue()


def test_a_run_is_running_while_a_process_has_its_folder(tmp_path):
    folder = write_run(tmp_path / "fedms-seed0", stop_after=5, rounds=(6, 4))
    assert [s.state for s in read_states(tmp_path)] == ["stopped"]
    lock = FolderLock(folder)
    assert owner(folder) == os.getpid()
    [state] = read_states(tmp_path)
    assert state.state == "running" and not over([state])
    assert state.rounds == 10 and 50 <= state.seconds_left <= 55  # five rounds of 10 to 11 seconds
    lock.release()
    assert owner(folder) is None


def test_the_lock_of_a_dead_process_counts_for_nothing(tmp_path):
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    folder = write_run(tmp_path / "run", stop_after=1)
    (folder / ".lock").write_text(f"{child}\n")
    assert [s.state for s in read_states(folder)] == ["stopped"]


def test_the_view_shows_a_line_a_run_and_what_happened_last(tmp_path):
    write_run(tmp_path / "fedms-seed0", rounds=(8, 4))
    write_run(tmp_path / "local-seed0", "local", stop_after=7)
    (tmp_path / "fedavg-seed0").mkdir()
    (tmp_path / "fedavg-seed0/config.toml").write_bytes((tmp_path / "fedms-seed0/config.toml").read_bytes())
    shown = text(read_states(tmp_path))
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    assert "ended" in lines["fedms-seed0"] and "12/12" in lines["fedms-seed0"] and "MB" in lines["fedms-seed0"]
    assert "stopped" in lines["local-seed0"] and "7/12" in lines["local-seed0"]
    assert "0/12" in lines["fedavg-seed0"]  # nothing is recorded yet
    assert "local-seed0, round 6: activated blocks 5" in shown


def test_a_language_model_is_watched_by_the_perplexity_of_its_mean_loss(tmp_path):
    folder = write_run(tmp_path / "fedms-seed0", stop_after=2, sets=("task.kind=causal_lm", "model.id=smollm2", "data.name=dictionaries"))
    rounds = folder / "rounds.jsonl"
    records = [{**json.loads(line), "validation_accuracy": 0.25} for line in rounds.read_text().splitlines()]
    states = []
    for nats in ({"validation_loss": 2.0}, {}):        # records of earlier versions have no loss
        kept = [{key: value for key, value in record.items() if key != "validation_loss"} | nats for record in records]
        rounds.write_text("".join(json.dumps(record) + "\n" for record in kept))
        states.append(text(read_states(folder)))
    assert "perplexity 7.4" in states[0] and "perplexity 4.0" in states[1]


def test_an_accuracy_of_nothing_is_shown(tmp_path):
    folder = write_run(tmp_path / "fedms-seed0", stop_after=1)
    rounds = folder / "rounds.jsonl"
    rounds.write_text(json.dumps({**json.loads(rounds.read_text()), "validation_accuracy": 0.0}) + "\n")
    assert " 0.0%" in text(read_states(folder))


def test_sparkline():
    assert sparkline([0.0, None, 0.5, 1.0]) == "▁▅█" or sparkline([0.0, None, 0.5, 1.0]) == "▁▄█"
    assert sparkline([0.3, 0.3]) == "▄▄" and sparkline([]) == "" and len(sparkline([float(i) for i in range(99)])) == 16


def test_the_command_shows_the_state_once_where_there_is_no_terminal(tmp_path):
    write_run(tmp_path / "fedms-seed0")
    result = CliRunner().invoke(cli.app, ["watch", str(tmp_path)])
    assert result.exit_code == 0 and "fedms-seed0" in result.output and "ended" in result.output


def test_the_command_names_a_folder_without_runs(tmp_path):
    result = CliRunner().invoke(cli.app, ["watch", str(tmp_path)])
    assert result.exit_code == 4 and "holds no run" in result.stderr


def test_results_are_frames_with_a_row_a_round_a_visit_a_client_and_a_run(tmp_path):
    write_run(tmp_path / "fedms-seed0", rounds=(3, 2), clients=4, unseen=1)
    write_run(tmp_path / "local-seed1", "local", seed=1, rounds=(3, 2), clients=4, unseen=1, stop_after=2)
    found = fedms.results(tmp_path)
    assert len(found.rounds) == 5 + 2 and len(found.visits) == 4 * (5 + 2)
    assert set(found.rounds.method) == {"fedms", "local"} and list(found.runs.run) == ["fedms-seed0"]
    assert len(found.clients) == 5 and found.clients["accuracy.personalized"].between(0, 1).all()
    by_stage = found.rounds[found.rounds.method == "fedms"].groupby("stage").bytes_up.sum()
    assert by_stage["stage1"] > 0
    with pytest.raises(RunFolderError, match="no such folder"):
        fedms.results(Path("nowhere"))
