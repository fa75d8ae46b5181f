"""The phases as messages: through bytes and back, with clients that are silent, slow, or wrong."""
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedms.privacy import secure_sum as ss
from fedms.privacy.key_file import derive
from fedms.privacy.secure_round import Held, Question, answer, collect, read_held, write_held
from fedms.privacy.secure_sum import Member, ProtocolError, Terms, identity_of

COUNT = 6
TERMS = Terms("run", "stage1", 1, 0, ss.threshold_of(COUNT), ((5, 0), (1, 0)))


class Clients:
    """Clients in one process. wrong: by (client, phase), what comes instead of the answer; None: nothing."""

    def __init__(self, wrong=None):
        secrets = {i: derive(b"rounds", i) for i in range(COUNT)}
        identities = {i: identity_of(secret) for i, secret in secrets.items()}
        self.members = {i: Member(i, secret, identities) for i, secret in secrets.items()}
        rng = np.random.default_rng(1)
        self.held = {i: Held(TERMS, rng.integers(-99, 99, TERMS.size)) for i in range(COUNT)}
        self.wrong, self.asked = wrong or {}, []

    def keys(self):
        return {i: ss.advertise(self.members[i], TERMS, held.vector) for i, held in self.held.items()}

    def ask(self, questions):
        answers = {}
        for client, question in questions.items():
            self.asked.append((client, question.phase))
            if (client, question.phase) in self.wrong:
                if (instead := self.wrong[client, question.phase]) is not None:
                    answers[client] = instead
                continue
            plain, arrays = write_held(self.held[client])      # as if the client was restarted before every phase
            self.held[client] = read_held(json.loads(json.dumps(plain)), arrays, self.held[client].promises)
            answers[client] = answer(question, self.members[client], self.held[client])
        return answers

    def sum_of(self, clients):
        return sum(self.held[i].vector for i in clients)


def test_all_answer():
    clients = Clients()
    found = collect(TERMS, clients.keys(), clients.ask)
    assert (found.total == clients.sum_of(range(COUNT))).all() and found.survivors == tuple(range(COUNT))
    again = Clients()
    assert (collect(TERMS, again.keys(), again.ask).total == found.total).all()


@pytest.mark.parametrize("phase, counts", [("share", False), ("mask", False), ("reveal", True)])
@pytest.mark.parametrize("instead", [None, {}, {"boxes": b"x"}, {"masked": b""}, {"shares": bytes(33 * COUNT + 1)},
                                     {"boxes": bytes(82 * (COUNT - 1)), "more": b""}])
def test_wrong_answer_counts_as_none(phase, counts, instead):
    clients = Clients({(2, phase): instead})
    found = collect(TERMS, clients.keys(), clients.ask)
    assert (2 in found.survivors) == counts
    assert (found.total == clients.sum_of(found.survivors)).all()


@pytest.mark.parametrize("phase, words", [("share", "shared their secrets"), ("mask", "sent their vectors"),
                                          ("reveal", "revealed their shares")])
def test_too_few_answers(phase, words):
    clients = Clients({(i, phase): None for i in (0, 3)})
    with pytest.raises(ProtocolError, match=f"4 clients {words}, but the sum needs 5"):
        collect(TERMS, clients.keys(), clients.ask)


def test_too_few_keys_and_keys_of_the_wrong_length():
    clients = Clients()
    keys = {**clients.keys(), 0: b"short", 5: b""}
    with pytest.raises(ProtocolError, match="4 clients sent a key, but the sum needs 5"):
        collect(TERMS, keys, clients.ask)
    assert not clients.asked


def test_boxes_with_wrong_content_make_their_readers_refuse():
    """A client that sends rubbish in the right form: the others do not answer, and no sum comes about."""
    clients = Clients({(2, "share"): {"boxes": bytes(82 * (COUNT - 1))}})
    keys = clients.keys()
    with pytest.raises(ProtocolError, match="client 2 is said to have sent"):
        collect(TERMS, keys, clients.ask)


@given(st.sampled_from(["share", "mask", "reveal", "other", ""]), st.lists(st.integers(0, 9), max_size=8),
       st.dictionaries(st.sampled_from(["keys", "boxes", "masked", "x"]), st.binary(max_size=200), max_size=2))
@settings(max_examples=100, deadline=None)
def test_any_other_question_is_refused(phase, ids, parts):
    clients = Clients()
    with pytest.raises(ProtocolError):
        answer(Question(phase, tuple(ids), parts), clients.members[0], clients.held[0])
    assert not clients.held[0].promises.kept
