"""The distributed engine against the embedded one, and against nodes that fail, dawdle and lie."""
from __future__ import annotations

import errno
import json
import math
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

from fake_grid import FakeGrid
from flwr.app import Error, Message
from safetensors.torch import load_file
from shards import write_shards

from fedms.config import ConfigError, load_config
from fedms.data import read_shard
from fedms.engines.base import Interrupted
from fedms.engines.flower import transport
from fedms.engines.flower import client as side
from fedms.exports import mixture
from fedms.exports import export
from fedms.federated import encoding
from fedms.federated.client import ClientFailure, Private
from fedms.federated.server import AllClientsFailed
from fedms.progress import Progress
from fedms.runs import run
from fedms.runs.experiment import LoadedTask
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.durable import shard_about
from fedms.storage.private_state import ClientFolder, FolderError, State
from fedms.errors import RunFolderError
from fedms.storage.records import RunRecords, comparable

SMALL = ["run.method=fedms", "data.max_samples=240", "clients.count=4", "clients.unseen=1", "stage1.rounds=2", "stage2.rounds=2",
         "data.partition=iid", "run.threads=1", "clients.round_timeout=0.3"]


def config(*sets, engine="flower"):
    return load_config("digits", [*SMALL, *sets, f"run.engine={engine}"])


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The data of each client alone, and of the server, by folder."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(config(), folder, Progress())
    return folder, {i: shard_about(folder / f"client-{i}")["clients"][0]["n_train"] for i in range(4)}


def deployed(tmp_path, shards, *sets, faults=None, change=lambda grid: None, name="flower", **options):
    """A run over a fake grid whose nodes have their own data alone."""
    folder, n_train = shards
    grid = FakeGrid(tmp_path / "states", 4, n_train, lambda i: folder / f"client-{i}", faults)
    change(grid)
    progress = Notes()
    server = read_shard(folder / "server")
    run.run(config(*sets), tmp_path / name, grid=grid, shard=server, progress=progress, **options)
    return outcome(tmp_path / name), progress.notes


def embedded(tmp_path, *sets, absent=(), monkeypatch=None):
    """The embedded run, without some (stage, round, client)."""
    if absent:
        kind = type(run.LoadedTask(config(), Progress()).experiment(config(*sets)).method)
        step = kind.client_step

        def gone(self, model, client, private, message):
            if (message.stage, message.round, client.id) in absent:
                raise ClientFailure("absent")
            return step(self, model, client, private, message)

        monkeypatch.setattr(kind, "client_step", gone)
    run.run(config(*sets, engine="local"), tmp_path / "embedded", overwrite=True)
    if monkeypatch:
        monkeypatch.undo()
    return outcome(tmp_path / "embedded")


def outcome(path):
    snapshot, _ = CheckpointFolder(path / "checkpoint").load()
    return comparable(RunRecords.read(path)), snapshot.tensors


def same(a, b):
    assert a[1].keys() == b[1].keys() and all(torch.equal(a[1][name], b[1][name]) for name in a[1])
    for part in ("rounds", "visits", "clients", "summary"):
        assert json.dumps(a[0][part]) == json.dumps(b[0][part]), part


def same_result(a, b):
    """The same model and accuracies, by whatever way."""
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1] if name.startswith("tensors/"))
    assert a[0]["clients"] == b[0]["clients"]


@pytest.mark.parametrize("sets", [
    [], ["run.method=local"], ["run.method=fedavg_prior", "wire.dtype=int8", "clients.fraction=0.5"],
    ["run.method=fedms_plus", "clients.optimizer=kept", "lora.dropout=0.1"],
], ids=["fedms", "local", "prior-int8", "plus-kept"])
def test_nodes_with_their_own_data_give_the_same_bits_and_records(tmp_path, sets, shards):
    found, notes = deployed(tmp_path, shards, *sets)
    same(found, embedded(tmp_path, *sets))
    assert notes == ["1 of 5 clients lack at least one of the 10 classes"] or not any("refused" in n for n in notes)


# Faults: the result is that of a run without these clients in these rounds

