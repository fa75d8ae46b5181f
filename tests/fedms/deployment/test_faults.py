"""A client that dies, a disk that is full, a server with nobody left: what the table of docs/reference/faults.md says of them."""
from __future__ import annotations

import base64
import datetime
import errno
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import types
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

from federation import NAMES, InThisProcess, federation, free_port, run_file, write_data
from flwr.server.superlink.linkstate import in_memory_linkstate
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedms.deployment import DeploymentError, join, node, server
from fedms.deployment.state import ClientState
from fedms.engines.flower import certificates, connection
from fedms.engines.flower.connection import Connection, Lost
from fedms.engines.flower.link import SuperLink
from fedms.errors import DataError
from fedms.progress import Progress
from fedms.storage.records import RunRecords

ROOT = Path(__file__).parents[3]


# The table

def test_every_row_of_the_table_names_tests_that_exist():
    """Each of its faults has tests, and each of their names is a test's."""
    page = (ROOT / "docs/reference/faults.md").read_text()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not (row[0].startswith("**") or set(row[0]) <= {"-", " "} or row[0] == "what")]
    there = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert len(rows) >= 25
    for row in rows:
        assert len(row) == 3, row
        named = re.findall(r"`(test_\w+)`", row[2])
        assert named and set(named) <= there, (row[0], set(named) - there)


# A client that dies

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A federation of anna and bert that has not begun."""
    folder = tmp_path_factory.mktemp("two")
    federation(folder, NAMES[:2], "stage1.rounds=2", "stage2.rounds=1", "clients.round_timeout=5",
               "clients.join_timeout=60", port=free_port())
    return folder


class Died(BaseException):
    """A process that is gone."""


class PowerCut(Connection):
    """A connection that ends with its process: the server is not told."""

    def __exit__(self, kind, *rest):
        if kind is not Died:
            return super().__exit__(kind, *rest)
        self._ended.set()
        self._client.close()

    def _beat(self):
        beat = connection.SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=connection.HEARTBEAT)
        while not self._ended.wait(0.2):
            with suppress(Lost):
                self._call(self._client.SendNodeHeartbeat, beat)


class Mortal(node.Node):
    """Dies at the first message of a kind and stage, before or after it has done the work."""

    kind, stage, after = "", "", False

    def answer(self, message):
        about = "" if message.metadata.message_type == "query" else message.metadata.group_id.split()[0]
        if (message.metadata.message_type, about) != (self.kind, self.stage):
            return super().answer(message)
        if self.after:
            super().answer(message)
        raise Died


def serve_twice(state, stop, *how):
    """A client that dies, and is started again by its service."""
    first = Mortal(state, lambda line: None)
    first.kind, first.stage, first.after = how
    try:
        first.run(stop)
    except Died:
        node.Node(ClientState(state.folder), lambda line: None).run(stop)


@pytest.mark.parametrize("kind, stage, after, failed", [
    ("query", "", False, None), ("train", "stage1", True, ("stage1", 1)), ("train", "stage2", False, ("stage2", 1)),
    ("evaluate", "evaluation", False, None)])
def test_a_client_that_dies_costs_that_visit_and_takes_part_again(two, tmp_path, monkeypatch, kind, stage, after, failed):
    """In each phase. The connection is not closed in order, so its server finds out by itself, after three seconds."""
    for module, name, value in ((node, "Worker", InThisProcess), (node, "AGAIN", 0.3), (node, "Connection", PowerCut),
                                (in_memory_linkstate, "HEARTBEAT_PATIENCE", 0.3)):
        monkeypatch.setattr(module, name, value)
    folder = Path(shutil.copytree(two, tmp_path / "two"))
    anna, bert = (ClientState(folder / "clients" / name) for name in NAMES[:2])
    stop = threading.Event()
    threads = [threading.Thread(target=node.Node(anna, lambda line: None).run, args=(stop.is_set,), daemon=True),
               threading.Thread(target=serve_twice, args=(bert, stop.is_set, kind, stage, after), daemon=True)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    try:
        server.start(folder / "server", "127.0.0.1", Progress(), lambda: time.monotonic() > deadline)
    finally:
        stop.set()
    for thread in threads:
        thread.join(30)
    records = RunRecords.read(folder / "server/run")
    lost = [(v["stage"], v["round"], v["client"], v["reason"][:9]) for v in records.visits if v["status"] != "ok"]
    assert lost == ([] if failed is None else [(*failed, 1, "no answer")])
    assert [c["group"] for c in records.clients] == (["anna"] if kind == "evaluate" else ["anna", "bert"])


def test_a_client_that_is_killed_leaves_no_process_behind(tmp_path):
    script = """
