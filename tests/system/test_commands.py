"""The commands as a user types them, in processes of their own: real runs of the smoke case with small settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fedms import cli
from fedms.config import registry
from fedms.storage.records import CLIENT_FIELDS, OPTIONAL, ROUND_FIELDS, SUMMARY_FIELDS, VISIT_FIELDS, RunRecords, comparable
from sklearn.datasets import load_digits
from typer.testing import CliRunner

SMALL = ["--set", "data.max_samples=200", "--set", "clients.count=3", "--set", "stage1.rounds=2",
         "--set", "stage2.rounds=1", "--set", "run.threads=1"]
VISITS = 3 * 3


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fedms", *map(str, arguments)]


def fedms(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: (process, folder)."""
    cwd = tmp_path_factory.mktemp("run")
    return fedms("run", "digits", *SMALL, cwd=cwd), cwd / "runs" / "digits" / "fedms_plus-seed0"


def test_a_run_leaves_complete_records(finished):
    process, folder = finished
    assert process.returncode == 0, process.stderr
    assert {p.name for p in folder.iterdir()} >= {
        "config.toml", "data.json", "rounds.jsonl", "visits.jsonl", "clients.jsonl", "summary.json", "report.html"}
    run = RunRecords.read(folder)
    assert run.notes == () and run.config["data"]["max_samples"] == 200
    assert [(r["stage"], r["round"]) for r in run.rounds] == [("stage1", 1), ("stage1", 2), ("stage2", 1)]
    assert [(v["stage"], v["round"], v["client"]) for v in run.visits] == [
        (r["stage"], r["round"], c) for r in run.rounds for c in range(3)]
    for records, fields in ((run.rounds, ROUND_FIELDS), (run.visits, VISIT_FIELDS), (run.clients, CLIENT_FIELDS)):
        assert all(set(record) == set(fields) - OPTIONAL for record in records)
    for visit in run.visits:
        assert visit["status"] == "ok" and visit["flops"] > 0 and visit["seconds"] > 0 and visit["loss"] > 0
        assert visit["trained_params"] > 0 and visit["peak_memory_bytes"] > 10**7
    for record in run.rounds:
        of_round = [v for v in run.visits if (v["stage"], v["round"]) == (record["stage"], record["round"])]
        for field in ("bytes_up", "bytes_down"):
            assert record[field] == sum(v[field] for v in of_round) > 0


def test_the_summary_says_what_the_records_say(finished):
    _, folder = finished
    run = RunRecords.read(folder)
    summary = run.summary
    assert set(summary) == set(SUMMARY_FIELDS) - OPTIONAL
    assert (summary["method"], summary["model"], summary["dataset"], summary["seed"]) == (
        "fedms_plus", "vit-digits", "digits", 0)
    assert summary["rounds"] == {"stage1": 2, "stage2": 1}
    seen = [c for c in run.clients if not c["unseen"]]
    assert [c["id"] for c in seen] == [0, 1, 2] and [c["id"] for c in run.clients if c["unseen"]] == [3]
    own = sorted(c["accuracy"]["personalized"] for c in seen)
    accuracy = summary["personalized_accuracy"]
    assert accuracy == pytest.approx({"mean": np.mean(own), "std": np.std(own), "worst10": own[0]})
    for client in seen:
        assert client["accuracy"]["mixture"] == client["accuracy"]["personalized"]
        assert {"global", "local"} <= {k for k, v in client["accuracy"].items() if v is not None}
        assert 0 <= client["gate_mean"] <= 1 and 0 <= client["gate_entropy"] <= np.log(2) + 1e-6
    for field in ("bytes_up", "bytes_down", "flops"):
        assert summary[field] == sum(v[field] for v in run.visits)
    assert summary["trainable_params"] == max(v["trained_params"] for v in run.visits)
    assert summary["peak_memory_bytes"] == max(v["peak_memory_bytes"] for v in run.visits)
    assert 0 <= summary["global_test_accuracy"] <= 1 and 0 < summary["trainable_percent"] < 100
    assert summary["seconds"] > 0