def edited(change):
    """A fault that changes the tensors of a reply."""
    def fault(message, answer):
        head, parts = transport.read(answer(message).content)
        tensors = encoding.unpack(parts["tensors"])
        parts["tensors"] = encoding.pack(change(tensors) or tensors)
        return Message(transport.write(head, transport.buffers(parts)), reply_to=message)
    return fault


def headed(change):
    def fault(message, answer):
        head, parts = transport.read(answer(message).content)
        change(head)
        return Message(transport.write(head, transport.buffers(parts)), reply_to=message)
    return fault


def packed(change):
    """A fault in the first entry of the tensors' manifest."""
    def fault(message, answer):
        head, parts = transport.read(answer(message).content)
        length = int.from_bytes(parts["tensors"][:8], "little")
        manifest = json.loads(parts["tensors"][8:8 + length])
        change(manifest[0])
        new = json.dumps(manifest).encode()
        parts["tensors"] = len(new).to_bytes(8, "little") + new + parts["tensors"][8 + length:]
        return Message(transport.write(head, transport.buffers(parts)), reply_to=message)
    return fault


def first(tensors):
    return next(iter(tensors))


def poisoned(tensors):
    tensors[first(tensors)].view(-1)[0] = math.nan


def renamed(tensors):
    return {("expert/unknown" if name == first(tensors) else name): t for name, t in tensors.items()}


def reshaped(tensors):
    return {name: t[None] if name == first(tensors) else t for name, t in tensors.items()}


def doubled(tensors):
    return {name: t.double() for name, t in tensors.items()}


def enormous(tensors):
    return {name: t + 1e6 for name, t in tensors.items()}


def crashed(message, answer):
    return Message(Error(code=8, reason="the process ended"), reply_to=message)


def too_large(message, answer):
    head, _ = transport.read(answer(message).content)
    return Message(transport.write(head, transport.buffers({"tensors": bytes(10**7)})), reply_to=message)


def truncated(message, answer):
    head, parts = transport.read(answer(message).content)
    return Message(transport.write(head, transport.buffers({"tensors": parts["tensors"][:-3]})), reply_to=message)


FAULTS = {
    "nan": (edited(poisoned), "holds NaN or infinity"), "key": (edited(renamed), "expert/unknown: was not sent to it"),
    "shape": (edited(reshaped), "expected ("), "dtype": (edited(doubled), "torch.float64, expected torch.float32"),
    "norm": (edited(enormous), "by clients.max_change"),
    "silent": (lambda message, answer: None, "no answer within 0.3 s"),
    "crash": (crashed, "the process ended (Flower's error 8)"), "large": (too_large, "accepted here: up to"),
    "cut": (truncated, "the payload should be"),
    "samples": (headed(lambda h: h["reply"].update(n_train=10**6)), "n_train 1000000, but the client has"),
    "metric": (headed(lambda h: h["reply"]["metrics"].update(loss="low")), "loss is 'low', expected a number"),
    "unknown metric": (headed(lambda h: h["reply"]["metrics"].update(price=1.0)), "reply.metrics.price: unknown"),
    "other client": (headed(lambda h: h.update(client=0)), "it is client 0's"),
    "no visit": (headed(lambda h: h.pop("visit")), "visit is missing, expected a table"),
    "endless number": (headed(lambda h: h["reply"]["metrics"].update(loss=10**4000)), "the head is no JSON: a number of 4001 digits"),
    "strange dtype": (packed(lambda entry: entry.__setitem__(2, [])), "dtype and encoding are no strings"),
    "score": (headed(lambda h: h["reply"].update(score=7)), "reply.score is 7, expected a number from 0 to 1"),
    "no metric": (headed(lambda h: h["reply"].update(metrics={})), "metrics.trained_params is missing"),
    "null metric": (headed(lambda h: h["reply"]["metrics"].update(trained_params=None)), "metrics.trained_params is None"),
    "validation samples": (headed(lambda h: h["reply"].update(n_validation=2**31 - 1)), "n_validation 2147483647, but the"),
    "infinite": (headed(lambda h: h["visit"].update(seconds=10**400)), "the head is no JSON: a number of 401 digits"),
    "surrogate": (edited(lambda t: {**t, "\ud800": t[first(t)]}), r"the manifest names '\ud800', expected a printable name"),
    "dimensions": (packed(lambda entry: entry.__setitem__(1, [1] * 65)), "the shape is a list of 65"),
    "empty and huge": (packed(lambda entry: entry.__setitem__(1, [0, 2**47, 2**47])), "an impossible shape"),
    "unknown field": (headed(lambda h: h.update(more=1)), "more: unknown; expected client, run, nonce"),
    "another hash": (headed(lambda h: h.update(kept="../x")), "kept is '../x', expected a SHA-256"),
}


