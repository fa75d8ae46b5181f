"""docs/guide/deploy.md word for word, by four strangers: each machine is a network of its own (ip netns) with a folder of its
own, and data in a form of its own. In the middle the server and a client are killed. Minutes, and root: `make test-full` alone; the same in
one process is in tests/fedms/deployment."""
from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

from federation import NAMES, markers_of, run_file, write_data

from fedms.config import dump_toml
from fedms.exports import export, mixture
from fedms.runs.run import run
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.records import RunRecords

PAGE = Path(__file__).parents[2] / "docs/guide/deploy.md"
HOSTS = {name: f"fedms-{os.getpid()}-{name}" for name in ("server", *NAMES)}
FORMS = {"anna": "own.csv", "bert": "own.parquet", "cleo": "own", "dora": "own.jsonl"}
PATIENCE = 1200         # seconds for a command, on a machine that does other work too
CONTROL = b"a-marker-that-is-sent-in-the-clear"        # shows that the tap sees what is sent
pytestmark = pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="minutes: make test-full")

# Writes every packet that crosses the server's bridge to a file.
SNIFF = """
import socket, sys
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
tap.bind(("bridge", 0))
with open(sys.argv[1], "wb", buffering=0) as file:
    while True:
        file.write(tap.recv(65535))
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """A server at 10.77.0.1 and four clients, which reach it and each other by nothing else."""
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("networks of their own need root and iproute2")
    try:
        ip("netns", "add", HOSTS["server"])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    try:
        inside = ("-n", HOSTS["server"])
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "link", "add", "bridge", "type", "bridge")
        ip(*inside, "address", "add", "10.77.0.1/24", "dev", "bridge")
        ip(*inside, "link", "set", "bridge", "up")
        for number, name in enumerate(NAMES):
            host = HOSTS[name]
            ip("netns", "add", host)
            ip(*inside, "link", "add", f"to-{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
            ip(*inside, "link", "set", f"to-{number}", "master", "bridge", "up")
            ip("-n", host, "address", "add", f"10.77.0.{number + 2}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", host, "link", "set", link, "up")
        yield
    finally:
        for host in HOSTS.values():
            listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True)
            for pid in map(int, listed.stdout.split()):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def start(host, folder, words, log, stdin=subprocess.DEVNULL):
    """Types a command into a machine's shell, in its folder."""
    environment = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
                   "OMP_NUM_THREADS": "1", "FEDMS_CACHE": str(folder / "cache"), "HOME": str(folder)}
    command = re.sub("^fedms ", f"{sys.executable} -m fedms ", words.replace("fl.example.org", "10.77.0.1"), flags=re.M)
    with open(log, "a") as file:
        return subprocess.Popen(["ip", "netns", "exec", HOSTS[host], "bash", "-e", "-c", command], cwd=folder, env=environment,
                                stdin=stdin, stdout=file, stderr=subprocess.STDOUT)


def type_in(host, folder, words, answer=b""):
    log = folder.parent / f"{host}.log"
    log.write_text("")
    process = start(host, folder, words, log, subprocess.PIPE)
    process.communicate(answer, timeout=PATIENCE)
    assert process.returncode == 0, words + "\n" + log.read_text()
    return log.read_text()


