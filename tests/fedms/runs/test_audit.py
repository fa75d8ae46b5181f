"""The audit of a run: attacks succeed where nothing is promised, and stay below what is promised elsewhere."""
import pytest
from typer.testing import CliRunner

from fedms.cli import app
from fedms.config import load_config
from fedms.runs import run
from fedms.runs.audit import audit

SMALL = ["run.method=fedms", "data.max_samples=160", "clients.count=4", "clients.unseen=0", "stage1.rounds=1", "stage2.rounds=1",
         "data.partition=iid", "run.threads=1", "sal.schedule=fixed", "stage2.epochs=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    run.run(load_config("digits", SMALL), path)
    return path


def test_attacks_under_each_mode(folder):
    found = {(f.stage, f.mode, f.attacker): f for f in audit(folder, count=200)}
    assert {stage for stage, _, _ in found} == {"stage1", "stage2"} and len(found) == 16
    for (_, mode, attacker), finding in found.items():
        told = finding.told_apart
        if (mode, attacker) in (("off", "server"), ("off", "reader"), ("central", "server"), ("secure", "reader")):
            assert told.accuracy == 1 and finding.claimed is None
        elif (mode, attacker) == ("secure", "server"):
            assert 0.35 < told.accuracy < 0.65 and told.epsilon < 0.5
        else:
            assert told.epsilon <= finding.claimed and told.accuracy < 1


def test_command_shows_a_table(folder):
    result = CliRunner().invoke(app, ["audit", str(folder), "--trials", "100"])
    assert result.exit_code == 0 and "stage 2" in result.output and "distributed" in result.output