@pytest.fixture(scope="module")
def without_one(tmp_path_factory):
    """The embedded run without client 2 in round 2 of stage 1."""
    with pytest.MonkeyPatch.context() as patch:
        return embedded(tmp_path_factory.mktemp("absent"), absent={("stage1", 2, 2)}, monkeypatch=patch)


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_answer_never_enters_the_average(tmp_path, shards, name, without_one):
    fault, words = FAULTS[name]
    found, _ = deployed(tmp_path, shards, faults={("train", "stage1 2", 2): fault})
    failed = [v for v in found[0]["visits"] if v["status"] != "ok"]
    assert [(v["stage"], v["round"], v["client"]) for v in failed] == [("stage1", 2, 2)]
    assert words in failed[0]["reason"] and failed[0]["bytes_up"] == 0
    same_result(found, without_one)


def test_old_and_second_answers_are_dropped(tmp_path, shards, without_one):
    old = []

    def remember(message, answer):
        old.append(answer(message))
        return old[-1]

    def replay(message, answer):
        return Message(old[0].content, reply_to=message)

    def twice(message, answer):
        reply = answer(message)
        return [reply, reply]

    found, notes = deployed(tmp_path, shards, faults={
        ("train", "stage1 1", 2): remember, ("train", "stage1 2", 2): replay, ("train", None, 1): twice})
    (failed,) = [v for v in found[0]["visits"] if v["status"] != "ok"]
    assert "it answers another message, an old one" in failed["reason"]
    assert sum("a second one" in note for note in notes) == 4
    same_result(found, without_one)


def test_late_answers_are_dropped_and_told(tmp_path, shards, without_one):
    held = {}

    def late(message, answer):
        held[message.metadata.message_id] = answer(message)

    def change(grid):
        pull = grid.pull_messages

        def pulling(ids):           # the answer to round 2 is there in stage 2
            if grid.asked[-1][1].startswith("stage2") and held:
                grid.replies |= {number: [reply] for number, reply in held.items()}
                held.clear()
            return pull(ids)
        grid.pull_messages = pulling

    found, notes = deployed(tmp_path, shards, faults={("train", "stage1 2", 2): late}, change=change)
    assert any("client 2 (stage1, round 2) has answered after the deadline; its reply is dropped" in n for n in notes)
    same_result(found, without_one)


def test_text_of_a_client_is_escaped_and_cut(tmp_path, shards):
    """Its reason, and the name of its group: no surrogate, no control character, no end of a line."""
    nasty = "\ud800\x1b[31m\u202e\n" + "x" * 5000
    found, notes = deployed(tmp_path, shards, "stage1.rounds=1", "stage2.rounds=0", faults={
        ("train", "stage1 1", 1): headed(lambda h: (h["visit"].update(reason=nasty), h.pop("reply"))),
        ("train", "stage1 1", 2): lambda message, answer: Message(
            transport.write({"client": 2, "problem": nasty}, {}), reply_to=message),
        ("evaluate", "evaluation", 3): headed(lambda h: h["record"].update(group=nasty))})
    reasons = [v["reason"] for v in found[0]["visits"] if v["status"] == "failed"]
    group = found[0]["clients"][3]["group"]
    assert len(reasons) == 2 and all(r.isprintable() and len(r) <= 1000 and r"\ud800\x1b[31m\u202e\n" in r for r in reasons)
    assert group.isprintable() and len(group) == 200 and all(note.isprintable() for note in notes)


