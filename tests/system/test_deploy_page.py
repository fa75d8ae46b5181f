"""docs/guide/deploy.md for several machines, word for word: each machine is a network of its own (ip netns), with a folder that
has nothing but what the page says to carry there. Minutes, and root: `make test-full` alone."""
from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.records import RunRecords

PAGE = Path(__file__).parents[2] / "docs/guide/deploy.md"
SERVER, *CLIENTS = (f"fedms-{os.getpid()}-{name}" for name in ("server", "client-0", "client-1"))
pytestmark = pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="minutes: make test-full")


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """A server at 10.77.0.1 and two clients, which reach it and each other by nothing else."""
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("networks of their own need root and iproute2")
    try:
        ip("netns", "add", SERVER)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    try:
        ip("-n", SERVER, "link", "set", "lo", "up")
        ip("-n", SERVER, "link", "add", "bridge", "type", "bridge")
        ip("-n", SERVER, "address", "add", "10.77.0.1/24", "dev", "bridge")
        ip("-n", SERVER, "link", "set", "bridge", "up")
        for number, name in enumerate(CLIENTS):
            ip("netns", "add", name)
            ip("-n", SERVER, "link", "add", f"to-{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", SERVER, "link", "set", f"to-{number}", "master", "bridge", "up")
            ip("-n", name, "address", "add", f"10.77.0.{number + 2}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")
        yield
    finally:
        for name in (SERVER, *CLIENTS):
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in map(int, listed.stdout.split()):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(machine, folder, block, log):
    """Types a block of the page into a machine's shell, in this folder."""
    environment = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
                   "OMP_NUM_THREADS": "1", "FEDMS_CACHE": str(folder / "cache"), "FLWR_TELEMETRY_ENABLED": "0",
                   "FLWR_DISABLE_UPDATE_CHECK": "1"}
    command = ["ip", "netns", "exec", machine, "bash", "-e", "-c", block.replace("fl.example.org", "10.77.0.1")]
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                                stderr=subprocess.STDOUT)


def type_in(machine, folder, block):
    log = folder / "terminal.log"
    assert start(machine, folder, block, log).wait(timeout=600) == 0, log.read_text()


def until(words, log, process):
    deadline = time.monotonic() + 180
    while words not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


def test_the_page_for_several_machines(tmp_path, machines):
    section = PAGE.read_text().split("## Deployed on several machines")[1].split("\n## ")[0]
    init, superlink, register, supernode, run = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
    server = tmp_path / "server"
    server.mkdir()
    type_in(SERVER, server, init)
    until("Uvicorn running", tmp_path / "superlink.log", start(SERVER, server, superlink, tmp_path / "superlink.log"))
    type_in(SERVER, server, register)
    for number, machine in enumerate(CLIENTS):
        folder = tmp_path / machine
        folder.mkdir()
        shutil.copy(server / "deployment/certificates/ca.crt", folder)
        shutil.copy(server / f"deployment/certificates/client-{number}", folder / "key")
        shutil.copytree(server / f"deployment/data/client-{number}", folder / "data")
        log = tmp_path / f"{machine}.log"
        until("SuperNode ID", log, start(machine, folder, supernode.replace("client=0", f"client={number}"), log))
    type_in(SERVER, server, run)
    assert all((tmp_path / machine / "state").is_dir() for machine in CLIENTS)
    deployed = server / "deployment/runs/run"
    assert all(visit["status"] == "ok" for visit in RunRecords.read(deployed).visits)

    type_in(SERVER, server, "fedms run deployment/run.toml --engine local --out local")
    found, embedded = (CheckpointFolder(path / "checkpoint").load()[0].tensors for path in (deployed, server / "local"))
    assert found.keys() == embedded.keys() and all(torch.equal(found[name], embedded[name]) for name in found)
    type_in(SERVER, server, "fedms export deployment/runs/run --out model")
    shutil.copytree(deployed, tmp_path / CLIENTS[1] / "run")
    type_in(CLIENTS[1], tmp_path / CLIENTS[1], "fedms export run --out model --states state")
    assert [path.name for path in (tmp_path / CLIENTS[1] / "model/clients").iterdir()] == ["1.safetensors"]
    assert not (server / "model/clients").exists()
