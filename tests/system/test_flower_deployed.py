"""One run file three ways, with real processes: embedded, Flower's simulation, and a SuperLink with three SuperNodes on
loopback, with TLS and authentication, by the commands of docs/guide/deploy.md; then among processes that are killed, hang and
lie. Minutes: `make test-full` alone. The same without processes is in tests/fedms/engines/test_flower.py."""
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

import psutil
import pytest
import torch

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

from fedms import methods
from fedms.config import load_config
from fedms.engines import local
from fedms.engines.flower import certificates, deployment
from fedms.federated.client import Visit, visit
from fedms.federated.server import Server
from fedms.runs.run import run
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.private_state import ClientFolder
from fedms.storage.records import RunRecords, comparable

ROOT = Path(__file__).parents[2]
SMALL = ["data.max_samples=300", "data.partition=iid", "clients.unseen=1", "run.threads=1", "sal.cache=disk",
         "stage1.rounds=2"]
pytestmark = pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="minutes: make test-full")


def environment(folder):
    return {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1", "FEDMS_CACHE": str(folder / "cache")}


def fedms(folder, *words, timeout=900):
    done = subprocess.run([sys.executable, "-m", "fedms", *words], cwd=folder, capture_output=True, text=True,
                          timeout=timeout, env=environment(folder))
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
    """The four commands of docs/guide/deploy.md for one machine, as lists of words."""
    section = (ROOT / "docs/guide/deploy.md").read_text().split("## Deployed, all on one machine first")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
    return [shlex.split(line)[1:] for line in block.splitlines()]


def free_ports():
    """The first of some ports that are free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(probe.getsockname()[1], 60000)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A deployment that is up, and what the documented command for a run gave."""
    folder = tmp_path_factory.mktemp("deployment")
    init, up, start, down = documented()
    fedms(folder, *init, "--port", str(free_ports()), *(word for value in SMALL for word in ("--set", value)))
    try:
        said = fedms(folder, *up)
        assert "with TLS and SuperNode authentication" in said
        fedms(folder, *start)
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


# Six clients, three a round. What happens to whom hangs on who is sampled when (seed 0), which the test checks first.
ROUNDS = {"stage1": 4, "stage2": 2}
DEADLINE = 150      # seconds: no honest client shall miss it on a machine that is busy with other things
SAMPLED = [(1, 2, 3), (0, 1, 5), (0, 3, 4), (1, 4, 5), (1, 2, 4), (0, 3, 5)]
MISBEHAVIOR = {"1": {"stage1 2": "hang"}, "3": {"stage1 1": "remember", "stage1 3": "replay"}, "4": {"stage1 4": "nan"}}
REASONS = {("stage1", 2, 1): f"no answer within {DEADLINE} s", ("stage1", 2, 5): "no answer",
           ("stage1", 3, 3): "it answers another message, an old one", ("stage1", 4, 4): "holds NaN or infinity"}


def test_chaos_among_real_processes(tmp_path, monkeypatch):
    """A SuperNode is killed while its client trains and started again, one hangs until it is started again, one replays an
    old reply, one sends NaN, an intruder has a key of its own making, the SuperLink is killed with all that belongs to it,
    later the ServerApp alone: the honest lose nothing. With twelve clients and rounds: tests/fedms/engines/test_flower.py."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "misbehaving"))
    monkeypatch.setenv("MISBEHAVIOR", json.dumps(MISBEHAVIOR))
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path / "cache"))
    folder, port = tmp_path / "deployment", free_ports()
    sets = ["clients.count=6", "clients.unseen=0", "clients.fraction=0.5", f"clients.round_timeout={DEADLINE}",
            "run.threads=1", "data.max_samples=300", "data.partition=iid", "sal.cache=disk",
            *(f"{s}.rounds={n}" for s, n in ROUNDS.items())]
    fedms(tmp_path, "flower", "init", "deployment", "digits", "--port", str(port),
          *(word for value in sets for word in ("--set", value)))
    config = load_config(str(folder / "run.toml"))
    server = Server(config, [1], {}, methods.create(config))
    assert [server.sample(stage, number + 1) for stage, count in ROUNDS.items() for number in range(count)] == SAMPLED
    commands = deployment.Commands(folder, deployment.HOST, port)
    out, words = tmp_path / "runs/run", ["run", "deployment/run.toml", "--engine", "flower", "--out", "runs/run"]
    try:
        fedms(tmp_path, "flower", "up", "deployment")
        certificates.make(tmp_path / "foreign", ["127.0.0.1"], 4)
        own, foreign = str(folder / "certificates/client-3"), str(tmp_path / "foreign/client-3")
        deployment.start(folder, "intruder", [word.replace(own, foreign) for word in commands.supernode(3, port + 20)])

        process = start_fedms(tmp_path, words)
        _until(lambda: "ROUND stage1 2]" in (folder / "flower/client-5.log").read_text(), process)
        deployment.down(folder, ["client-5"], signal.SIGKILL)
        _until(lambda: _lines(out) >= 6, process)
        deployment.down(folder, ["client-1"])
        join(folder, "client-1", commands.supernode(1, port + 2))
        _until(lambda: _lines(out) >= 7, process)
        kill(deployment.running(folder)["superlink"])
        end(process)
        deployment.start(folder, "superlink", commands.superlink(deployment.HOST))
        deployment.wait(folder, "superlink", port)
        join(folder, "client-5", commands.supernode(5, port + 6))

        process = start_fedms(tmp_path, [*words, "--resume"])
        _until(lambda: _lines(out) >= 13, process)
        kill(deployment.running(folder)["superlink"], "flwr-serverapp")
        end(process)
        fedms(tmp_path, *words, "--resume")
        refused = (folder / "flower/intruder.log").read_text()
    finally:
        fedms(tmp_path, "flower", "down", "deployment")

    assert "Failed to activate SuperNode" in refused, refused
    check_that_the_honest_lost_nothing(tmp_path, out, monkeypatch)


def check_that_the_honest_lost_nothing(root, out, monkeypatch):
    """The run lost the visits that it had to lose, and ended as the embedded one without these."""
    records = RunRecords.read(out)
    lost = {(v["stage"], v["round"], v["client"]): v["reason"] for v in records.visits if v["status"] != "ok"}
    assert lost.keys() == REASONS.keys() and all(REASONS[visit] in reason for visit, reason in lost.items()), lost
    assert len(records.visits) == 18 and records.summary is not None

    def without(step, model, client, private, message):
        if (message.stage, message.round, client.id) in lost:
            return Visit(None, "absent", 0, 0.0, 0), private
        return visit(step, model, client, private, message)

    monkeypatch.setattr(local, "visit", without)
    run(load_config(str(root / "deployment/run.toml"), ["run.engine=local"]), root / "embedded")
    found, embedded = (CheckpointFolder(path / "checkpoint").load()[0] for path in (out, root / "embedded"))
    assert all(torch.equal(found.tensors[name], t) for name, t in embedded.tensors.items() if name.startswith("tensors/"))
    assert comparable(records)["clients"] == comparable(RunRecords.read(root / "embedded"))["clients"]
    for client, own in embedded.private.items():
        with ClientFolder(root / f"deployment/states/client-{client}", found.state["run"], client) as its:
            private = its.load(found.state["kept"][str(client)]).tensors
        assert private.keys() == own.keys() and all(torch.equal(private[name], own[name]) for name in own), client


def start_fedms(folder, words):
    return subprocess.Popen([sys.executable, "-m", "fedms", *words], cwd=folder, env=environment(folder),
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def end(process):
    """The terminal that watches a run whose server is gone is closed."""
    process.terminate()
    process.wait(timeout=60)


def join(folder, name, command, seconds=150):
    """Starts a SuperNode until it stays: Flower takes one that was killed for alive, and refuses it, for a minute."""
    log, deadline = folder / f"flower/{name}.log", time.monotonic() + seconds
    before = log.read_text().count("SuperNode ID")
    while log.read_text().count("SuperNode ID") == before:
        assert time.monotonic() < deadline
        if name not in deployment.running(folder):
            deployment.start(folder, name, command)
        time.sleep(0.5)


def kill(pid, only=""):
    """SIGKILL to a process and its descendants, or to those of them with this command."""
    there = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    chosen = [process for process in there if any(only in word for word in process.cmdline())]
    assert chosen
    for process in chosen:
        process.kill()
    psutil.wait_procs(chosen, timeout=20)


def _lines(out):
    path = out / "visits.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _until(true, process, seconds=600):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