@pytest.mark.parametrize("change, words", [
    (lambda r: r["accuracy"].pop("personalized"), "accuracy.personalized is missing"),
    (lambda r: r["accuracy"].pop("half"), "accuracy.half is missing"), (lambda r: r.pop("gate_std"), "gate_std is missing"),
    (lambda r: r.update(gate_entropy=None), "gate_entropy is missing"), (lambda r: r.pop("macro_f1"), "macro_f1 is missing"),
    (lambda r: r.update(n_test=2**40), "record.n_test is 1099511627776, expected"),
    (lambda r: r.update(n_train=1), "n_train is 1, expected"), (lambda r: r.update(accuracy=[]), "accuracy is a list of 0"),
    (lambda r: r.update(language={"nats": 1, "tokens": 9, "perplexity": 2.7, "exact_match": 0, "bits_per_byte": None}),
     "it has figures of a language model")])
def test_a_record_that_a_summary_cannot_be_made_of_is_refused(tmp_path, shards, change, words):
    found, notes = deployed(tmp_path, shards, "stage1.rounds=1", "stage2.rounds=1", faults={
        ("evaluate", "evaluation", 2): headed(lambda h: change(h["record"]))})
    assert [c["id"] for c in found[0]["clients"]] == [0, 1, 3, 4] and any(words in note for note in notes), notes


def told(**values):
    return headed(lambda h: h.update(values))


@pytest.mark.parametrize("fault, words", [
    (told(n_validation=2**31 - 1), "data.split leaves it"), (told(n_train=-1), "n_train is -1"),
    (told(n_train=1.5), "n_train is 1.5"), (told(client=10**30), "client is 1"), (told(name="x"), "name: unknown"),
    (told(n_train=None), "samples it has of one kind alone"), (told(release="9.9.1"), "it runs fedms 9.9.1, this server fedms")])
def test_a_node_that_tells_nonsense_of_itself_is_refused(tmp_path, shards, fault, words):
    found, notes = deployed(tmp_path, shards, "stage1.rounds=1", "stage2.rounds=0", faults={("query", "hello", 2): fault})
    assert any(note.startswith("node 102 is refused") and words in note for note in notes), notes
    assert {v["client"] for v in found[0]["visits"] if v["status"] == "failed"} == {2}


def test_a_key_without_a_client_s_name_is_refused_whoever_comes_first(tmp_path, shards):
    for name in ("hospital-b", ""):
        def change(grid):
            grid.nodes = {50: 0, **grid.nodes}
            grid.names = {50: name, **{100 + i: f"client-{i}" for i in range(4)}}
        found, notes = deployed(tmp_path, shards, "stage1.rounds=1", "stage2.rounds=0", change=change, name=f"run{name}",
                                overwrite=True)
        assert any(note.startswith("node 50 is refused: it says it is client 0, but its key is registered as") for note in notes)
        assert not [v for v in found[0]["visits"] if v["status"] != "ok"]


def test_a_client_that_is_away_is_waited_for_once(tmp_path, shards):
    grids = []

    def change(grid):
        grid.down.add(2)
        push = grid.push_messages

        def pushing(messages):      # its node comes in the last round
            if any(m.metadata.group_id == "stage1 4" for m in messages):
                grid.down.clear()
            return push(messages)
        grid.push_messages = pushing
        grids.append(grid)

    started = time.monotonic()
    found, notes = deployed(tmp_path, shards, "stage1.rounds=4", "stage2.rounds=1", "clients.join_timeout=3", change=change)
    assert time.monotonic() - started < 2 * 3 + 10
    assert sum("the nodes of the clients 2 are away" in note for note in notes) == 1
    assert [v["round"] for v in found[0]["visits"] if v["client"] == 2 and v["status"] == "failed"] == [1, 2, 3, 4]
    assert [v["status"] for v in found[0]["visits"] if v["client"] == 2][-1] == "ok"


def test_everyone_away_stops_the_run_until_it_is_resumed(tmp_path, shards):
    with pytest.raises(AllClientsFailed, match="stage1, round 1: no client could train"):
        deployed(tmp_path, shards, "clients.join_timeout=0.3", change=lambda grid: grid.down.update(range(4)))
    found, _ = deployed(tmp_path, shards, "clients.join_timeout=0.3", resume=True)
    same(found, embedded(tmp_path))


