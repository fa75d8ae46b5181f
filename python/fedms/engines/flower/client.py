"""The client's side: what it does with a message. Who it is comes from its own node's configuration, never from the
server."""
from __future__ import annotations

import hashlib
import os
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, cast

from flwr.app import Message as Mail

from fedms.engines.flower import transport
from fedms.engines.flower.transport import release, release_of
from fedms.errors import FedMSError
from fedms.federated.schema import FORMAT, GREETING, REASON, TASKS, SchemaError, shown
from fedms.foreign import printable
from fedms.privacy.member_file import IDENTITIES
from fedms.storage.durable import SHARD, shard_about

if TYPE_CHECKING:       # torch is imported when there is something to train
    from fedms.config import RunConfig
    from fedms.data import Partition
    from fedms.federated.client import Client, Message
    from fedms.federated.method import Method
    from fedms.federated.private_server import PrivateServer
    from fedms.federated.server import Server
    from fedms.models import FoundationModel
    from fedms.privacy.secure_sum import Member
    from fedms.storage.private_state import ClientFolder
    from fedms.training.expert_model import ExpertModel

HUB_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}"


@dataclass(frozen=True)
class Identity:
    """Who a node is, and what its owner has set.

    Attributes:
        client: Id of the client.
        n_train: Number of its training samples, or None if the server knows it, or the data in `data` tell it.
        state: Folder of its private state.
        data: Folder with its samples (`fedms.data.shard`), or None if the run file says where they are.
        own: The node's own run file, which alone may name code to be run, and paths. With None no run file may name any.
        model: Folder of the model on this machine, used instead of `model.id`; or None.
        device: Where this node computes, whatever the server says.
    """

    client: int
    n_train: int | None
    state: Path
    data: Path | None
    own: RunConfig | None = None
    model: str | None = None
    device: str = "auto"


class LoadedTask(Protocol):
    """The model of a run: what this room needs of `runs.experiment.LoadedTask`, which lies above it."""

    model: ExpertModel
    foundation: FoundationModel


class Experiment(Protocol):
    """One run on it: what this room needs of `runs.experiment.Experiment`."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def partition(self) -> Partition: ...

    @property
    def method(self) -> Method: ...

    @property
    def server(self) -> Server: ...

    def client(self, id: int) -> Client: ...


Open = Callable[["RunConfig", Identity], "tuple[LoadedTask, Experiment]"]
Answer = tuple[dict[str, Any], dict[str, bytes]]        # the head and the buffers of a reply


def answer(message: Mail, identity: Identity, open_experiment: Open) -> Mail:
    """Return the reply of a node whose client is known and whose owner has agreed to everything, as in a simulation."""
    if message.metadata.message_type == "query":
        return greet(message, lambda told: identity)
    return guarded(message, identity.client, lambda kind, head, parts: obey(kind, head, parts, identity, open_experiment))


def greet(message: Mail, identify: Callable[[int | None], Identity]) -> Mail:
    """Return the reply that says which client this is and how many samples it has. These numbers hold from then on.

    Args:
        identify: Returns the identity by the number that the server tells, or by None if it tells none.
    """
    told: int | None = None
    try:
        head, _ = transport.read(message.content)
        told = head.get("client") if type(head.get("client")) is int else None
        if head.get("format") != FORMAT or release_of(str(head.get("release"))) != release_of(release()):
            raise transport.MailError(f"the server runs fedms {shown(head.get('release'))} with messages of format "
                                      f"{shown(head.get('format'))}, this client fedms {release()} with format {FORMAT}; "
                                      "install the same release on both")
        told = GREETING.read(head)["client"]
        identity = identify(told)
        n_train, n_validation = _samples(identity)
    except Exception as error:
        return _answer(message, {"client": told or 0, "problem": reason_of(error)})
    return _answer(message, {"client": identity.client, "release": release(), "n_train": n_train, "n_validation": n_validation})


def _samples(identity: Identity) -> tuple[int | None, int | None]:
    """Return the numbers of training and validation samples, without importing torch."""
    private = identity.own is not None and identity.own.privacy.mode != "off"
    if private or (identity.data is not None and (identity.data / IDENTITIES).exists()):
        return None, None
    if identity.data is None:
        return identity.n_train, None
    from safetensors import safe_open

    (held,) = shard_about(identity.data)["clients"]
    with safe_open(identity.data / SHARD, "numpy") as file:
        return held["n_train"], file.get_slice(f"client/{held['id']}/validation").get_shape()[0]


def guarded(message: Mail, client: int | None, act: Callable[[str, dict[str, Any], dict[str, bytes]], Answer]) -> Mail:
    """Return the reply to a message that asks for work. Any error becomes a reason in the reply, and the private state is then
    unchanged.

    Args:
        client: Id of the client, or None if no greeting has told it yet.
        act: Does what a message of a kind (train, evaluate, query.sum) with this head and these buffers asks for.
    """
    echo: dict[str, Any] = {"client": client or 0}
    head: dict[str, Any] = {}
    try:
        kind = message.metadata.message_type
        if kind not in TASKS:
            raise Disagreement(f"a message of type {shown(kind)}; this client is asked {', '.join(TASKS)} alone")
        unread, parts = transport.read(message.content)
        if unread.get("format") != FORMAT:
            raise transport.MailError(f"messages of format {shown(unread.get('format'))}, this client's are of format {FORMAT}; "
                                      "update fedms on both sides")
        head = TASKS[kind].read(unread)
        echo.update({name: head[name] for name in ("run", "nonce")})
        came, out = act(kind, head, parts)
    except Exception as error:
        return _answer(message, {**echo, "problem": reason_of(error, head)})
    return _answer(message, {**echo, **came}, out)


def reason_of(error: Exception, head: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return what the server is told about an error. With privacy, it is told only about errors that do not depend on the client's
    data.

    Args:
        head: Head of the message that asked; empty if it had none.
    """
    settings = head.get("config", {}).get("privacy", {})
    private = isinstance(settings, dict) and settings.get("mode", "off") != "off"
    if private or os.environ.get("FEDMS_DEBUG") == "1":
        traceback.print_exception(error)        # into the node's own log
    if private and not isinstance(error, _DATA_FREE):
        return "it failed; the log of its node says why"
    return printable(f"{type(error).__name__}: {error}", REASON)