def until(found, process, log):
    deadline = time.monotonic() + PATIENCE
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def kill(process):
    """As a power cut does: the process and its children at once."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for pid in map(int, children.stdout.split()):
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


def test_four_strangers(tmp_path, machines):
    section = PAGE.read_text().split("## From two empty machines")[1].split("\n## ")[0]
    init, join, begin, accept, serve, predict = (block.strip() for block in re.findall(
        r"^<!-- run by tests/system/test_deploy_page.py -->\n\n```sh\n(.*?)^```", section, re.M | re.S))
    server = tmp_path / "server"
    server.mkdir()
    config = run_file(tmp_path, "stage1.rounds=3", "clients.round_timeout=300")
    (server / "my-run.toml").write_text(dump_toml(config))
    type_in("server", server, init)
    tap = subprocess.Popen(["ip", "netns", "exec", HOSTS["server"], sys.executable, "-c", SNIFF, str(tmp_path / "traffic")])
    lines = {}
    for name in NAMES:
        folder = tmp_path / name
        write_data(folder, name)
        shutil.copytree(tmp_path / "model", folder / "base")
        shutil.copy(server / "federation/invite.toml", folder)
        words = join.replace("cases.csv", FORMS[name]).replace("clinic-7", name) + " --model base"
        (lines[name],) = [line for line in type_in(name, folder, words, b"y\n").splitlines() if line.startswith("ecdsa-")]
    for name, line in lines.items():
        type_in("server", server, accept.replace("ecdsa-sha2-nistp384 AAAA... clinic-7", line))
    clients = {name: start(name, tmp_path / name, begin, tmp_path / f"{name}.log") for name in NAMES}

    log, rounds = tmp_path / "server.log", server / "federation/run/rounds.jsonl"
    first = start("server", server, serve, log)
    until(lambda: rounds.exists() and rounds.read_text().count("\n") >= 1, first, log)
    kill(first)
    kill(clients["dora"])
    start("dora", tmp_path / "dora", begin, tmp_path / "dora.log")
    again = start("server", server, serve, log)
    until(lambda: (server / "federation/run/summary.json").exists(), again, log)
    assert again.wait(PATIENCE) == 0, log.read_text()
    type_in("bert", tmp_path / "bert", f"echo -n {CONTROL.decode()} > /dev/udp/10.77.0.1/9")
    time.sleep(1)
    tap.kill()
    records = RunRecords.read(server / "federation/run")
    assert [v["status"] for v in records.visits] == ["ok"] * 16, records.visits
    assert [c["group"] for c in records.clients] == list(NAMES)
    check_markers(tmp_path)

    embedded = rehearsed(tmp_path)
    deployed, there = (CheckpointFolder(path / "checkpoint").load()[0].tensors
                       for path in (server / "federation/run", embedded))
    same = [name for name in deployed if name.startswith("tensors/")]
    assert same and all(torch.equal(deployed[name], there[name]) for name in same)
    assert records.clients == RunRecords.read(embedded).clients

    export(embedded, tmp_path / "all")
    (tmp_path / "bert/new-cases.csv").write_bytes((tmp_path / "anna/own.csv").read_bytes())
    for image in (tmp_path / "anna").glob("*.png"):
        shutil.copy(image, tmp_path / "bert")
    told = type_in("bert", tmp_path / "bert", predict.replace("clinic-7", "bert"))
    table = mixture.load(tmp_path / "all", "bert").columns_of_file(str(tmp_path / "bert/new-cases.csv"))
    assert mixture.csv_of(table).replace(f"{tmp_path}/bert/", "") in told and len(table["label"]) == 24, told


def rehearsed(folder):
    """The same federation in this process, of the same four files; returns its run folder."""
    (folder / "clients.toml").write_text("[clients]\n" + "".join(f'{name} = "{name}/{FORMS[name]}"\n' for name in NAMES))
    run(run_file(folder, "stage1.rounds=3", f"data.name={folder}/clients.toml"), folder / "embedded")
    return folder / "embedded"


def check_markers(folder):
    """A client's key, its data and its private expert are on no other machine, nor in what went over the network."""
    traffic = (folder / "traffic").read_bytes()
    assert len(traffic) > 50_000 and CONTROL in traffic
    for name in NAMES:
        markers = markers_of(folder / name / "fedms-client", folder / name)
        own = b"".join(p.read_bytes() for p in (folder / name).rglob("*") if p.is_file())
        assert all(marker in own for marker in markers[1:]) and len(set(markers)) == 5
        others = [p for host in ("server", *NAMES) if host != name for p in (folder / host).rglob("*") if p.is_file()]
        for path in (folder / "traffic", *others):
            content = path.read_bytes()
            assert not any(marker in content for marker in markers), (name, path)