def test_a_full_disk_of_a_client_costs_its_visit(tmp_path, shards, monkeypatch):
    def full(message, answer):
        with monkeypatch.context() as patch:
            patch.setattr("fedms.storage.checkpoint.write_durably", lambda *_, **__: fail())
            return answer(message)

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    found, _ = deployed(tmp_path, shards, faults={("train", "stage1 2", 2): full, ("train", "stage2 1", 2): full})
    lost = [(v["client"], v["reason"]) for v in found[0]["visits"] if v["status"] != "ok"]
    assert len(lost) == 2 and all(client == 2 and "No space left on device" in reason for client, reason in lost), lost
    same_result(found, embedded(tmp_path, absent={("stage1", 2, 2), ("stage2", 1, 2)}, monkeypatch=monkeypatch))


def test_replies_that_flower_cannot_rebuild_do_not_end_the_run(tmp_path, shards, without_one):
    def change(grid):
        pull = grid.pull_messages

        def pulling(ids):
            came = pull(ids)
            if any(r.metadata.group_id == "stage1 2" and r.metadata.src_node_id == 102 for r in came):
                grid.replies |= {r.metadata.reply_to_message_id: [r] for r in came if r.metadata.src_node_id != 102}
                raise ValueError("\x1bno array")
            return came
        grid.pull_messages = pulling
    found, notes = deployed(tmp_path, shards, change=change)
    assert r"replies that Flower could not read are dropped: ValueError: \x1bno array" in notes
    same_result(found, without_one)


# What a server may have a client do

def asked(change, seen):
    """A server that changes the head of its message; what the client answers is added to `seen`."""
    def fault(message, answer):
        head, parts = transport.read(message.content)
        change(head)
        message.content = transport.write(head, transport.buffers(parts))
        reply = answer(message)
        seen.append(transport.read(reply.content)[0])
        return reply
    return fault


@pytest.mark.parametrize("change, words", [
    (lambda h: h["config"]["model"].update(trust_remote_code=True, id="org/name"), "model.trust_remote_code: the server says True"),
    (lambda h: h["config"]["model"].update(id="/srv/model"), "model.id: the server says '/srv/model', which is neither"),
    (lambda h: h["config"]["model"].update(id="../model"), "model.id: the server says '../model'"),
    (lambda h: h["config"]["lora"].update(start="/etc"), "lora.start: the server says '/etc'"),
    (lambda h: h["config"]["data"].update(path="/etc"), "data.path: the server says '/etc'"),
    (lambda h: h.update(run="../../elsewhere"), "run is '../../elsewhere', expected the id of a run"),
    (lambda h: h.update(kept="../x"), "kept is '../x'"), (lambda h: h["message"].update(depth=-1), "message.depth is -1"),
    (lambda h: h["message"].update(round=10**400), "the head is no JSON: a number of 401 digits"),
    (lambda h: h.update(format=1), "messages of format 1"), (lambda h: h.update(code="x"), "code: unknown"),
    (lambda h: h.update(config=[]), "config is a list of 0"), (lambda h: h["config"].update(more={}), "more: unknown key")])
def test_a_client_takes_no_code_path_or_nonsense_from_a_server(tmp_path, shards, change, words):
    seen = []
    deployed(tmp_path, shards, "stage1.rounds=1", "stage2.rounds=0", faults={("train", "stage1 1", 2): asked(change, seen)})
    assert words in seen[0]["problem"] and not (tmp_path / "elsewhere").exists()


def test_a_run_file_is_pinned_for_its_run(tmp_path, shards):
    seen = []
    change = asked(lambda h: h["config"]["gate"].update(training="aggregated", lr=1e-38), seen)
    deployed(tmp_path, shards, "gate.training=private", "stage2.rounds=2", faults={("train", "stage2 2", 2): change})
    assert "the server has changed the run file since this run began" in seen[0]["problem"]