def obey(kind: str, head: dict[str, Any], parts: dict[str, bytes], identity: Identity, open_experiment: Open) -> Answer:
    """Train (a visit), evaluate (the client's line of `clients.jsonl`), or answer a phase of a secure sum. Errors are raised."""
    if kind == "query.sum":
        return _add_up(head, parts, identity)
    return (_visit if kind == "train" else _evaluate)(head, parts, identity, open_experiment)


class Disagreement(FedMSError):
    """A server asks for what this node has not agreed to."""


_DATA_FREE = (Disagreement, transport.MailError, SchemaError)


def _agreed(tables: dict[str, Any], identity: Identity) -> RunConfig:
    """Return the run file of a message, for the node's own device, if it names no code and no path but those of the node's own run
    file.

    Raises:
        Disagreement, ConfigError: If it does.
    """
    from fedms.config import config_from_dict, registry, with_run

    config, own = config_from_dict(tables), identity.own or config_from_dict({})
    for table, key in (("model", "trust_remote_code"), ("lora", "start"), ("data", "path")):
        told, agreed = getattr(getattr(config, table), key), getattr(getattr(own, table), key)
        if told != agreed:
            raise Disagreement(f"{table}.{key}: the server says {shown(told)}, but {_whose(identity)} {shown(agreed)}")
    id = config.model.id
    of_hub = re.fullmatch(HUB_ID, id, re.ASCII) and not Path(id).exists()
    if id not in registry.models() and not of_hub and (identity.own is None or id != own.model.id):
        raise Disagreement(f"model.id: the server says {shown(id)}, which is neither built in nor a hub id such as org/name; "
                           "a folder must be the one that this node's own run file names")
    _agreed_privacy(config, identity)
    if identity.data is None and config.data.name != own.data.name:
        raise Disagreement(f"data.name: the server says {shown(config.data.name)}, but {_whose(identity)} {shown(own.data.name)}")
    return with_run(config, device=identity.device)


