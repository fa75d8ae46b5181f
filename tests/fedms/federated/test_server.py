"""The server's steps on plain tensors: what it sends, how it averages, when it goes on."""
from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fedms.config import load_config
from fedms.federated.client import Participant, Reply
from fedms.federated.devices import Device
from fedms.federated.schedule import SalState
from fedms.federated.server import AllClientsFailed, RejectedReply, Server
from fedms.methods import create
from fedms.federated.server_state import pack_server, unpack_server

ORDER = [3, 2, 1]
TENSORS = {f"expert/block.{i}.lora_{x}": torch.randn(2, 2) for i in range(3) for x in "ab"} | {
    "head/weight": torch.randn(2, 2), "gate/out.weight": torch.randn(2, 2)}
BLOCK_OF = {name: int(name[13]) + 1 for name in TENSORS if name.startswith("expert/")}


def server(method="fedms", *sets):
    config = load_config("digits", ["clients.count=4", "clients.unseen=0", "stage1.rounds=3", "stage2.rounds=2",
                                    "sal.max_depth=3", "sal.queue=2", "sal.tau=1.0", f"run.method={method}", *sets])
    method = create(config)
    return Server(config, ORDER, BLOCK_OF, method, method.statistics(3))


def step(s, state, replies):
    collected = s.collect()
    for each in replies:
        collected.add(each)
    return s.step(state, collected)


def reply(client, tensors, n_train=10, score=0.5, statistics=None):
    return Reply(client, tensors, n_train, 5, score, {"loss": 1.0, "validation_accuracy": score}, statistics or {})


def expert(*blocks):
    return {f"expert/block.{b - 1}.lora_{x}" for b in blocks for x in "ab"}


def test_pairs_that_are_off_do_not_travel():
    s = server()
    message = s.message(s.start(TENSORS))
    assert set(message.tensors) == expert(3) | {"head/weight"} and not message.constants
    assert (message.stage, message.round, message.depth, message.clients) == ("stage1", 1, 1, (0, 1, 2, 3))


def test_two_stages_from_the_first_message_to_the_last():
    s = server()
    state = s.start(TENSORS)
    sent = []
    while state.stage != "done":
        message = s.message(state)
        sent.append((message.stage, message.round, message.depth, message.applied_depth))
        state, record = step(s, state, [reply(c, dict(message.tensors)) for c in message.clients])
        assert record["clients"] == 4 and record["loss"] == 1.0
    # tau = 1 activates whenever the queue of two is full, but never in the last round of a stage.
    assert sent == [("stage1", 1, 1, 1), ("stage1", 2, 1, 1), ("stage1", 3, 2, 2),
                    ("stage2", 1, 1, 2), ("stage2", 2, 1, 2)]
    assert state.final_depth == {"stage1": 2, "stage2": 1}
    for name, tensor in TENSORS.items():      # all clients sent back what they received
        assert torch.allclose(state.tensors[name], tensor), name


def test_stage_2_sends_the_gate_each_round_and_the_expert_once():
    s = server("fedms", "stage1.rounds=0")
    message = s.message(s.start(TENSORS))
    assert set(message.tensors) == {"gate/out.weight"}
    assert set(message.constants) == expert(3) | {"head/weight"}


def test_methods_differ_in_what_travels():
    def travels(method, stage):
        s = server(method, *(["stage1.rounds=0"] if stage == "stage2" else []))
        message = s.message(s.start(TENSORS))
        return set(message.tensors), set(message.constants)

    shared = expert(3) | {"head/weight"}
    for method in ("fedavg", "fedavg_prior"):
        assert travels(method, "stage1") == travels(method, "stage2") == (shared, set())
    assert travels("fedavg_ft", "stage1") == (shared, set()) and travels("fedavg_ft", "stage2") == (set(), shared)
    assert travels("local", "stage1") == travels("local", "stage2") == (set(), set())


def test_replies_are_weighed_by_samples_or_alike():
    ones = {"head/weight": torch.ones(2, 2)}
    zeros = {"head/weight": torch.zeros(2, 2)}
    for weights, expected in (("samples", 0.75), ("uniform", 0.5)):
        s = server("fedavg", f"aggregate.weights={weights}")
        state, record = step(s, s.start(TENSORS), [reply(0, ones, 30, 0.2), reply(1, zeros, 10, None)])
        assert torch.allclose(state.tensors["head/weight"], torch.full((2, 2), expected))
        assert record["validation_accuracy"] == 0.2         # a client without validation samples has no say
        assert state.sal == SalState(1, 1, (0.2,))


def test_sums_are_added_up_over_rounds():
    s = server("fedavg_prior")
    state = s.start(TENSORS)
    for client in (0, 1):
        state, _ = step(s, state, [reply(client, {}, statistics={"class_counts": torch.tensor([1.0, client, 0.0])})])
    assert state.statistics["class_counts"].tolist() == [2.0, 1.0, 0.0]


