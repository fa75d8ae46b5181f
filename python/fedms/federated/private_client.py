"""The client's side of a run with privacy: its share of a round's sum, and who it is in a secure one."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fedms.config import RunConfig
from fedms.federated.client import Client, ClientFailure, Message, Private, Share, memory_errors
from fedms.federated.evaluation import evaluate_client
from fedms.federated.method import Method
from fedms.privacy import secure_round
from fedms.privacy.clipping import NotFinite
from fedms.privacy.key_file import KeyFileError, create_key, derive, read_key
from fedms.privacy.secure_round import Held, Question
from fedms.privacy.secure_sum import PUBLIC_BYTES, Member, ProtocolError, Terms, advertise, identity_of
from fedms.federated.private_server import PrivateServer
from fedms.storage.durable import write_durably
from fedms.training.expert_model import ExpertModel

KEY, IDENTITIES = "privacy.key", "identities.json"


def contribute(server: PrivateServer, method: Method, model: ExpertModel, client: Client, private: Private,
               message: Message) -> tuple[np.ndarray, Private, str | None]:
    """A visit: what the client adds to the round's sum, (size,) int32, its private state from now on, and why it adds nothing.

    A client without samples, or whose training fails, adds zeros and keeps its state. Its reason depends on its data, so it
    must stay where the client is.
    """
    sums = server.sums_of(message)
    if message.stage == "done":
        accuracy = evaluate_client(method, model, client, private, message)["accuracy"].get("personalized")
        return sums.encode({}, accuracy=accuracy), private, None
    if not client.n_train:
        return sums.nothing(), private, "it has no training samples"
    model.clear()
    try:
        with memory_errors():
            reply, after = method.client_step(model, client, private, message)
        update = {name: (tensor.double() - message.tensors[name].double()).numpy() for name, tensor in reply.tensors.items()}
        counts = next(iter(reply.statistics.values())).numpy() if reply.statistics else None
        return sums.encode(update, reply.score, counts), after, None
    except (ClientFailure, NotFinite) as failure:
        return sums.nothing(), private, str(failure)


def join(server: PrivateServer, member: Member, message: Message, vector: np.ndarray) -> tuple[Share, Held]:
    """What a client sends first in a secure sum, and what it holds until the sum is over."""
    terms = server.terms(message, attempt=0)
    return Share(member.client, key=advertise(member, terms, vector)), Held(terms, vector)


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


# Who a client is

def member_of_run(key: bytes, client: int, count: int) -> Member:
    """A client of a run whose clients are all on the machine that has the run's key."""
    return Member(client, derive(key, "client", client), _identities(key, count))


@lru_cache(maxsize=2)
def _identities(key: bytes, count: int) -> Mapping[int, bytes]:
    return {client: identity_of(derive(key, "client", client)) for client in range(count)}


def digest_of(config: RunConfig) -> str:
    """A hash of all of a run file that decides what a client sends."""
    tables = config.model_dump(mode="json")
    tables["privacy"].pop("key")
    for name in ("engine", "threads", "workers", "device"):
        tables["run"].pop(name)
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()


def write_member(folder: Path, key: bytes, client: int, config: RunConfig) -> None:
    """Write what a client on a machine of its own needs: its secret key, the run file's hash, and the public identities of all
    clients.

    Raises:
        KeyFileError, OSError: if it cannot be written.
    """
    secret = derive(key, "client", client)
    if not (folder / KEY).exists():
        create_key(folder / KEY, secret)
    elif read_key(folder / KEY) != secret:
        raise KeyFileError(f"{folder / KEY}: belongs to another run's key; remove it, or write to another folder")
    listed = {str(i): identity.hex() for i, identity in _identities(key, config.clients.count).items()}
    write_durably(folder / IDENTITIES, json.dumps({"config": digest_of(config), "identities": listed}).encode())


def read_policy(folder: Path) -> dict[str, Any]:
    """What `write_member` wrote beside the key: `config`, the run file's hash, and `identities`, by client.

    Raises:
        KeyFileError: if it is not there as it was written.
    """
    path = folder / IDENTITIES
    try:
        policy = json.loads(path.read_bytes())
        identities = {int(i): bytes.fromhex(identity) for i, identity in policy["identities"].items()}
        config = policy["config"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise KeyFileError(f"{path}: not a list of the clients' identities ({error})") from None
    if not isinstance(config, str) or any(len(identity) != PUBLIC_BYTES for identity in identities.values()):
        raise KeyFileError(f"{path}: not a list of the clients' identities")
    return {"config": config, "identities": identities}


def read_member(folder: Path, client: int) -> Member:
    """The counterpart of `write_member`.

    Raises:
        KeyFileError: if the key or the identities are not there as they were written.
    """
    secret, identities = read_key(folder / KEY), read_policy(folder)["identities"]
    if identities.get(client) != identity_of(secret):
        raise KeyFileError(f"{folder / KEY}: does not belong to the identity of client {client} in {folder / IDENTITIES}")
    return Member(client, secret, identities)
