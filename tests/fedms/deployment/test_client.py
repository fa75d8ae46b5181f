"""A client's side: joining with data of one's own, the owner's limits, and what the node obeys."""
from __future__ import annotations

import datetime
import os
import stat
import subprocess
import sys

import doubling
import pytest

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

import tomli_w
from federation import joined, run_file, write_data
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedms.deployment.node import Worker
from fedms.errors import DataError
from fedms.deployment import DeploymentError, join, server, service
from fedms.deployment.invitation import Invitation, read_invitation
from fedms.deployment.node import Node, Worker
from fedms.deployment.policy import Journal, Policy, Refusal, check, default_policy, machine_state, read_policy, write_policy
from fedms.deployment.state import ClientState
from fedms.engines.flower import transport
from fedms.engines.flower.transport import tables_of
from fedms.federated.schema import FORMAT
from fedms.foreign import parse_toml
from fedms.progress import Progress

NOW = datetime.datetime(2026, 3, 4, 23, 30)


@pytest.fixture(scope="module")
def invited(tmp_path_factory):
    """A folder with a server's in it."""
    folder = tmp_path_factory.mktemp("federation")
    server.init(folder / "server", run_file(folder), "127.0.0.1", 9091, Progress())
    return folder


@pytest.fixture(scope="module")
def client(invited):
    return joined(invited, "anna")


def test_joining_leaves_a_private_folder_and_says_what_it_means(invited, client, tmp_path):
    assert stat.S_IMODE(client.folder.stat().st_mode) == 0o700
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in client.folder.iterdir()} == dict.fromkeys(
        ("client.json", "data.safetensors", "invitation.toml", "key", "policy.toml"), 0o600)
    kind, key, name = client.line().split()
    assert (kind, name) == ("ecdsa-sha2-nistp384", "anna") and "PRIVATE" not in client.line()
    assert "number not yet known" in client.lines()[0]
    with pytest.raises(DeploymentError, match="exists and is not empty"):
        joined(invited, "anna")


def test_nothing_of_a_client_is_on_the_server(invited, client):
    secret = (client.folder / "key").read_bytes()
    for path in (invited / "server").rglob("*"):
        assert not path.is_file() or secret[200:260] not in path.read_bytes()
    assert not any("client" in path.name for path in (invited / "server/certificates").iterdir())


@pytest.mark.parametrize("spoil, words", [
    (lambda f: f.write_text(f.read_text().replace("light", "gray")), "label 'gray' is no class; classes are: dark, light"),
    (lambda f: f.write_text(f.read_text().replace("image,label", "image,class")), "label"),
    (lambda f: f.write_text("image,label\n000.png,dark\n001.png,light\n"), "no validation sample"),
    (lambda f: f.unlink(), "no such file"),
], ids=["unknown class", "missing column", "empty split", "no file"])
def test_data_that_do_not_fit_are_an_error_at_joining(invited, tmp_path, spoil, words):
    file = write_data(tmp_path / "data", "anna")
    spoil(file)
    with pytest.raises(DataError, match=words):
        join.prepare(read_invitation(invited / "server/invite.toml"), str(file), "anna", Progress())


@pytest.mark.parametrize("change, words", [
    ({"fedms": "7.3.0"}, "fedms 7.3.0 with messages of format 4, this machine runs fedms"),
    ({"messages": 99}, "messages of format 99"), ({"run_sha256": "0" * 64}, "was changed on the way"),
    ({"model_sha256": "0" * 64}, "weights here"), ({"preprocessing_sha256": "0" * 64}, "tokenizer or image transform"),
    ({"address": "no address"}, "address"), ({"more": 1}, "more"), ({"format": 2}, "format 2")])
def test_an_invitation_that_is_wrong_is_refused(invited, tmp_path, change, words):
    path = tmp_path / "invite.toml"
    path.write_text(tomli_w.dumps({**parse_toml((invited / "server/invite.toml").read_bytes()), **change}))
    with pytest.raises(DeploymentError, match=words):
        join.prepare(read_invitation(path), str(write_data(tmp_path / "data", "anna")), "anna", Progress())


