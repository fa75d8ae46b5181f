"""A server's side: whom it lets in, what its port takes, and a federation of two on loopback against the embedded run."""
from __future__ import annotations

import datetime
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import httpx
import pytest
import torch

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from federation import NAMES, InThisProcess, free_port, joined, markers_of, nodes, run_file, write_data
from flwr.app import Message

from fedms.config import ConfigError
from fedms.deployment import DeploymentError, node, page, server
from fedms.deployment.own_model import trained_at
from fedms.engines.flower import certificates, connection, transport
from fedms.engines.flower.connection import Connection, Lost, Rejected
from fedms.engines.flower.link import LinkError, SuperLink
from fedms.exports import export, mixture
from fedms.progress import Progress
from fedms.runs.run import run
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.records import RunRecords, comparable


def key_and_line(curve=ec.SECP384R1):
    key = ec.generate_private_key(curve())
    return key, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    server.init(folder / "server", run_file(folder, count=3), "127.0.0.1", 9091, Progress())
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A server's folder without clients."""
    return Path(shutil.copytree(made / "server", tmp_path / "server"))


# The folder

def test_a_server_s_folder(made):
    invitation = (made / "server/invite.toml").read_text()
    assert "PRIVATE" not in invitation and (made / "server").stat().st_mode & 0o077 == 0
    with pytest.raises(DeploymentError, match="exists and is not empty"):
        server.init(made / "server", run_file(made), "127.0.0.1", 9091, Progress())


@pytest.mark.parametrize("sets, words", [
    (["data.classes=none"], "data.classes: an invitation names the classes"), (["clients.unseen=1"], "clients.unseen"),
    (["data.client=who"], "data.client"), (["lora.start=/x"], "lora.start"), (["model.trust_remote_code=true"], "trust_remote_code"),
    (['clients.budgets=[{share=1.0, max_depth=2}]'], "clients.budgets")])
def test_a_run_file_that_is_no_federation_s_is_refused(made, sets, words):
    with pytest.raises(ConfigError, match=words):
        server.federated(run_file(made, *sets))


def test_a_model_in_a_folder_is_found_wherever_the_server_is_started(made, tmp_path, monkeypatch):
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert server.federated(run_file(made, "model.id=my-model")).model.id == str(tmp_path / "my-model")
    assert server.federated(run_file(made, "model.id=org/model")).model.id == "org/model"


def test_no_folder_of_a_server(tmp_path):
    with pytest.raises(DeploymentError, match="no server's folder; `fedms server init"):
        server.accept(tmp_path, "x")


# Whom it accepts

def test_clients_are_numbered_in_the_order_of_acceptance(folder):
    lines = [f"{key_and_line()[1]} {name}" for name in ("b", "a")]
    assert [server.accept(folder, line).number for line in (*lines, lines[0])] == [0, 1, 0]
    assert server.remove(folder, "b").removed and [m.name for m in server.members(folder) if not m.removed] == ["a"]
    assert server.accept(folder, f"{key_and_line()[1]} b").number == 2
    with pytest.raises(DeploymentError, match="this key is client b's, who was removed"):
        server.accept(folder, lines[0])
    with pytest.raises(DeploymentError, match="all 3 seats are taken"):
        server.accept(folder, f"{key_and_line()[1]} c")
    with pytest.raises(DeploymentError, match="no client of this name; there are a, b"):
        server.remove(folder, "z")


@pytest.mark.parametrize("line, words", [
    ("", "expected the line"), ("ecdsa-sha2-nistp384 AAAA a b", "expected the line"), ("ecdsa-sha2-nistp384 AAAA a", "no public key"),
    ("ecdsa-sha2-nistp384 AAAA ../a", "expected the line"), ("SECOND a", "another client has this name"),
    ("P256 x", "P-384"), ("SAME y", "this key is client a's")])
def test_lines_that_are_none_are_refused(folder, line, words):
    first = key_and_line()[1]
    server.accept(folder, f"{first} a")
    line = line.replace("SECOND", key_and_line()[1]).replace("P256", key_and_line(ec.SECP256R1)[1]).replace("SAME", first)
    with pytest.raises(DeploymentError, match=words):
        server.accept(folder, line)
    assert len(server.members(folder)) == 1


# The port

@pytest.fixture
def link(made):
    link = SuperLink()
    key, line = key_and_line()
    link.register(line, "client-0")
    with link.serve("127.0.0.1", 0, made / "server/certificates") as port:
        yield link, f"127.0.0.1:{port}", (made / "server/certificates/ca.crt").read_bytes(), key