def _agreed_privacy(config: RunConfig, identity: Identity) -> None:
    """Check that the run has the privacy for which the node was set up.

    With another run file the node's updates could be asked for one by one.
    """
    if identity.own is not None:
        told, agreed = (c.privacy.model_dump(exclude={"key"}) for c in (config, identity.own))
        if told != agreed:
            name = next(name for name in agreed if told[name] != agreed[name])
            raise Disagreement(f"privacy.{name}: the server says {shown(told[name])}, but {_whose(identity)} {shown(agreed[name])}")
    if identity.data is not None and (identity.data / IDENTITIES).exists():
        from fedms.privacy.member_file import digest_of, read_agreement

        if read_agreement(identity.data).run_file != digest_of(config):
            raise Disagreement("privacy: the server's run file is not the one that this node was set up for; set the node up again, "
                               "or undo what was changed since")
    elif config.privacy.masks and identity.data is not None:
        raise Disagreement(f"privacy.mode: the server says {shown(config.privacy.mode)}, for which this node has no key")


def _whose(identity: Identity) -> str:
    return "this node's own run file says" if identity.own else "without a run file of its own this node takes only"


def _visit(head: dict[str, Any], parts: dict[str, bytes], identity: Identity, open_experiment: Open) -> Answer:
    from fedms.federated.client import Private, visit
    from fedms.federated.packing import pack_reply
    from fedms.storage.private_state import ClientFolder, State

    config = _agreed(head["config"], identity)
    session, experiment = _opened(head, config, identity, open_experiment)
    client = experiment.client(identity.client)
    if config.privacy.mode != "off":
        return _share(head, parts, identity, session, experiment)
    with ClientFolder(identity.state, head["run"], identity.client, head["config"]) as folder:
        state, message = folder.load(head["kept"]), _message(head, parts, folder)
        session.model.meter.paid = set(state.paid_constants)
        came, after = visit(experiment.method.client_step, session.model, client, Private(state.tensors), message,
                            experiment.server.ahead(message, client))
        digest = folder.save(State(after.tensors, frozenset(session.model.meter.paid)), message.stage, message.round)
    answer = {"visit": {"reason": came.reason, "flops": came.flops, "seconds": came.seconds,
                        "peak_memory_bytes": came.peak_memory_bytes}, "kept": digest, "private": bool(after.tensors)}
    if came.reply is None:
        return answer, {}
    if foreign := sorted(came.reply.tensors.keys() - message.tensors.keys()):
        raise Disagreement(f"{foreign[0]} is this client's own: the server did not send it, so it is not sent to the server")
    packed = pack_reply(came.reply, config.wire.dtype)
    return {**answer, "reply": packed.head}, packed.parts


def _share(head: dict[str, Any], parts: dict[str, bytes], identity: Identity, session: LoadedTask,
           experiment: Experiment) -> Answer:
    """Do a visit of a run with privacy, and return the client's share of the round's sum."""
    from fedms.federated.client import Private, Share
    from fedms.federated.packing import pack_share
    from fedms.privacy.key_file import derive
    from fedms.privacy.secure_round import write_held
    from fedms.privacy.secure_sum import Promises
    from fedms.federated.private_client import contribute, join
    from fedms.storage.private_state import ClientFolder, State

    server = cast("PrivateServer", experiment.server)
    member = _member(identity, experiment.config) if experiment.config.privacy.masks else None
    with ClientFolder(identity.state, head["run"], identity.client, head["config"]) as folder:
        state, message = folder.load(head["kept"]), _message(head, parts, folder)
        session.model.meter.paid = set(state.paid_constants)
        vector, after, reason = contribute(server, experiment.method, session.model, experiment.client(identity.client),
                                           Private(state.tensors), message)
        if reason is not None:
            print(f"{message.stage}, round {message.round}: this client adds nothing: {reason}")      # into the node's own log
        share, salt = Share(identity.client, vector), ""
        if member is not None:
            salt = derive(member.secret, "state", message.stage, message.round).hex()
            share, held = join(server, member, message, vector)
            held.promises = Promises(folder.promises())
            folder.hold(*write_held(held), held.promises.kept)
        digest = folder.save(State(after.tensors, frozenset(session.model.meter.paid), salt), message.stage, message.round)
        if message.stage == "done":
            _keep_final(folder, identity, message, digest)
    packed = pack_share(share)
    return {"share": packed.head, "kept": digest}, packed.parts