@pytest.mark.parametrize("change, words", [
    (lambda tables: tables["run"].update(warp=9), "it has run.warp, which this one does not know"),
    (lambda tables: tables.update(later={"on": True}), "it has later.on, which"),
    (lambda tables: tables["run"].pop("seed"), "it lacks run.seed")])
def test_another_commit_of_the_same_release_is_refused_with_both_versions(invited, node, tmp_path, change, words):
    """Its run file has other keys."""
    tables = parse_toml((invited / "server/invite.toml").read_bytes())
    change(tables["run_file"])
    path = tmp_path / "invite.toml"
    path.write_text(tomli_w.dumps(tables))
    here = transport.release()
    with pytest.raises(DeploymentError, match=f"runs fedms {here}, this machine runs fedms {here} of another commit.*{words}"):
        read_invitation(path)
    said(node, greeting(0))
    asks = {**task(node.invitation.config), "config": tables["run_file"]}
    problem = said(node, asked("train", asks))["problem"]
    assert words in problem and f"this machine runs fedms {here}" in problem and not (node.state.folder / "offered.json").exists()


def test_names_are_plain(invited, tmp_path):
    for name in ("", "a b", "../x", "x" * 65, "-x", "é"):
        with pytest.raises(DeploymentError, match="--name"):
            join.prepare(read_invitation(invited / "server/invite.toml"), str(tmp_path), name, Progress())


# The owner's limits

def limits(**values):
    return default_policy(run_file_config()).model_copy(update=values)


def run_file_config(*sets):
    from fedms.config import load_config

    return load_config("digits", sets)


@pytest.mark.parametrize("values, words", [
    ({}, None), ({"models": ["other"]}, "models allows other, not vit-digits"), ({"methods": []}, "methods allows none"),
    ({"frozen": ["int8"]}, "frozen allows int8"), ({"most_epochs": 1}, None), ({"rounds_a_day": 3}, "rounds_a_day is 3, and 3"),
    ({"rounds_a_day": 4}, None), ({"bytes_a_day": "1kB"}, "bytes_a_day is 1kB, and 1000"), ({"bytes_a_day": "1001"}, None),
    ({"hours": "22:00-06:00"}, None), ({"hours": "06:00-23:30"}, "hours are 06:00-23:30, it is 23:30"),
    ({"hours": "00:00-24:00"}, None), ({"battery": 50.0}, "battery is 50 % at least, it is at 40 %"), ({"battery": 40.0}, None),
    ({"load": 0.5}, "load is 0.5 a core"), ({"load": 0.6}, None), ({"disk": "2MiB"}, "disk asks for 2MiB free, there are 1 MiB")])
def test_a_policy_allows_or_says_what_it_does_not(tmp_path, values, words):
    machine = {"battery": 40.0, "load": 0.55, "disk": 2**20}
    journal = Journal(tmp_path / "journal.json", "2026-03-04", 3, 1000)
    policy = limits(**{"disk": None, **values})
    if words is None:
        check(policy, run_file_config(), journal, tmp_path, NOW, machine)
    else:
        with pytest.raises(Refusal, match=words):
            check(policy, run_file_config(), journal, tmp_path, NOW, machine)


def test_a_machine_that_does_not_tell_of_a_battery_has_none(tmp_path, monkeypatch):
    """A container without /sys."""
    def missing():
        raise FileNotFoundError("/sys/class/power_supply")

    monkeypatch.setattr("fedms.deployment.policy.psutil.sensors_battery", missing)
    assert machine_state(tmp_path)["battery"] is None
    check(limits(battery=50.0), run_file_config(), Journal(tmp_path / "journal.json"), tmp_path, NOW)


def test_a_policy_counts_by_day_and_never_allows_code(tmp_path):
    journal = Journal(tmp_path / "journal.json")
    journal.add(3, 10, NOW)
    assert (Journal.read(journal.path).rounds, Journal.read(journal.path).bytes) == (3, 10)
    assert Journal.read(journal.path).today(NOW + datetime.timedelta(hours=1)).rounds == 0
    config = run_file_config().model_copy(update={"model": run_file_config().model.model_copy(update={"trust_remote_code": True})})
    with pytest.raises(Refusal, match="code of its own"):
        check(limits(), config, journal, tmp_path, NOW, {"battery": None, "load": 0, "disk": 2**40})


