"""The distributed engine against the embedded one, and against nodes that fail, dawdle and lie."""
from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

from fake_grid import FakeGrid
from flwr.app import Error, Message
from safetensors.torch import load_file

from fedms import mixture, run, wire
from fedms.checkpoint import CheckpointFolder
from fedms.client import ClientFailure, Private
from fedms.config import ConfigError, load_config
from fedms.data import read_shard
from fedms.engine.base import Interrupted
from fedms.engine.flower import certificates, deployment, mail
from fedms.engine.flower.folder import ClientFolder, FolderError, State
from fedms.export import export
from fedms.progress import Progress
from fedms.records import RunFolderError, RunRecords, comparable
from fedms.server import AllClientsFailed
from fedms.files import shard_about
from fedms.session import Session, write_shards

SMALL = ["data.max_samples=240", "clients.count=4", "clients.unseen=1", "stage1.rounds=2", "stage2.rounds=2",
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
        kind = type(run.Session(config(), Progress()).case(config(*sets)).method)
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
        head, parts = mail.read(answer(message).content)
        tensors = wire.unpack(parts["tensors"])
        parts["tensors"] = wire.pack(change(tensors) or tensors)
        return Message(mail.write(head, mail.buffers(parts)), reply_to=message)
    return fault


def headed(change):
    def fault(message, answer):
        head, parts = mail.read(answer(message).content)
        change(head)
        return Message(mail.write(head, mail.buffers(parts)), reply_to=message)
    return fault


def packed(change):
    """A fault in the first entry of the tensors' manifest."""
    def fault(message, answer):
        head, parts = mail.read(answer(message).content)
        length = int.from_bytes(parts["tensors"][:8], "little")
        manifest = json.loads(parts["tensors"][8:8 + length])
        change(manifest[0])
        new = json.dumps(manifest).encode()
        parts["tensors"] = len(new).to_bytes(8, "little") + new + parts["tensors"][8 + length:]
        return Message(mail.write(head, mail.buffers(parts)), reply_to=message)
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
    head, _ = mail.read(answer(message).content)
    return Message(mail.write(head, mail.buffers({"tensors": bytes(10**7)})), reply_to=message)


def truncated(message, answer):
    head, parts = mail.read(answer(message).content)
    return Message(mail.write(head, mail.buffers({"tensors": parts["tensors"][:-3]})), reply_to=message)


FAULTS = {
    "nan": (edited(poisoned), "holds NaN or infinity"), "key": (edited(renamed), "expert/unknown: was not sent to it"),
    "shape": (edited(reshaped), "expected ("), "dtype": (edited(doubled), "torch.float64, expected torch.float32"),
    "norm": (edited(enormous), "by clients.max_change"),
    "silent": (lambda message, answer: None, "no answer within 0.3 s"),
    "crash": (crashed, "the process ended (Flower's error 8)"), "large": (too_large, "accepted here: up to"),
    "cut": (truncated, "the payload should be"),
    "samples": (headed(lambda h: h["reply"].update(n_train=10**6)), "n_train 1000000, but the client has"),
    "metric": (headed(lambda h: h["reply"]["metrics"].update(loss="low")), "loss is 'low', expected a number"),
    "unknown metric": (headed(lambda h: h["reply"]["metrics"].update(price=1.0)), "unknown metric 'price'"),
    "other client": (headed(lambda h: h.update(client=0)), "it is client 0's"),
    "no visit": (headed(lambda h: h.pop("visit")), "it tells of no visit"),
    "endless number": (headed(lambda h: h["reply"]["metrics"].update(loss=10**4000)), "expected a number"),
    "strange dtype": (packed(lambda entry: entry.__setitem__(2, [])), "dtype and encoding are no strings"),
    "score": (headed(lambda h: h["reply"].update(score=7)), "expected an accuracy in [0, 1]"),
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
        grid.names = {103: "client-3", 8: "client-2", 102: "client-2"}
        grid.nodes = dict(sorted(grid.nodes.items(), key=lambda pair: pair[0] == 7))
    found, notes = deployed(tmp_path, shards, change=change)
    assert any("it says it is client 1, which node 101 is already" in n for n in notes)
    assert any("it says it is client 3, but its key is registered as client-2" in n for n in notes)
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
    assert grids[0].together[-2:] == [2, 2] and [c["id"] for c in found[0]["clients"]] == [0, 1, 3, 4]
    assert "client 2 is not evaluated: no answer within 0.3 s" in notes
    assert any(n.startswith("1 of 4 clients could not be evaluated") for n in found[0]["summary"]["notes"])


def test_a_run_without_any_evaluation_has_not_ended(tmp_path, shards):
    silent = {("evaluate", "evaluation", i): lambda message, answer: None for i in range(4)}
    with pytest.raises(AllClientsFailed, match="no client could be evaluated; --resume asks them again"):
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
        digest = folder.save(State(Private({"expert/a": torch.ones(3)}), frozenset({"x"})), "stage1", 1)
    with pytest.raises(FolderError, match="belongs to .*give this client a folder of its own"):
        ClientFolder(tmp_path, "run", 4)
    with ClientFolder(tmp_path, "run", 3) as folder:
        assert torch.equal(folder.load(digest).private.tensors["expert/a"], torch.ones(3))
        assert folder.load(None).private == Private()
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
            state = State(Private({"a": torch.full((4,), float(number))}), frozenset())
            digests.append(folder.save(state, "stage2", number))
    with ClientFolder(tmp_path, "run", 0) as folder:
        for back in (2, 3, 4):
            assert float(folder.load(digests[back]).private.tensors["a"][0]) == back
        folder.load(digests[3])         # the visit after it did not count: it is done again, to the same hash
        assert folder.save(State(Private({"a": torch.full((4,), 4.0)}), frozenset()), "stage2", 4) == digests[4]


def test_damage_in_a_folder_is_noticed(tmp_path):
    with ClientFolder(tmp_path, "run", 0) as folder:
        digest = folder.save(State(Private({"a": torch.ones(100)}), frozenset()), "stage1", 1)
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
        digest = folder.save(State(Private(big), frozenset()), "stage2", 1)
    with ClientFolder(tmp_path, "run", 0) as folder:
        assert torch.equal(folder.load(digest).private.tensors["expert/a"], big["expert/a"])


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
            private = its.load(engine.state["kept"][str(client)]).private.tensors
        assert private.keys() == own.keys() and all(torch.equal(private[name], own[name]) for name in own), client


@pytest.fixture(scope="module")
def shards_of_twelve(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twelve")
    write_shards(config("clients.count=12", "clients.unseen=0", "data.max_samples=480"), folder, Progress())
    return folder, {i: shard_about(folder / f"client-{i}")["clients"][0]["n_train"] for i in range(12)}


def test_the_example_is_what_init_writes(tmp_path):
    (tmp_path / "data/client-0").mkdir(parents=True)
    deployment.write_app(tmp_path, "", "127.0.0.1", None)
    example = Path(__file__).parents[2] / "examples/flower"
    for name in ("pyproject.toml", "fedms_app/__init__.py"):
        assert (tmp_path / name).read_text().replace(str(tmp_path), "/srv/deployment") == (example / name).read_text()
    build_fab_from_disk = pytest.importorskip("flwr.cli.build").build_fab_from_disk
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path))) as app:        # what Flower sends to every node
        assert {name for name in app.namelist() if not name.startswith(".info")} == {"pyproject.toml", "fedms_app/__init__.py"}
    assert oct((tmp_path / "certificates/client-0").stat().st_mode)[-3:] == "600"
    with pytest.raises(FileExistsError, match="its certificate is for 127.0.0.1, not for example.org, 127.0.0.1"):
        certificates.make(tmp_path / "certificates", ["example.org"], 1)


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
            assert not files and "what 4 clients keep to themselves is not in it" in said.notes[-1]
            with pytest.raises(ConfigError, match="what client 2 keeps to itself is in a folder of its own"):
                mixture.load(tmp_path / "out", 2)
            mixture.load(tmp_path / "out")
        elif states.name == "2":
            assert files.keys() == {"2"}
        else:
            everyone = files
            assert everyone.keys() == {"0", "1", "2", "3"}
    with pytest.raises(ConfigError, match="what client 1 keeps to itself"):
        export(tmp_path / "flower", tmp_path / "merged", "merged", client="1")
    with pytest.raises(RunFolderError, match="holds no private state of a client of"):
        export(tmp_path / "flower", tmp_path / "more", states=tmp_path)