def _add_up(head: dict[str, Any], parts: dict[str, bytes], identity: Identity) -> Answer:
    from fedms.federated.private_client import answer, charge
    from fedms.privacy.ledger import BudgetSpent
    from fedms.privacy.secure_round import Question, read_held, write_held
    from fedms.privacy.secure_sum import Promises
    from fedms.storage.private_state import ClientFolder

    with ClientFolder(identity.state, head["run"], identity.client) as folder:
        held = read_held(*folder.held(), Promises(folder.promises()))
        said = answer(Question(head["phase"], head["clients"], parts), replace(held.terms, attempt=head["attempt"]),
                      _member(identity, identity.own), held)
        if head["phase"] == "reveal":
            try:
                charge(identity.state, held, head["clients"])
            except BudgetSpent as spent:
                raise Disagreement(str(spent)) from None
        folder.hold(*write_held(held), held.promises.kept)
    return {}, said


def _member(identity: Identity, config: RunConfig | None) -> Member:
    """Return this client as a participant of secure sums.

    Raises:
        KeyFileError: If its key is missing.
    """
    from fedms.federated.private_client import member_of_run
    from fedms.privacy.key_file import read_key
    from fedms.privacy.member_file import read_member

    if identity.data is not None:
        return read_member(identity.data, identity.client)
    return member_of_run(read_key(Path(identity.own.privacy.key)), identity.client, config.clients.count)


def _evaluate(head: dict[str, Any], parts: dict[str, bytes], identity: Identity, open_experiment: Open) -> Answer:
    from fedms.data.subset import Subset
    from fedms.federated.client import Private
    from fedms.federated.evaluation import evaluate_client, own_accuracy
    from fedms.storage.private_state import ClientFolder

    config = _agreed(head["config"], identity)
    if config.privacy.mode != "off":
        raise Disagreement(f"an evaluation is asked for, but with privacy.mode = {config.privacy.mode!r} no client is evaluated by "
                           "itself")
    session, experiment = _opened(head, config, identity, open_experiment)
    with ClientFolder(identity.state, head["run"], identity.client, head["config"]) as folder:
        private, final = Private(folder.load(head["kept"]).tensors), _message(head, parts, folder)
        _keep_final(folder, identity, final, head["kept"])
    record = evaluate_client(experiment.method, session.model, experiment.client(identity.client), private, final)
    common = Subset(experiment.partition.global_test)
    return {"record": record, "on_common_test": own_accuracy(experiment.method, session.model, common, private, final)
            if head["on_common_test"] else None}, {}


def _keep_final(folder: ClientFolder, identity: Identity, final: Message, digest: str | None) -> None:
    """Let the client predict without the server from now on; a simulated client need not."""
    from fedms.storage.final import SharedTensors

    if identity.data is not None:
        folder.end(SharedTensors(final.stage, final.round, final.depth, final.applied_depth, final.tensors, final.constants,
                                 final.statistics), digest)


def _message(head: dict[str, Any], parts: dict[str, bytes], folder: ClientFolder) -> Message:
    """Return the message as it arrived, with the constants that were sent earlier."""
    from fedms.federated.packing import Packed, unpack_message

    digest = head["message"].get("constants")
    if digest is None and "constants" in parts:
        raise transport.MailError("constants without their hash")
    if digest is not None:
        if "constants" in parts:
            if hashlib.sha256(parts["constants"]).hexdigest() != digest:
                raise transport.MailError("constants with the hash of others")
            folder.keep_constants(parts["constants"])
        parts = {**parts, "constants": folder.constants(digest)}
    return unpack_message(Packed(head["message"], parts))


def _opened(head: dict[str, Any], config: RunConfig, identity: Identity, open_experiment: Open) -> tuple[LoadedTask, Experiment]:
    session, experiment = open_experiment(config, identity)
    if session.foundation.fingerprint != head["model"]:
        raise Disagreement(f"model.id {config.model.id}: the weights here are others than the server's")
    return session, experiment


def _answer(message: Mail, head: dict[str, Any], parts: dict[str, bytes] | None = None) -> Mail:
    return Mail(transport.write(head, transport.buffers(parts or {})), reply_to=message)