@pytest.mark.parametrize("text", ["", "models = 3", "nonsense = 1\nmodels=[]\nmethods=[]\nfrozen=[]", "\x00",
                                  'models=[]\nmethods=[]\nfrozen=[]\nhours="25:00-26:00"', 'models=[]\nmethods=[]\nfrozen=[]\ndisk="x"'])
def test_a_policy_that_cannot_be_read_allows_nothing(tmp_path, text):
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(DeploymentError, match="nothing is done until then"):
        read_policy(tmp_path / "policy.toml")


# What the node obeys

def asked(kind, head):
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    message = Message(transport.write(head, {}), 1, kind)
    message.metadata.__dict__["_message_id"] = "m"
    return message


def task(config, **values):
    return {"format": FORMAT, "run": "0" * 32, "nonce": "0" * 16, "model": "0" * 64, "config": tables_of(config), "kept": None,
            "message": {"stage": "stage1", "round": 1, "depth": 1, "applied_depth": 1}, **values}


def greeting(number, release=None):
    return asked("query", {"format": FORMAT, "release": release or transport.release(), "client": number})


class Never(Worker):
    def do(self, *_):
        raise AssertionError("it must not come to this")


@pytest.fixture
def node(client):
    client.change(number=None, left=False)
    (client.folder / "offered.json").unlink(missing_ok=True)
    write_policy(client.folder / "policy.toml", default_policy(client.invitation.config))
    lines = []
    made = Node(ClientState(client.folder), lines.append)
    made.worker, made.lines = Never(), lines
    return made


def said(node, message):
    return transport.read(node.answer(message).content)[0]


def test_a_client_learns_its_number_once(node):
    assert said(node, greeting(3)) == {"client": 3, "release": transport.release(), "n_train": 14, "n_validation": 4}
    assert ClientState(node.state.folder).about.number == 3
    assert "calls this client number 2, before it was 3" in said(node, greeting(2))["problem"]


def test_another_release_is_refused_with_both_versions(node):
    problem = said(node, greeting(0, "9.9.1"))["problem"]
    assert "fedms '9.9.1'" in problem and f"fedms {transport.release()}" in problem
    assert ClientState(node.state.folder).about.number is None


def test_a_changed_run_file_is_refused_until_it_is_accepted(node):
    said(node, greeting(0))
    config = node.invitation.config
    changed = config.model_copy(update={"stage1": config.stage1.model_copy(update={"epochs": 5})})
    problem = said(node, asked("train", task(changed)))["problem"]
    assert "not the one that this client's owner agreed to" in problem and "stage1.epochs: 1 -> 5" in problem
    assert any("fedms client accept" in line for line in node.lines)
    state = ClientState(node.state.folder)
    assert any("waiting" in line for line in state.lines())
    offer = state.offer_as_invitation()
    assert offer.config == changed
    state.accept(offer)
    assert "most_epochs is 1, the run makes 5" in said(node, asked("train", task(changed)))["problem"]
    state.accept(Invitation(**{**vars(offer), "config": config}))


@pytest.mark.parametrize("sets", [{"data": {"max_tokens": 8}}, {"lora": {"rank": 2}}, {"model": {"id": "minilm"}}])
def test_what_the_data_were_read_for_cannot_be_accepted_later(client, sets):
    config = client.invitation.config
    (table, values), = sets.items()
    changed = config.model_copy(update={table: getattr(config, table).model_copy(update=values)})
    with pytest.raises(DeploymentError, match="join with the new invitation"):
        client.accept(Invitation(**{**vars(client.invitation), "config": changed}))


def test_the_policy_is_asked_before_work_begins(node):
    said(node, greeting(0))
    write_policy(node.state.folder / "policy.toml", limits(models=[]))
    assert "models allows none" in said(node, asked("train", task(node.invitation.config)))["problem"]
    (node.state.folder / "policy.toml").write_text("broken")
    assert "nothing is done until then" in said(node, asked("evaluate", task(node.invitation.config, on_common_test=False)))["problem"]