def echo(message):
    return Message(transport.write(*transport.read(message.content)[:1], {}), reply_to=message)


def send_and_wait(link, node, content):
    (number,) = link.push_messages([Message(content, node.node_id, "train")])
    deadline = time.monotonic() + 30
    while not (came := link.pull_messages([number])):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return came[0]


def test_messages_go_and_replies_come(link):
    link, address, authority, key = link
    with Connection(address, authority, key) as there:
        stop = threading.Event()
        thread = threading.Thread(target=connection.serve, args=(there, echo, stop.is_set, 0.02))
        thread.start()
        (found,) = link.get_nodes()
        assert found.name == "client-0"
        for head in ({"a": 1}, {"b": "x" * 1000}):
            assert transport.read(send_and_wait(link, found, transport.write(head, {})).content)[0] == head
        stop.set()
        thread.join(10)
    assert link.get_nodes() == []


def test_only_accepted_keys_and_one_node_each(link):
    link, address, authority, key = link
    with pytest.raises(Rejected, match="does not take this client's key"):
        Connection(address, authority, key_and_line()[0]).__enter__()
    with Connection(address, authority, key):
        with pytest.raises(Rejected, match="another node with the same key"):
            Connection(address, authority, key).__enter__()
        link.unregister("client-0")
        assert link.get_nodes() == []
    with pytest.raises(Rejected):
        Connection(address, authority, key).__enter__()


def test_a_server_that_was_started_again_is_not_said_to_refuse_the_key(made):
    """The connection is refused, not the key: a new connection with the same key is accepted."""
    (key, line), certificate = key_and_line(), made / "server/certificates"
    first, second = SuperLink(), SuperLink()
    first.register(line, "client-0")
    second.register(line, "client-0")
    with first.serve("127.0.0.1", 0, certificate) as port:
        there = Connection(f"127.0.0.1:{port}", (certificate / "ca.crt").read_bytes(), key).__enter__()
        assert there.receive() is None
    with second.serve("127.0.0.1", port, certificate):
        with pytest.raises(Rejected, match="no longer knows this connection: it was started again"):
            there.receive()
        there.__exit__()
        with Connection(there.address, (certificate / "ca.crt").read_bytes(), key) as again:
            assert again.receive() is None


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_ends_is_not_said_to_refuse_the_key(link, status):
    """What a server answers while it shuts down says nothing about the client, so trying again may help."""
    _, address, authority, key = link
    answer = httpx.Response(status, request=httpx.Request("POST", f"https://{address}"))
    with Connection(address, authority, key) as there:
        there._client.PullMessages = lambda request: answer.raise_for_status()
        with pytest.raises(Lost, match=f"cannot answer now .status {status}.: it is ending") as lost:
            there.receive()
    assert not isinstance(lost.value, Rejected)


def test_a_server_of_another_authority_or_with_an_expired_certificate_is_not_trusted(link, tmp_path, monkeypatch):
    _, address, _, key = link
    certificates.make(tmp_path / "other", ["127.0.0.1"])
    with pytest.raises(Lost, match="certificate is not trusted"):
        Connection(address, (tmp_path / "other/ca.crt").read_bytes(), key).__enter__()

    class Past(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) - datetime.timedelta(days=certificates.DAYS + 2)

    with monkeypatch.context() as patch:
        patch.setattr(certificates, "datetime", types.SimpleNamespace(datetime=Past, timezone=datetime.timezone,
                                                                      timedelta=datetime.timedelta))
        certificates.make(tmp_path / "old", ["127.0.0.1"])
    with SuperLink().serve("127.0.0.1", 0, tmp_path / "old") as port:
        with pytest.raises(Lost, match="certificate is not trusted .certificate verify failed: certificate has expired"):
            Connection(f"127.0.0.1:{port}", (tmp_path / "old/ca.crt").read_bytes(), key).__enter__()


def test_a_client_whose_clock_is_wrong_is_told_so(link, monkeypatch):
    _, address, authority, key = link
    import flwr.supernode.node_auth_http_interceptor as interceptor

    hour = datetime.timedelta(hours=1)
    monkeypatch.setattr(interceptor, "now", lambda: datetime.datetime.now(datetime.timezone.utc) + hour)
    monkeypatch.setattr(connection.time, "time", lambda: datetime.datetime.now().timestamp() + 3600)
    with pytest.raises(Rejected, match="clock is 3[56][0-9][0-9] s ahead of the server's"):
        Connection(address, authority, key).__enter__()


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/pull-messages", "/docs", "/openapi.json"])
def test_the_port_takes_no_runs_and_no_code(link, path):
    _, address, _, _ = link
    answer = httpx.post(f"https://{address}{path}", content=b"", verify=False, headers={"content-type": "application/protobuf"})
    assert answer.status_code in (404, 405)