def test_a_gate_that_was_not_sent_is_not_sent_back(tmp_path, shards):
    """A server that says the gate is aggregated but sends none gets none."""
    seen = []

    def fault(message, answer):
        head, parts = transport.read(message.content)
        parts.pop("tensors", None)
        message.content = transport.write(head, transport.buffers(parts))
        reply = answer(message)
        seen.append(transport.read(reply.content))
        return reply
    with pytest.raises(AllClientsFailed):
        deployed(tmp_path, shards, "stage1.rounds=1", "stage2.rounds=1",
                 faults={("train", "stage2 1", client): fault for client in range(4)})
    assert all("tensors" not in parts for _, parts in seen)


def test_a_node_s_own_run_file_names_its_model(tmp_path):
    own = load_config("digits", ["model.id=/srv/model"])
    tables = own.model_dump(mode="json", exclude_none=True)
    identity = side.Identity(0, 1, tmp_path, tmp_path, own)
    assert side._agreed(tables, identity) == own
    with pytest.raises(side.Disagreement, match="a folder must be the one that this node's own run file names"):
        side._agreed({**tables, "model": {**tables["model"], "id": "/srv/other"}}, identity)


def test_a_quorum(tmp_path, shards):
    silent = {("train", "stage1 2", client): lambda message, answer: None for client in (1, 2, 3)}
    with pytest.raises(AllClientsFailed, match="1 of 4 clients could train, fewer than clients.quorum = 0.5"):
        deployed(tmp_path, shards, "clients.quorum=0.5", faults=silent)
    found, _ = deployed(tmp_path, shards, "clients.quorum=0.5", resume=True)        # they are back
    assert not [v for v in found[0]["visits"] if v["status"] != "ok"]
    same_result(found, embedded(tmp_path, "clients.quorum=0.5"))


def test_impostors_are_refused(tmp_path, shards):
    def change(grid):
        grid.nodes |= {7: 1, 8: 3}                  # two more nodes that claim to be clients 1 and 3
        grid.names = {**{100 + i: f"client-{i}" for i in range(4)}, 7: "", 8: "client-2"}
        grid.nodes = dict(sorted(grid.nodes.items(), key=lambda pair: pair[0] == 7))
    found, notes = deployed(tmp_path, shards, change=change)
    assert any("it says it is client 1, but its key is registered as nobody" in n for n in notes)
    assert any("it says it is client 3, but its key is registered as 'client-2'" in n for n in notes)
    same_result(found, embedded(tmp_path))


def test_an_absent_client_holds_nobody_up(tmp_path, shards):
    found, notes = deployed(tmp_path, shards, change=lambda grid: grid.down.add(1))
    failed = [v for v in found[0]["visits"] if v["status"] != "ok"]
    assert {v["client"] for v in failed} == {1} and {v["reason"] for v in failed} == {"it could not be reached"}
    assert [c["id"] for c in found[0]["clients"]] == [0, 2, 3, 4]
    assert "client 1 is not evaluated: it could not be reached" in notes


def test_evaluation_asks_no_more_than_a_round_and_says_who_is_missing(tmp_path, shards):
    grids, silent = [], {("evaluate", "evaluation", 2): lambda message, answer: None}
    found, notes = deployed(tmp_path, shards, "clients.fraction=0.5", faults=silent, change=grids.append)
    # The last one asks the silent node whether it is there.
    assert grids[0].together[-3:] == [2, 2, 1] and [c["id"] for c in found[0]["clients"]] == [0, 1, 3, 4]
    assert "client 2 is not evaluated: no answer within 0.3 s" in notes
    assert any(n.startswith("1 of 4 clients could not be evaluated") for n in found[0]["summary"]["notes"])


def test_a_run_without_any_evaluation_has_not_ended(tmp_path, shards):
    silent = {("evaluate", "evaluation", i): lambda message, answer: None for i in range(4)}
    with pytest.raises(AllClientsFailed, match="no client could be evaluated; a run that goes on asks them again"):
        deployed(tmp_path, shards, faults=silent)
    found, _ = deployed(tmp_path, shards, resume=True)
    same(found, embedded(tmp_path))


# Stops

@pytest.mark.parametrize("moment", [1, 7, 15])
def test_a_server_that_stops_goes_on_to_the_same_bits(tmp_path, shards, moment):
    calls = iter(range(10**6))
    with pytest.raises(Interrupted):
        deployed(tmp_path, shards, stop=lambda: next(calls) >= moment)
    found, _ = deployed(tmp_path, shards, resume=True)
    same(found, embedded(tmp_path))