def test_a_round_without_replies_stops_the_run():
    s = server()
    with pytest.raises(AllClientsFailed, match="stage1, round 1: no client could train"):
        step(s, s.start(TENSORS), [])


def test_sampling():
    s = server("fedavg", "clients.fraction=0.5")
    rounds = [s.sample("stage1", r) for r in range(1, 40)]
    assert all(len(c) == 2 and list(c) == sorted(set(c)) for c in rounds)
    assert set().union(*rounds) == {0, 1, 2, 3}
    assert rounds == [s.sample("stage1", r) for r in range(1, 40)] and len(set(rounds)) > 3
    assert len(server("fedavg", "clients.fraction=0.01", "clients.min=3").sample("stage1", 1)) == 3


def restored(s, plain, tensors):
    """The server's state and the round under way, from what a checkpoint holds."""
    plain = json.loads(json.dumps(plain))
    state, under_way = unpack_server(plain, tensors)
    return state, s.restore(state, plain["collected"], under_way)


@pytest.mark.parametrize("rule", ["mean", "exact", "freeze_a", "median", "trimmed_mean", "krum"])
def test_a_round_goes_on_from_the_middle(rule):
    """A checkpoint between two replies loses nothing, whether the rule streams or needs all of them."""
    s = server("fedavg", f"aggregate.rule={rule}", "aggregate.byzantine=0")
    state = s.start(TENSORS)
    torch.manual_seed(0)
    names = s.message(state).tensors
    assert rule != "freeze_a" or not any(name.endswith(".lora_a") for name in names)
    replies = [reply(client, {name: torch.randn(2, 2) for name in names}, 10 + client) for client in range(4)]
    whole, record = step(s, state, replies)

    collected = s.collect()
    for each in replies[:2]:
        collected.add(each)
    plain, tensors = pack_server(state, collected)
    again, collected = restored(s, plain, tensors)
    for each in replies[2:]:
        collected.add(each)
    resumed, record_again = s.step(again, collected)
    assert record == record_again and whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(t, resumed.tensors[name]) for name, t in whole.tensors.items())
    corrections = [name for name in whole.tensors if name.startswith("correction/")]
    assert len(corrections) == (rule == "exact")
    assert set(corrections) <= set(s.message(whole).tensors)


class One(Participant):
    id, n_train, n_validation = 2, 10, 5

    def __init__(self, max_depth=None):
        self.device = Device(max_depth)


def changed(tensors, name, change):
    return {n: change(t) if n == name else t for n, t in tensors.items()}