def test_a_reply_larger_than_its_message_allows_is_refused_unread(link):
    link, address, authority, key = link
    with Connection(address, authority, key) as there:
        big = lambda m: Message(transport.write({}, transport.buffers({"tensors": bytes(8_000_000)})), reply_to=m)  # noqa: E731
        (found,) = link.get_nodes()
        link.push_messages([Message(transport.write({}, {}), found.node_id, "train")])
        while (message := there.receive()) is None:
            time.sleep(0.02)
        with pytest.raises(Lost, match="takes no more bytes"):
            there.send(big(message))
    unknown = httpx.post(f"https://{address}/v1/fleet/push-object", content=bytes(100_000), verify=False)
    endless = httpx.post(f"https://{address}/v1/fleet/push-object", content=iter([b"x"]), verify=False)
    assert (unknown.status_code, endless.status_code) == (413, 411)


def test_a_port_that_is_taken_is_said(made):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(LinkError, match="nodes cannot be served here"):
        with SuperLink().serve("127.0.0.1", taken.getsockname()[1], made / "server/certificates"):
            pass


# Certificates

def test_certificates_are_renewed_with_the_same_keys(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in (folder / "certificates").glob("*.key")}
    monkeypatch.setattr(certificates, "SOON", datetime.timedelta(days=400))
    assert "fedms server renew" in server.check_certificates(folder)[0]
    assert server.renew(folder) == ["server.pem"]
    monkeypatch.setattr(certificates, "SOON", datetime.timedelta(days=5000))
    assert server.renew(folder) == ["ca.crt", "server.pem"]
    assert server.read_invitation(folder / "invite.toml").authority == (folder / "certificates/ca.crt").read_text()
    assert before == {path.name: path.read_bytes() for path in (folder / "certificates").glob("*.key")}


# Two clients and their server, in this process

def outcome(path):
    snapshot, _ = CheckpointFolder(path / "checkpoint").load()
    return comparable(RunRecords.read(path)), snapshot.tensors


LONGER = ["stage2.rounds=2"]


class Notes(Progress):
    def __init__(self):
        self.notes, self.on_round = [], lambda stage, round: None

    def note(self, text):
        self.notes.append(text)

    def round(self, stage, round, **_):
        self.on_round(stage, round)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A federation of anna and bert, whom cleo joins after the first round and dora in stage 2, that has run to its end."""
    folder, told = tmp_path_factory.mktemp("ended"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "Worker", InThisProcess)
        patch.setattr(node, "AGAIN", 0.3)
        server.init(folder / "server", run_file(folder, *LONGER, "clients.join_timeout=60"), "127.0.0.1", free_port(), Progress())
        states = [joined(folder, name) for name in NAMES]
        for state in states[:2]:
            server.accept(folder / "server", state.line())
        progress = Notes()
        with nodes(states, told):
            def later(stage, round):
                if (joiner := {("stage1", 1): 2, ("stage2", 1): 3}.get((stage, round))) is not None:
                    server.accept(folder / "server", states[joiner].line())
            progress.on_round = later
            server.start(folder / "server", "127.0.0.1", progress, lambda: False)
    return folder, told, progress


def test_a_late_joiner_takes_part_from_its_next_round_on(ended):
    folder, told, _ = ended
    visits = RunRecords.read(folder / "server/run").visits
    took_part = {(v["stage"], v["round"]): [] for v in visits}
    for v in visits:
        assert v["status"] == "ok", v
        took_part[v["stage"], v["round"]].append(v["client"])
    assert took_part == {("stage1", 1): [0, 1], ("stage1", 2): [0, 1, 2], ("stage2", 1): [0, 1, 2], ("stage2", 2): [0, 1, 2, 3]}
    assert [c["group"] for c in RunRecords.read(folder / "server/run").clients] == list(NAMES)
    assert any("connected" in line for line in told["cleo"])


@pytest.fixture(scope="module")
def embedded(ended, tmp_path_factory):
    """The same files, in one process; cleo is absent in the first round, and dora before the last."""
    from fedms.federated.client import ClientFailure
    from fedms.methods import fedms as method

    (folder, _, _), path = ended, tmp_path_factory.mktemp("embedded")
    step = method.FedMS.client_step

    def absent(self, model, client, private, message):
        if (message.stage, message.round, client.id) in [("stage1", 1, 2), ("stage1", 1, 3), ("stage1", 2, 3), ("stage2", 1, 3)]:
            raise ClientFailure("not there yet")
        return step(self, model, client, private, message)

    places = {name: write_data(folder / "data" / name, name) for name in NAMES}
    (path / "clients.toml").write_text("[clients]\n" + "".join(f'{name} = "{place}"\n' for name, place in places.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method.FedMS, "client_step", absent)
        run(run_file(folder, *LONGER, f"data.name={path}/clients.toml"), path / "run")
    return path / "run"


def test_the_same_bits_as_embedded(ended, embedded):
    deployed, here = outcome(ended[0] / "server/run"), outcome(embedded)
    same = [name for name in deployed[1] if name.startswith("tensors/")]
    assert same and all(torch.equal(deployed[1][name], here[1][name]) for name in same)
    assert deployed[0]["clients"] == here[0]["clients"]


@pytest.mark.parametrize("name", NAMES)
def test_a_client_predicts_without_the_server(ended, embedded, tmp_path, name):
    """From its own folder alone, as the embedded run's export does for it."""
    folder, _, _ = ended
    export(trained_at(shutil.copytree(folder / "clients" / name, tmp_path / "alone")), tmp_path / "own")
    export(embedded, tmp_path / "all")
    assert [p.name for p in (tmp_path / "own/clients").iterdir()] == [f"{NAMES.index(name)}.safetensors"]
    new = str(write_data(tmp_path / "new", name))
    own, there = (mixture.load(tmp_path / each, name).predict_file(new) for each in ("own", "all"))
    assert len(own) == 24 and own.gate_weight.between(0, 1).all() and own.equals(there)