def test_a_server_that_is_killed_in_a_round_goes_on_to_the_same_bits(tmp_path, shards):
    def killed(message, answer):
        answer(message)             # the client has done its part and kept it
        raise KeyboardInterrupt

    for where in ("stage1 2", "stage2 1", "stage2 2"):
        with pytest.raises(KeyboardInterrupt):
            deployed(tmp_path, shards, faults={("train", where, 3): killed}, resume=True)
    found, _ = deployed(tmp_path, shards, resume=True)
    same(found, embedded(tmp_path))


# The client's own folder

def test_a_folder_belongs_to_one_client_and_run(tmp_path):
    with ClientFolder(tmp_path, "run", 3) as folder:
        with pytest.raises(FolderError, match="another visit of this client"):
            ClientFolder(tmp_path, "run", 3)
        digest = folder.save(State({"expert/a": torch.ones(3)}, frozenset({"x"})), "stage1", 1)
    with pytest.raises(FolderError, match="belongs to .*give this client a folder of its own"):
        ClientFolder(tmp_path, "run", 4)
    with ClientFolder(tmp_path, "run", 3) as folder:
        assert torch.equal(folder.load(digest).tensors["expert/a"], torch.ones(3))
        assert folder.load(None).tensors == {}
        with pytest.raises(FolderError, match="is not there"):
            folder.load("0" * 64)
    (tmp_path / "run").rename(tmp_path / "other")
    with pytest.raises(FolderError, match="belongs to"):
        ClientFolder(tmp_path, "other", 3)


def test_a_folder_keeps_what_the_server_may_ask_for(tmp_path):
    digests = []
    for number in range(5):
        with ClientFolder(tmp_path, "run", 0) as folder:
            folder.load(digests[-1] if digests else None)
            state = State({"a": torch.full((4,), float(number))}, frozenset())
            digests.append(folder.save(state, "stage2", number))
    with ClientFolder(tmp_path, "run", 0) as folder:
        for back in (2, 3, 4):
            assert float(folder.load(digests[back]).tensors["a"][0]) == back
        folder.load(digests[3])         # the visit after it did not count: it is done again, to the same hash
        assert folder.save(State({"a": torch.full((4,), 4.0)}, frozenset()), "stage2", 4) == digests[4]


def test_damage_in_a_folder_is_noticed(tmp_path):
    with ClientFolder(tmp_path, "run", 0) as folder:
        digest = folder.save(State({"a": torch.ones(100)}, frozenset()), "stage1", 1)
        folder.keep_constants(b"constants")
    for file in (*(tmp_path / "run/state").glob("*.safetensors"), *(tmp_path / "run").glob("*.constants")):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with ClientFolder(tmp_path, "run", 0) as folder:
        with pytest.raises(FolderError, match="is not there.*wrong checksum"):
            folder.load(digest)
        with pytest.raises(FolderError, match="wrong checksum"):
            folder.constants(next((tmp_path / "run").glob("*.constants")).stem)


def test_large_private_states_last(tmp_path):
    big = {"expert/a": torch.randn(50, 10**6)}      # 200 MB
    with ClientFolder(tmp_path, "run", 0) as folder:
        digest = folder.save(State(big, frozenset()), "stage2", 1)
    with ClientFolder(tmp_path, "run", 0) as folder:
        assert torch.equal(folder.load(digest).tensors["expert/a"], big["expert/a"])


