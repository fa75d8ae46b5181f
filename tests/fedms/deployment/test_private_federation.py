"""Runs with privacy between machines: federations on loopback against the embedded run, and what a client refuses."""
from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import pytest
import torch

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

from cryptography.hazmat.primitives.asymmetric import ec
from federation import NAMES, InThisProcess, free_port, joined, nodes, run_file, write_data

from fedms.config import ConfigError
from fedms.deployment import DeploymentError, node, roster, server
from fedms.deployment.invitation import read_invitation
from fedms.deployment.own_model import trained_at
from fedms.deployment.policy import Journal, Policy, PrivacyLimits, Refusal, check, default_policy
from fedms.federated.client import ClientFailure
from fedms.methods import fedms as method
from fedms.privacy.key_file import create_key, derive, read_key
from fedms.privacy.ledger import read_ledger
from fedms.privacy.secure_sum import identity_of
from fedms.progress import Progress
from fedms.runs.run import run
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.final import read_final
from fedms.storage.records import RunRecords, comparable

KEY = b"a key these tests have all alone"
PRIVATE = ("sal.schedule=fixed", "aggregate.weights=uniform", "clients.join_timeout=60")
MODES = {"central": ("privacy.mode=central", "privacy.noise=0.5"), "secure": ("privacy.mode=secure",),
         "distributed": ("privacy.mode=distributed", "privacy.noise=0.5")}


class AtTimesGone(InThisProcess):
    """Does the work but for what `refuses` says."""

    refuses = staticmethod(lambda kind, head, client: False)

    def do(self, kind, head, parts, identity):
        if self.refuses(kind, head, identity.client):
            raise node.Refusal("gone for a while")
        return super().do(kind, head, parts, identity)


def accepted(folder, names):
    """Clients that have joined, with keys that follow from KEY as in an embedded run, and have agreed to the list of all."""
    states = [joined(folder, name) for name in names]
    for number, state in enumerate(states):
        if (state.folder / "privacy.key").exists():
            (state.folder / "privacy.key").unlink()
            create_key(state.folder / "privacy.key", derive(KEY, "client", number))
        server.accept(folder / "server", state.line())
    for state in states:
        if state.invitation.config.privacy.masks:
            state.accept(read_invitation(folder / "server/invite.toml"))
    return states


def federated(folder, names, *sets, refuses=AtTimesGone.refuses):
    """A federation of these clients, from `init` to the end of its run; what was told to whom."""
    told = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "Worker", AtTimesGone)
        patch.setattr(AtTimesGone, "refuses", staticmethod(refuses))
        patch.setattr(node, "AGAIN", 0.3)
        create_key(folder / "key", KEY)
        server.init(folder / "server", run_file(folder, *PRIVATE, *sets, f"privacy.key={folder / 'key'}", count=len(names)), "127.0.0.1",
                    free_port(), Progress())
        with nodes(accepted(folder, names), told):
            server.start(folder / "server", "127.0.0.1", Progress(), lambda: False)
    return told


def embedded(folder, names, *sets):
    places = {name: write_data(folder / "data" / name, name) for name in names}
    (folder / "clients.toml").write_text("[clients]\n" + "".join(f'{name} = "{path}"\n' for name, path in places.items()))
    run(run_file(folder, *PRIVATE, *sets, f"privacy.key={folder / 'key'}", f"data.name={folder}/clients.toml", count=len(names)),
        folder / "embedded")


def outcome(path):
    snapshot, _ = CheckpointFolder(path / "checkpoint").load()
    return comparable(RunRecords.read(path)), {n: t for n, t in snapshot.tensors.items() if n.startswith("tensors/")}


@pytest.fixture(scope="module", params=["central", "distributed"])
def noised(request, tmp_path_factory):
    folder, sets = tmp_path_factory.mktemp(request.param), MODES[request.param]
    told = federated(folder, NAMES[:3], *sets)
    embedded(folder, NAMES[:3], *sets)
    return folder, request.param, told


def test_three_clients_give_the_bits_and_the_ledger_of_the_embedded_run(noised):
    folder, _, told = noised
    there, here = outcome(folder / "server/run"), outcome(folder / "embedded")
    assert here[1] and all(torch.equal(there[1][name], here[1][name]) for name in here[1])
    assert there[0]["rounds"] == here[0]["rounds"] and there[0]["clients"] == []
    releases = read_ledger(folder / "embedded/privacy.jsonl")
    assert read_ledger(folder / "server/run/privacy.jsonl") == releases and len(releases) == 3
    assert all(visit["status"] == "ok" for visit in there[0]["visits"]), told