def test_a_client_whose_run_has_not_ended_cannot_export(made):
    with pytest.raises(DeploymentError, match="no run has ended here: the final model comes with"):
        trained_at(joined(made, "dora").folder)


@pytest.mark.parametrize("name", NAMES)
def test_no_other_folder_holds_what_is_only_a_client_s(ended, name):
    """Its key, its files, its samples as the model reads them and its private expert are in no folder but its own."""
    folder, _, _ = ended
    markers = markers_of(folder / "clients" / name, folder / "data" / name)
    own = b"".join(p.read_bytes() for part in ("clients", "data") for p in (folder / part / name).rglob("*") if p.is_file())
    assert all(marker in own for marker in markers[1:]) and len(set(markers)) == 5
    others = [p for part in ("server", *(f"clients/{other}" for other in NAMES if other != name))
              for p in (folder / part).rglob("*") if p.is_file()]
    assert len(others) > 20
    for path in others:
        content = path.read_bytes()
        assert not any(marker in content for marker in markers), path


def test_the_status_and_the_page_show_it(ended):
    folder, _, _ = ended
    told = page.state(folder / "server")
    lines = "\n".join(page.lines(told))
    assert "4 of 4 rounds" in lines and "server    the run has ended" in lines and re.search(r"2  cleo +away; stage2, round 2: ok", lines)
    with page.serve(folder / "server") as address:
        with urllib.request.urlopen(address) as answer:
            assert b"<title>FedMS server" in answer.read() and "default-src 'none'" in answer.headers["Content-Security-Policy"]
        data = json.load(urllib.request.urlopen(address.replace("/?", "/state.json?")))
        assert [client["name"] for client in data["clients"]] == list(NAMES) and len(data["rounds"]) == 4
        for bad in (address[:-1], address.split("?")[0], address.replace("/?", "/state.json?")[:-2]):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(bad)
        stranger = urllib.request.Request(address, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(stranger)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_the_page_in_a_browser(ended):
    """Its script fills it, from its own server alone: other names cannot be resolved."""
    with page.serve(ended[0] / "server") as address:
        done = subprocess.run(["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
                               "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--dump-dom", address],
                              capture_output=True, text=True, timeout=200)
    text = re.sub(r"<script>.*</script>", "", done.stdout, flags=re.S)
    for words in ("has ended its run", "4 of 4 rounds", "stage2, round 2: ok", "rounds 1 to 4", *NAMES):
        assert words in text, text
    assert "CONSOLE" not in done.stderr, done.stderr


def test_a_finished_run_is_not_run_again_and_one_server_at_a_time(ended):
    folder, _, _ = ended
    from fedms.storage.durable import FolderLock

    lock = FolderLock(folder / "server")
    try:
        with pytest.raises(DeploymentError, match="is served already"):
            server.start(folder / "server", "127.0.0.1", Progress(), lambda: True)
    finally:
        lock.release()