def test_chaos(tmp_path, shards_of_twelve, monkeypatch):
    """12 clients, 12 rounds of six, and most of what can go wrong: the honest lose nothing. Among real processes:
    tests/system/test_flower_deployed.py."""
    folder, n_train = shards_of_twelve
    sets = ["clients.count=12", "clients.unseen=0", "clients.fraction=0.5", "data.max_samples=480", "stage1.rounds=7",
            "stage2.rounds=5"]
    old, held, kills = [], {}, {"stage1 4", "stage2 3"}

    def remember(message, answer):
        old.append(answer(message))
        return old[0]

    def hang(message, answer):
        held[message.metadata.message_id] = answer(message)

    def kill_server(message, answer):
        reply = answer(message)
        if message.metadata.group_id in kills:
            kills.remove(message.metadata.group_id)
            raise KeyboardInterrupt
        return reply

    faults = {("train", "stage1 3", 1): crashed, ("train", "stage1 4", 5): hang, ("train", "stage1 2", 7): edited(poisoned),
              ("train", "stage2 2", 7): edited(poisoned), ("train", "stage1 5", 3): edited(renamed),
              ("train", "stage2 1", 2): edited(reshaped), ("train", "stage1 1", 9): remember,
              ("train", "stage1 6", 9): lambda message, answer: Message(old[0].content, reply_to=message),
              ("train", "stage2 4", 0): crashed, ("train", "stage1 4", 6): kill_server, ("train", "stage2 3", 6): kill_server}
    absent = {("stage1", 3, 1), ("stage1", 4, 5), ("stage1", 2, 7), ("stage2", 2, 7), ("stage1", 5, 3), ("stage2", 1, 2),
              ("stage1", 6, 9), ("stage2", 4, 0)}
    server = read_shard(folder / "server")
    for _ in range(3):
        grid = FakeGrid(tmp_path / "states", 12, n_train, lambda i: folder / f"client-{i}", faults)
        try:
            run.run(config(*sets), tmp_path / "chaos", grid=grid, shard=server, resume=True)
        except KeyboardInterrupt:
            continue
    found = outcome(tmp_path / "chaos")
    failed = {(v["stage"], v["round"], v["client"]): v["reason"] for v in found[0]["visits"] if v["status"] != "ok"}
    assert failed.keys() == absent and all(failed.values()) and len(found[0]["visits"]) == 12 * 6
    same_result(found, embedded(tmp_path, *sets, absent=absent, monkeypatch=monkeypatch))
    snapshot, _ = CheckpointFolder(tmp_path / "embedded/checkpoint").load()
    engine, _ = CheckpointFolder(tmp_path / "chaos/checkpoint").load()
    for client, own in snapshot.private.items():
        with ClientFolder(tmp_path / f"states/{client}", engine.state["run"], client) as its:
            private = its.load(engine.state["kept"][str(client)]).tensors
        assert private.keys() == own.keys() and all(torch.equal(private[name], own[name]) for name in own), client


@pytest.fixture(scope="module")
def shards_of_twelve(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twelve")
    write_shards(config("clients.count=12", "clients.unseen=0", "data.max_samples=480"), folder, Progress())
    return folder, {i: shard_about(folder / f"client-{i}")["clients"][0]["n_train"] for i in range(12)}


def test_private_experts_are_exported_from_the_clients_own_folders(tmp_path, shards):
    """As the embedded run's; without them the server's part alone, and a client's prediction is refused."""
    deployed(tmp_path, shards)
    embedded(tmp_path)
    said = Notes()
    for name, states in (("flower", tmp_path / "states"), ("flower", tmp_path / "states/2"), ("flower", None),
                         ("embedded", None)):
        export(tmp_path / name, tmp_path / "out", states=states, progress=said, overwrite=True)
        files = {path.stem: load_file(path) for path in (tmp_path / "out/clients").glob("*.safetensors")}
        if name == "embedded":
            assert files.keys() == everyone.keys()
            assert all(torch.equal(files[i][n], t) for i in files for n, t in everyone[i].items())
        elif states is None:
            assert not files and "the private experts of 4 clients are not in the export" in said.notes[-1]
            with pytest.raises(ConfigError, match="the private expert of client 2 is not in this export"):
                mixture.load(tmp_path / "out", 2)
            mixture.load(tmp_path / "out")
        elif states.name == "2":
            assert files.keys() == {"2"}
        else:
            everyone = files
            assert everyone.keys() == {"0", "1", "2", "3"}
    with pytest.raises(ConfigError, match="the private expert of client 1"):
        export(tmp_path / "flower", tmp_path / "merged", "merged", client="1")
    with pytest.raises(RunFolderError, match="holds no private state of a client of"):
        export(tmp_path / "flower", tmp_path / "more", states=tmp_path)