def test_a_client_computes_where_its_owner_says(node):
    class Told(Worker):
        def do(self, kind, head, parts, identity):
            raise Refusal(f"asked to compute on {identity.device}")

    said(node, greeting(0))
    node.worker = Told()
    assert "asked to compute on auto" in said(node, asked("train", task(node.invitation.config)))["problem"]
    node.device = "cuda:1"
    assert "asked to compute on cuda:1" in said(node, asked("train", task(node.invitation.config)))["problem"]
    assert service.unit_text(node.state, "cuda:1").count(f'start "{node.state.folder.absolute()}" --device cuda:1\n') == 1


@pytest.mark.parametrize("kind, head, words", [
    ("train", {}, "messages of format None"), ("query", {}, "messages of format None"), ("query.private", {}, "a message of type"),
    ("train", {"format": FORMAT}, "is missing"), ("train.private", {"format": FORMAT}, "a message of type 'train.private'")])
def test_other_messages_are_refused(node, kind, head, words):
    said(node, greeting(0))
    assert words in said(node, asked(kind, head))["problem"]


def test_a_client_without_a_number_does_nothing(node):
    assert "which number" in said(node, asked("train", task(node.invitation.config)))["problem"]


def test_who_has_left_is_not_served(client):
    client.change(left=True)
    with pytest.raises(DeploymentError, match="has left"):
        Node(ClientState(client.folder), print).run(lambda: True)
    client.change(left=False)


def dying(*_):
    os._exit(3)


def test_a_process_that_dies_costs_a_visit(monkeypatch):
    worker = Worker()
    monkeypatch.setattr("fedms.deployment.node._work", dying)
    for _ in range(2):      # the second visit gets a new process
        with pytest.raises(Refusal, match="died: killed, or out of memory"):
            worker.do("train", {}, {}, None)
    worker.end()


def test_forgetting_removes_all_of_it(invited, tmp_path):
    joining = join.prepare(read_invitation(invited / "server/invite.toml"), str(write_data(tmp_path / "data", "cleo")), "cleo",
                           Progress())
    state = join.write(joining, tmp_path / "cleo")
    ClientState(state.folder).forget()
    assert not state.folder.exists() and (tmp_path / "data/own").is_dir()


def test_a_node_needs_neither_torch_nor_what_only_runs_need(node):
    """A client starts, greets and refuses with all of this blocked: it is not in `fedms[client]`, or too large to be idle."""
    script = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "matplotlib", "pandas", "datasets", "sklearn", "ray", "flwr_datasets", "transformers", "scipy"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import fedms.deployment.node as node
from fedms.deployment.state import ClientState
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from fedms.engines.flower import transport
TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
message = Message(transport.write({"format": 4, "release": transport.release(), "client": 0}, {}), 1, "query")
message.metadata.__dict__["_message_id"] = "m"
print(transport.read(node.Node(ClientState(sys.argv[1]), print).answer(message).content)[0])
"""
    done = subprocess.run([sys.executable, "-c", script, str(node.state.folder)], capture_output=True, text=True, timeout=120)
    assert "'n_train': 14" in done.stdout, done.stdout + done.stderr


def test_joining_and_training_need_no_more_than_the_extra_client(invited, tmp_path):
    """Reads a Parquet file, trains a visit (for the costs) and makes a folder, without what `fedms[client]` leaves out."""
    script = """
import sys
for name in ("matplotlib", "pandas", "datasets", "sklearn", "scipy", "ray", "flwr_datasets", "jinja2", "peft", "dp_accounting"):
    sys.modules[name] = None        # as if it were not installed
from pathlib import Path
from fedms.deployment import join
from fedms.progress import Progress
joining = join.prepare(join.read_invitation(Path(sys.argv[1])), sys.argv[2], "bert", Progress())
print(join.write(joining, Path(sys.argv[3])).line())
"""
    done = subprocess.run([sys.executable, "-c", script, str(invited / "server/invite.toml"), str(write_data(tmp_path, "bert")),
                           str(tmp_path / "state")], capture_output=True, text=True, timeout=240)
    assert done.stdout.endswith(" bert\n"), done.stdout + done.stderr


def test_ctrl_c_reaches_no_visit(monkeypatch):
    monkeypatch.setattr("fedms.deployment.node._work", doubling.spared)
    worker = Worker()
    try:
        assert worker.do("train", {}, {}, None) == (True, {})
    finally:
        worker.end()