def test_where_secrets_lie(noised):
    """Each on its own machine, for its owner alone; a client counts noised sums itself."""
    folder, mode, _ = noised
    secrets = {"central": ["server/privacy.key"],
               "distributed": [f"clients/{name}/privacy.key" for name in NAMES[:3]]}[mode]
    found = {str(path.relative_to(folder)) for path in folder.rglob("privacy.key")}
    assert found == set(secrets)
    for secret in secrets:
        assert stat.S_IMODE((folder / secret).stat().st_mode) == 0o600
    for path in (folder / "server").rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in secrets:
            assert not any(read_key(folder / secret) in path.read_bytes() for secret in secrets), path
    assert "privacy.key" not in (folder / "server/invite.toml").read_text()
    for name in NAMES[:3]:
        own = read_ledger(folder / "clients" / name / "private/privacy.jsonl")
        assert own == (read_ledger(folder / "server/run/privacy.jsonl") if mode == "distributed" else [])


PHASES = {("stage1", 1): "share", ("stage1", 2): "mask", ("stage1", 3): "reveal"}


def test_a_client_that_drops_out_in_each_phase(tmp_path, monkeypatch):
    """dora drops out of each phase of a round once, and of a whole round; what is left are the bits of a run to which she adds
    nothing in the rounds in which her vector did not arrive."""
    sets, now = (*MODES["secure"], "stage1.rounds=3"), {}

    def refuses(kind, head, client):
        if kind == "train":
            now[client] = (head["message"]["stage"], head["message"]["round"])
        return client == 3 and (PHASES.get(now[3]) == head.get("phase", "") or (kind == "train" and now[3] == ("stage2", 1)))

    federated(tmp_path, NAMES, *sets, refuses=refuses)
    step = method.FedMS.client_step

    def absent(self, model, client, private, message):
        if client.id == 3 and (message.stage, message.round) in (("stage1", 1), ("stage1", 2), ("stage2", 1)):
            raise ClientFailure("dropped out")
        return step(self, model, client, private, message)

    monkeypatch.setattr(method.FedMS, "client_step", absent)
    embedded(tmp_path, NAMES, *sets)
    there, here = outcome(tmp_path / "server/run"), outcome(tmp_path / "embedded")
    assert here[1] and all(torch.equal(there[1][name], here[1][name]) for name in here[1])
    status = [visit["status"] for visit in there[0]["visits"] if visit["client"] == 3]
    assert status == ["failed", "failed", "ok", "failed"]
    assert [record["clients"] for record in there[0]["rounds"]] == [3, 3, 4, 3]
    shared = read_final(tmp_path / "server/run")
    for name in NAMES:      # each can predict without the server from now on
        ended = trained_at(tmp_path / "clients" / name)
        assert all(torch.equal(ended.final.tensors[key], tensor) for key, tensor in shared.tensors.items()) and ended.private


# The list of clients

@pytest.fixture
def listed(tmp_path):
    """A federation of three for secure sums, all accepted."""
    folder = tmp_path / "listed"
    folder.mkdir()
    server.init(folder / "server", run_file(folder, *PRIVATE, *MODES["secure"], count=3), "127.0.0.1", 9091, Progress())
    return folder, accepted(folder, NAMES[:3])


def test_the_list_is_agreed_on_by_all_and_has_one_fingerprint(listed):
    folder, states = listed
    invitation = read_invitation(folder / "server/invite.toml")
    assert [client.name for client in invitation.clients] == list(NAMES[:3])
    assert {line for state in states for line in state.lines() if line.startswith("sums")} == {
        f"sums      with anna, bert, cleo; fingerprint {roster.fingerprint(invitation.clients)}"}
    for number, state in enumerate(states):
        assert invitation.clients[number].identity == identity_of(read_key(state.folder / "privacy.key")).hex()


def test_a_server_does_not_begin_before_all_are_accepted(tmp_path):
    server.init(tmp_path / "server", run_file(tmp_path, *PRIVATE, *MODES["secure"], count=3), "127.0.0.1", 9091, Progress())
    state = joined(tmp_path, "anna")
    server.accept(tmp_path / "server", state.line())
    with pytest.raises(DeploymentError, match="1 of 3 clients are accepted; with privacy.mode = 'secure' all must be"):
        server.start(tmp_path / "server", "127.0.0.1", Progress(), lambda: True)
    assert any("waiting   for the list of all clients" in line for line in state.lines())
    config = state.invitation.config
    with pytest.raises(Refusal, match="has not agreed to a list of clients"):
        state.change(number=0)
        served = node.Node(state, print)
        served._obey("train", {"config": server.tables_of(config), "message": {"stage": "stage1", "round": 1}}, {})
    line = state.line()
    for bad, words in ((line.rpartition(" ")[0], "KEY NAME IDENTITY.PROOF"), (line.replace(" anna ", " anton "), "not signed by its key"),
                       (line[:-4] + "0000", "not signed by its key"), (line + "xyz", "is not what it should be")):
        with pytest.raises(DeploymentError, match=words):
            server.accept(tmp_path / "server", bad)
    assert len(server.members(tmp_path / "server")) == 1


