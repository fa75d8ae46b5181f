"""One run file three ways, with real processes: embedded, Flower's simulation, and a SuperLink with three SuperNodes on
loopback, with TLS and authentication, by the commands of docs/deploy.md; then with processes that are killed. Minutes:
`make test-full` alone. The same without processes is in tests/fedms/test_flower.py."""
from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

from fedms.checkpoint import CheckpointFolder
from fedms.engine.flower import deployment
from fedms.records import RunRecords, comparable

ROOT = Path(__file__).parents[2]
SMALL = ["data.max_samples=300", "data.partition=iid", "clients.unseen=1", "run.threads=1", "sal.cache=disk",
         "stage1.rounds=2"]
pytestmark = pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="minutes: make test-full")


def fedms(folder, *words, timeout=900):
    environment = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
                   "OMP_NUM_THREADS": "1", "FEDMS_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-m", "fedms.cli", *words], cwd=folder, capture_output=True, text=True,
                          timeout=timeout, env=environment)
    assert done.returncode == 0, " ".join(words) + "\n" + done.stdout + done.stderr
    return done.stdout


def outcome(path):
    snapshot, _ = CheckpointFolder(path / "checkpoint").load()
    records = comparable(RunRecords.read(path))
    return {part: json.dumps(records[part]) for part in ("rounds", "visits", "clients", "summary")}, snapshot.tensors


def same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys() and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def documented():
    """The four commands of docs/deploy.md for one machine, as lists of words."""
    section = (ROOT / "docs/deploy.md").read_text().split("## Deployed, all on one machine first")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
    return [shlex.split(line)[1:] for line in block.splitlines()]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A deployment that is up, and what the documented command for a run gave."""
    folder = tmp_path_factory.mktemp("deployment")
    init, up, run, down = documented()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fedms(folder, *init, "--port", str(min(port, 60000)), *(word for value in SMALL for word in ("--set", value)))
    try:
        said = fedms(folder, *up)
        assert "with TLS and SuperNode authentication" in said
        fedms(folder, *run)
        yield folder
    finally:
        there = deployment.running(folder / "deployment")
        fedms(folder, *down)
        assert there and not any(deployment.lives(pid) for pid in there.values())


def test_three_ways_give_the_same_bits(deployed):
    run_file = "deployment/run.toml"
    for engine in ("local", "flower-sim"):
        fedms(deployed, "run", run_file, "--engine", engine, "--out", f"runs/{engine}")
    embedded = outcome(deployed / "runs/local")
    same(outcome(deployed / "runs/flower-sim"), embedded)
    same(outcome(deployed / "runs/deployed"), embedded)
    states = deployed / "deployment/states"
    assert sorted(path.name for path in states.iterdir()) == ["client-0", "client-1", "client-2"]


def test_killed_processes_are_survived(deployed):
    """A SuperNode is killed and started again while its client trains, then the SuperLink with the run's server."""
    folder = deployed / "deployment"
    host, port = deployment.connection(folder)
    commands = deployment.Commands(folder, host, port)
    words = ["run", "deployment/run.toml", "--engine", "flower", "--out", "runs/killed"]
    process = subprocess.Popen([sys.executable, "-m", "fedms.cli", *words], cwd=deployed, env=deployment.environment(folder))
    visits = deployed / "runs/killed/visits.jsonl"
    _until(lambda: visits.exists() and visits.read_text().count("\n") >= 3)
    deployment.down(folder, ["client-1"], signal.SIGKILL)
    deployment.start(folder, "client-1", commands.supernode(1, port + 2))
    _until(lambda: visits.read_text().count("\n") >= 7)
    deployment.down(folder, ["superlink"], signal.SIGKILL)
    process.wait(timeout=300)
    deployment.start(folder, "superlink", commands.superlink(host))
    fedms(deployed, *words, "--resume")
    found, embedded = outcome(deployed / "runs/killed"), outcome(deployed / "runs/local")
    lost = [v for v in RunRecords.read(deployed / "runs/killed").visits if v["status"] != "ok"]
    assert {v["client"] for v in lost} <= {1} and all(v["reason"] for v in lost)
    if not lost:
        same(found, embedded)


def _until(true, seconds=600):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)