@pytest.mark.parametrize("change, words", [
    (lambda r: replace(r, client=1), "it is client 1's, expected client 2's"),
    (lambda r: replace(r, n_train=11), "n_train 11, but the client has 10"),
    (lambda r: replace(r, n_validation=2**31 - 1), "n_validation 2147483647, but the client has 5 validation samples"),
    (lambda r: replace(r, tensors=changed(r.tensors, "head/weight", lambda t: t + 1)), "head/weight: its change has norm 2"),
    (lambda r: replace(r, tensors={**r.tensors, "gate/out.weight": torch.zeros(2, 2)}), "gate/out.weight: was not sent"),
    (lambda r: replace(r, tensors=changed(r.tensors, "head/weight", lambda t: t[:1])), r"shape \(1, 2\), expected \(2, 2\)"),
    (lambda r: replace(r, tensors=changed(r.tensors, "head/weight", lambda t: t.double())), "float64, expected torch.float32"),
    (lambda r: replace(r, tensors=changed(r.tensors, "head/weight", lambda t: t / 0)), "head/weight: holds NaN or infinity"),
    (lambda r: replace(r, tensors=changed(r.tensors, "head/weight", lambda t: t + 1e5)), "by clients.max_change"),
    (lambda r: replace(r, statistics={"anything": torch.zeros(2)}), "anything: is no statistic that was asked for"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_reply_is_admitted_or_refused_with_a_reason(change, words):
    s = server()
    message = s.message(s.start(TENSORS))
    good, collected = reply(2, dict(message.tensors)), s.collect()
    with pytest.raises(RejectedReply, match=words):
        s.admit(change(good), message, One(), collected)
    assert not collected.numbers and not collected.mean.sums and not collected.statistics
    s.admit(good, message, One(), collected)
    assert len(collected.numbers) == 1


def test_a_small_tensor_cannot_be_replaced_beside_large_ones():
    s = server("fedavg", "sal.schedule=all")
    message = s.message(s.start({**TENSORS, "head/weight": torch.full((2, 2), 1e6), "head/bias": torch.zeros(2)}))
    for by, refused in ((0.004, False), (0.1, True)):
        collected = s.collect()
        answer = reply(2, {**message.tensors, "head/bias": torch.full((2,), by)})
        if refused:
            with pytest.raises(RejectedReply, match="head/bias: its change has norm 0.14.*by clients.max_change"):
                s.admit(answer, message, One(), collected)
        else:
            s.admit(answer, message, One(), collected)


def test_what_the_server_adds_to_frozen_weights_comes_from_no_client():
    s = server("fedavg", "aggregate.rule=exact")
    message = s.message(replace(s.start(TENSORS), tensors={**TENSORS, "correction/block.2": torch.zeros(2, 2)}))
    assert "correction/block.2" in message.tensors
    with pytest.raises(RejectedReply, match="correction/block.2: is what the server adds to frozen weights"):
        s.admit(reply(2, dict(message.tensors)), message, One(), s.collect())


def test_statistics_count_once_and_that_lasts():
    s = server("fedavg_prior")
    state = s.start(TENSORS)
    told = {"class_counts": torch.tensor([4.0, 0.0, 6.0], dtype=torch.float64)}
    collected = s.collect(state)
    s.admit(reply(2, {}, statistics=told), s.message(state), One(), collected)
    for _ in range(2):      # in the round, and in the next one
        with pytest.raises(RejectedReply, match="class_counts: the client has told it before, and it is told once"):
            s.admit(reply(2, {}, statistics=told), s.message(state), One(), collected)
        plain, tensors = pack_server(state, collected)
        state, collected = restored(s, plain, tensors)
        if not state.counted:
            state, _ = s.step(state, collected)
            collected = s.collect(state)
    assert torch.equal(state.statistics["class_counts"], told["class_counts"])


@pytest.mark.parametrize("sets, lies", [
    (["aggregate.weights=uniform"], 0.25 * 0.9 + 0.75 * 0.1), ([], (50 * 0.9 + 15 * 0.1) / 65),
    (["aggregate.rule=median"], 0.1)])
def test_one_client_does_not_weigh_more_than_ten_in_the_score(sets, lies):
    collected = server("fedavg", *sets).collect()
    for client in range(4):
        each = reply(client, {}, score=0.9 if client == 2 else 0.1)
        collected.add(replace(each, n_validation=2**31 - 1) if client == 2 else each)
    assert collected.score("aggregate.rule=median" in sets) == pytest.approx(lies)


def test_statistics_and_blocks_that_do_not_fit_are_refused():
    s = server("fedavg_prior", "sal.schedule=all")
    message, collected = s.message(s.start(TENSORS)), s.collect()
    with pytest.raises(RejectedReply, match="block 1 is not trained by this client now"):
        s.admit(reply(2, dict(message.tensors)), message, One(max_depth=2), collected)
    for counts, words in ((torch.ones(1), r"class_counts: shape \(1,\), expected \(3,\)"),
                          (torch.full((3,), float("inf")), "class_counts: expected whole numbers from 0"),
                          (torch.tensor([-5.0, 5.0, 10.0]), "class_counts: expected whole numbers from 0"),
                          (torch.tensor([0.5, 0.5, 9.0]), "class_counts: expected whole numbers from 0"),
                          (torch.tensor([1e9, 0.0, 0.0]), r"adds up to 1e\+09, but the client has 10 training samples")):
        with pytest.raises(RejectedReply, match=words):
            s.admit(reply(2, {}, statistics={"class_counts": counts.double()}), message, One(), collected)


def test_a_quorum_is_kept():
    s = server("fedavg", "clients.quorum=0.5")
    state = s.start(TENSORS)
    message = s.message(state)
    with pytest.raises(AllClientsFailed, match="1 of 4 clients could train, fewer than clients.quorum = 0.5"):
        step(s, state, [reply(0, dict(message.tensors))])
    step(s, state, [reply(i, dict(message.tensors)) for i in (0, 3)])


@pytest.mark.parametrize("sets, least", [(["aggregate.rule=krum", "aggregate.byzantine=0"], 3),
                                         (["aggregate.rule=trimmed_mean", "aggregate.trim=0.3"], 4),
                                         (["aggregate.rule=trimmed_mean", "aggregate.trim=0.1"], 1)])
def test_a_robust_rule_that_could_not_be_one_is_a_missed_quorum(sets, least):
    s = server("fedavg", *sets)
    state = s.start(TENSORS)
    tensors = dict(s.message(state).tensors)
    step(s, state, [reply(i, tensors) for i in range(least)])
    if least > 1:
        with pytest.raises(AllClientsFailed, match=f"{least - 1} of 4 clients could train, fewer than the {least} that"):
            step(s, state, [reply(i, tensors) for i in range(least - 1)])