def test_a_list_that_was_changed_is_refused(listed):
    """A server cannot give a client another identity, leave one out, or move one."""
    folder, states = listed
    whole = read_invitation(folder / "server/invite.toml")
    key = ec.generate_private_key(ec.SECP384R1())
    own = identity_of(bytes(32))
    forged = whole.clients[1].model_copy(update={"identity": own.hex(), "proof": roster.sign(key, "bert", own)})
    swapped = (whole.clients[1], whole.clients[0], whole.clients[2])
    for clients, words in (((whole.clients[0], forged, whole.clients[2]), "bert: its identity for secure sums is not signed"),
                           (whole.clients[:2], "names 2, but clients.count is 3"),
                           ((*whole.clients[:2], whole.clients[1]), "same name twice")):
        path = folder / "changed.toml"
        replace(whole, clients=clients).write(path)
        with pytest.raises(DeploymentError, match=words):
            read_invitation(path)
    states[0].change(number=0)
    with pytest.raises(DeploymentError, match="does not have anna with this client's keys as number 0"):
        states[0].accept(replace(whole, clients=swapped))
    stranger = replace(whole, clients=(*whole.clients[:2], roster.read({
        "name": "cleo", "key": whole.clients[2].key, "identity": whole.clients[2].identity, "proof": whole.clients[2].proof})))
    states[2].accept(stranger)
    (states[2].folder / "privacy.key").unlink()
    create_key(states[2].folder / "privacy.key")
    with pytest.raises(DeploymentError, match="does not have cleo with this client's keys; ask"):
        states[2].accept(whole)


# The run file and the policy

@pytest.mark.parametrize("mode", MODES)
def test_a_federation_with_privacy_needs_a_number_of_clients(tmp_path, mode):
    with pytest.raises(ConfigError, match="clients.count: unset; with privacy.mode"):
        config = run_file(tmp_path, *PRIVATE, *MODES[mode])
        server.federated(config.model_copy(update={"clients": config.clients.model_copy(update={"count": None})}))


def test_a_policy_may_demand_privacy(tmp_path):
    machine, journal = {"battery": None, "load": 0.0, "disk": 2**40}, Journal(tmp_path / "journal.json")
    plain, secure = run_file(tmp_path), run_file(tmp_path, *PRIVATE, *MODES["secure"])
    import datetime

    def asked(policy: Policy, config):
        check(policy, config, journal, tmp_path, datetime.datetime(2026, 3, 4), machine)

    assert default_policy(plain).privacy.required is None and default_policy(secure).privacy.required == ["secure"]
    asked(default_policy(secure), secure)
    strict = default_policy(plain).model_copy(update={"privacy": PrivacyLimits(required=["secure", "distributed"])})
    asked(strict, secure)
    with pytest.raises(Refusal, match="privacy.required allows secure, distributed, the run has privacy.mode = off"):
        asked(strict, plain)


@pytest.mark.parametrize("kind, words", [("evaluate", "no client is evaluated by itself"), ("query.sum", "joined|sum")])
def test_a_client_is_not_evaluated_by_itself_and_sums_nothing_that_it_has_not_joined(listed, kind, words):
    from fedms.engines.flower import client as side
    from fedms.runs.nodes import open_experiment

    folder, states = listed
    identity = side.Identity(1, None, states[1].folder / "private", states[1].folder, states[1].invitation.config, states[1].about.model)
    head = {"run": "0" * 32, "attempt": 0, "phase": "reveal", "clients": (0, 1, 2), "kept": None, "on_common_test": False,
            "config": server.tables_of(states[1].invitation.config)}
    with pytest.raises(Exception, match=words):
        side.obey(kind, head, {}, identity, open_experiment)
    assert not os.path.exists(states[1].folder / "private/privacy.jsonl")
    assert json.loads((states[1].folder / "identities.json").read_text())["identities"].keys() == {"0", "1", "2"}
