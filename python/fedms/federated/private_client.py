"""The client's side of a run with privacy: its share of a round's sum, and what it answers in a secure one."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedms.federated.client import Client, ClientFailure, ClientStep, Message, Private, Share, memory_errors
from fedms.federated.evaluation import evaluate_client
from fedms.federated.method import Method
from fedms.privacy import secure_round
from fedms.privacy.clipping import NotFinite
from fedms.privacy.key_file import derive
from fedms.privacy.ledger import NAME as LEDGER, Ledger, Release
from fedms.privacy.secure_round import Held, Question
from fedms.privacy.secure_sum import Member, ProtocolError, Terms, advertise, identity_of, tag_of
from fedms.federated.private_server import PrivateServer
from fedms.training.expert_model import ExpertModel


def contribute(server: PrivateServer, method: Method, model: ExpertModel, client: Client, private: Private,
               message: Message, step: ClientStep | None = None) -> tuple[np.ndarray, Private, str | None]:
    """A visit: what the client adds to the round's sum, (size,) int32, its private state from now on, and why it adds nothing.
    `step` carries it out; by default the method's.

    A client without samples, or whose training fails, adds zeros and keeps its state. Its reason depends on its data, so it
    must stay where the client is.
    """
    sums = server.sums_of(message)
    if message.stage == "done":
        accuracy = evaluate_client(method, model, client, private, message)["accuracy"].get("personalized")
        return sums.encode({}, accuracy=accuracy), private, None
    if not client.n_train:
        return sums.nothing(), private, "it has no training samples"
    model.clear(server.ahead(message, client))
    try:
        with memory_errors():
            reply, after = (step or method.client_step)(model, client, private, message)
        update = {name: (tensor.double() - message.tensors[name].double()).numpy() for name, tensor in reply.tensors.items()}
        counts = next(iter(reply.statistics.values())).numpy() if reply.statistics else None
        return sums.encode(update, reply.score, counts), after, None
    except (ClientFailure, NotFinite) as failure:
        return sums.nothing(), private, str(failure)


def join(server: PrivateServer, member: Member, message: Message, vector: np.ndarray) -> tuple[Share, Held]:
    """What a client sends first in a secure sum, and what it holds until the sum is over."""
    terms = server.terms(message, attempt=0)
    return Share(member.client, key=advertise(member, terms, vector)), Held(terms, vector, server.price(message))


def answer(question: Question, terms: Terms, member: Member, held: Held) -> dict[str, bytes]:
    """A client's answer to a question of a secure sum; `held` is brought up to date, and must be kept before it leaves.

    Args:
        terms: of the attempt that the question belongs to, as the client computes them itself.

    Raises:
        ProtocolError: if the question must not be answered.
    """
    if question.phase == "join":
        held.begin(terms)
        return {"key": advertise(member, terms, held.vector)}
    if held.terms != terms:
        raise ProtocolError(f"attempt {terms.attempt} was not joined")
    return secure_round.answer(question, member, held)


def charge(folder: Path, held: Held, survivors: Sequence[int]) -> None:
    """Count a noised sum that a client is about to help reveal, in a ledger of the client's own. The same sum counts once; a
    server that has another one of the same round revealed pays for it again.

    Args:
        folder: of the client, for all runs with its key.
        survivors: the clients whose vectors are in the sum.

    Raises:
        BudgetSpent: if the client has not agreed to that much; its answer must then not leave.
        LedgerError: if the ledger cannot be read or written.
    """
    terms, price = held.terms, held.price
    if price is not None:
        ledger = Ledger(folder / LEDGER, price.delta, price.accountant, None, price.budget)
        ledger.charge(Release(tag_of(terms, held.keys, survivors), terms.stage, terms.round, terms.attempt, price.update,
                              price.score, price.counts))


# Who a client is

@lru_cache(maxsize=2**10)
def member_of_run(key: bytes, client: int, count: int) -> Member:
    """A client of a run whose clients are all on the machine that has the run's key."""
    return Member(client, derive(key, "client", client), _identities(key, count))


@lru_cache(maxsize=2)
def _identities(key: bytes, count: int) -> Mapping[int, bytes]:
    return {client: identity_of(derive(key, "client", client)) for client in range(count)}