def test_a_run_tells_its_progress_and_its_outcome(finished):
    process, folder = finished
    for words in ("loading model vit-digits", "fedms_plus, seed 0", "stage 1 round  2", "stage 2 round  1", "loss", "depth",
                  "validation"):
        assert words in process.stderr
    mean = RunRecords.read(folder).summary["personalized_accuracy"]["mean"]
    assert f"fedms_plus reaches {100 * mean:.1f} % mean personalized accuracy" in process.stdout
    assert "fedms_plus reaches" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_same_run_twice_leaves_the_same_records(finished, tmp_path):
    _, folder = finished
    again = fedms("run", folder / "config.toml", "--out", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert comparable(RunRecords.read(tmp_path / "again")) == comparable(RunRecords.read(folder))


def test_an_existing_run_is_refused_and_left_alone(finished):
    _, folder = finished
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    process = fedms("run", "digits", *SMALL, "--out", folder, cwd=folder.parent)
    assert process.returncode == 4 and "exists and is not empty" in process.stderr and "--force" in process.stderr
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_comparison_runs_every_method_on_the_same_clients(tmp_path):
    process = fedms("compare", "digits", *SMALL, "--out", "study", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    study = tmp_path / "study"
    runs = {path.parent.name: RunRecords.read(path.parent) for path in study.glob("*/summary.json")}
    assert set(runs) == {f"{m}-seed0" for m in registry.method_names()}
    about = {tuple((c["id"], c["n_train"], c["n_test"]) for c in run.clients) for run in runs.values()}
    assert len(about) == 1
    assert runs["local-seed0"].summary["bytes_up"] == 0 < runs["fedms-seed0"].summary["bytes_up"]
    assert (study / "report.html").is_file() and len((study / "compare.csv").read_text().splitlines()) == 1 + len(registry.method_names())
    for name, run in runs.items():
        row = next(line for line in process.stdout.splitlines() if line.startswith(name.split("-")[0] + "  "))
        assert row.split()[1] == f"{100 * run.summary['personalized_accuracy']['mean']:.1f}"


# Bad input: the documented exit code, a clear message, nothing half-written

def images_with(tmp_path: Path, change) -> Path:
    digits = load_digits()
    images = digits.images[:300].astype(np.float32)
    change(images)
    np.savez(tmp_path / "mine.npz", images=images, labels=digits.target[:300])
    return tmp_path / "mine.npz"


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs in this process, as loading torch for each would take most of the time; (exit code, message)."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)

    def attempt(*arguments: object) -> tuple[int, str]:
        before = sorted(tmp_path.rglob("*"))
        result = CliRunner().invoke(cli.app, ["run", "digits", *SMALL, "--out", "out", *map(str, arguments)])
        assert sorted(tmp_path.rglob("*")) == before
        assert "Traceback" not in result.stderr and result.stdout == ""
        return result.exit_code, result.stderr

    yield attempt
    torch.set_num_threads(threads)


def test_an_unknown_key(refused):
    code, message = refused("--set", "stage1.round=3")
    assert code == 2 and "stage1.round: unknown key; did you mean stage1.rounds?" in message


def test_nan_in_the_data(tmp_path, refused):
    def poison(images):
        images[17, 3, 3] = np.nan

    path = images_with(tmp_path, poison)
    code, message = refused("--set", f"data.path={path}")
    assert code == 3 and f"{path}: image 17 holds NaN" in message
    process = fedms("run", "digits", "--set", f"data.path={path}", "--out", "out", cwd=tmp_path)
    assert process.returncode == 3 and "image 17 holds NaN" in process.stderr and not (tmp_path / "out").exists()


def test_a_truncated_data_file(tmp_path, refused):
    path = images_with(tmp_path, lambda images: None)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, message = refused("--set", f"data.path={path}")
    assert code == 3 and str(path) in message and "expected a .npz file" in message


def test_a_data_file_that_is_not_there(refused):
    code, message = refused("--set", "data.path=none.npz")
    assert code == 3 and "none.npz" in message


def test_a_folder_that_cannot_be_made(tmp_path, refused):
    (tmp_path / "file").write_text("")
    code, message = refused("--out", "file/deeper")
    assert code == 4 and "file/deeper: cannot be written: Not a directory" in message


@pytest.mark.parametrize("settings, code", [
    (["clients.count=500"], 3),          # more clients than samples to share
    (["sal.depth=99"], 2),               # more blocks than the model has
    (["sal.order=[1, 2, 99]"], 2),
    (['model.targets=["nothing"]'], 2),
])
def test_settings_that_do_not_fit_the_model_or_the_data(refused, settings, code):
    got, message = refused(*(part for s in settings for part in ("--set", s)))
    assert got == code, message
    assert settings[0].split("=")[0] in message


def test_training_that_diverges_everywhere_fails_with_its_reason(tmp_path):
    process = fedms("run", "digits", *SMALL, "--set", "stage1.lr=1e30", "--set", "stage1.clip=0",
                    "--set", "stage1.epochs=3", "--out", "out", cwd=tmp_path)
    assert process.returncode == 1 and "no client could train" in process.stderr
    run = RunRecords.read(tmp_path / "out")
    assert run.summary is None and {v["status"] for v in run.visits[-3:]} == {"failed"}
    # Several steps: after the first one alone the weights are huge, and refused by the server, but finite.
    assert "diverged" in run.visits[-1]["reason"]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_ends_a_run_with_130_and_keeps_its_records(tmp_path):
    process = subprocess.Popen(command("run", "digits", "--set", "stage1.rounds=5000", "--set", "run.threads=1",
                                       "--out", "out"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    try:
        visits = tmp_path / "out" / "visits.jsonl"
        patience = time.monotonic() + 240
        while not (visits.is_file() and visits.stat().st_size) and time.monotonic() < patience:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and output == ""
    assert "stopping after this client" in errors and "stopped: stage1, round 1" in errors and "Traceback" not in errors
    assert "--out out --resume" in errors
    assert RunRecords.read(tmp_path / "out").summary is None
    assert fedms("report", "out", cwd=tmp_path).returncode == 0
    assert "has not ended" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_doctor_finds_this_installation_fit(tmp_path):
    process = fedms("doctor", cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "kernels" in process.stdout and "problem" not in process.stdout


@pytest.mark.parametrize("words, code", [
    (["run", "digits", "--set", "a.b=1"], 2), (["run", "digits", "--method", "fedavgg"], 2),
    (["compare", "digits", "--methods", "fedsm"], 2), (["run", "digits", "--set", "data.name=digit"], 2),
    (["run", "digits", "--set", "data.name=./none.csv"], 3), (["run", "sentiment", "--set", "model.id=minilmm"], 2),
    (["--help"], 0), (["exit-codes"], 0), (["init"], 2)])
def test_mistakes_are_answered_without_loading_torch(tmp_path, words, code):
    script = (f"import sys; from fedms.cli import app; sys.argv = ['fedms', *{words!r}]\n"
              "try: app()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60,
                          stdin=subprocess.DEVNULL)
    assert done.stderr.split()[-2:] == [str(code), "False"], done.stderr


def test_json_lines_are_sorted_and_of_one_line_each(finished):
    _, folder = finished
    for name in ("rounds.jsonl", "visits.jsonl", "clients.jsonl"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            assert list(json.loads(line)) == sorted(json.loads(line))