import os, time
from fedms.deployment import node
if __name__ == "__main__":
    worker = node.Worker()
    try:
        worker.do("nothing", {}, {}, None)
    except node.Refusal:
        pass
    print(*worker._pool._processes, flush=True)
    time.sleep(120)
"""
    (tmp_path / "client.py").write_text(script)
    client = subprocess.Popen([sys.executable, str(tmp_path / "client.py")], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(client.stdout.readline()))
    assert worker.is_running() and worker.ppid() == client.pid
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    assert psutil.wait_procs([worker], timeout=30)[1] == []


# A client whose server is away

def test_a_client_waits_for_a_server_that_is_away(two, tmp_path, monkeypatch):
    monkeypatch.setattr(node, "AGAIN", 0.1)
    folder, lines, stop = Path(shutil.copytree(two, tmp_path / "two")), [], threading.Event()
    port = server.read_invitation(folder / "server/invite.toml").address.rpartition(":")[2]
    there = node.Node(ClientState(folder / "clients/anna"), lines.append)
    thread = threading.Thread(target=there.run, args=(stop.is_set,), daemon=True)
    thread.start()
    until(lambda: any("the server cannot be reached" in line for line in lines))
    link = SuperLink()
    with server.Door(folder / "server", link), link.serve("127.0.0.1", int(port), folder / "server/certificates"):
        until(lambda: [each.name for each in link.get_nodes()] == ["client-0"])
        stop.set()
        thread.join(30)
    assert sum("the server cannot be reached" in line for line in lines) == 1      # it is said once


def until(found):
    deadline = time.monotonic() + 30
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Disks and certificates

def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_joining_leaves_nothing(two, tmp_path, monkeypatch):
    file = write_data(tmp_path / "data", "cleo")
    joining = join.prepare(server.read_invitation(two / "server/invite.toml"), str(file), "cleo", Progress())
    monkeypatch.setattr("fedms.data.shard.write_durably", full)
    with pytest.raises(DataError, match="No space left on device"):
        join.write(joining, tmp_path / "cleo")
    assert not (tmp_path / "cleo").exists()


def test_a_server_whose_certificate_has_expired_does_not_start(two, tmp_path, monkeypatch):
    class Past(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) - datetime.timedelta(days=certificates.DAYS + 2)

    folder = Path(shutil.copytree(two / "server", tmp_path / "server"))
    shutil.rmtree(folder / "certificates")
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "datetime", types.SimpleNamespace(datetime=Past, timezone=datetime.timezone,
                                                                      timedelta=datetime.timedelta))
        certificates.make(folder / "certificates", ["127.0.0.1"])
    with pytest.raises(DeploymentError, match="has expired on .*; renew it by fedms server renew"):
        server.start(folder, "127.0.0.1", Progress(), lambda: True)
    assert server.renew(folder) == ["server.pem"] and server.check_certificates(folder) == []


# A reply of 900 MB

@pytest.mark.parametrize("known", [False, True], ids=["a stranger", "an accepted client"])
def test_900_megabytes_are_refused_by_their_announced_length(two, known):
    """The answer comes although not a byte of the body was sent."""
    state = ClientState(two / "clients/anna")
    key = base64.b64encode(public_key_to_bytes(state.key().public_key())).decode() if known else ""
    link = SuperLink()
    with server.Door(two / "server", link), link.serve("127.0.0.1", 0, two / "server/certificates") as port:
        context = ssl.create_default_context(cadata=(two / "server/certificates/ca.crt").read_text())
        with socket.create_connection(("127.0.0.1", port), 30) as plain, context.wrap_socket(
                plain, server_hostname="127.0.0.1") as wire:
            wire.sendall(f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\n"
                         f"{FLEET_HTTP_PUBLIC_KEY_HEADER}: {key}\r\nContent-Length: 900000000\r\n\r\n".encode())
            assert wire.recv(64).startswith(b"HTTP/1.1 413")
