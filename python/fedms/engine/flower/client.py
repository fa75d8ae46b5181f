"""The client's side: what it does with a message. Who it is comes from its own node's configuration, never from the
server."""
from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Message as Mail

from fedms.engine.flower import mail

if TYPE_CHECKING:       # torch is imported when there is something to train
    from fedms.client import Message
    from fedms.config import RunConfig
    from fedms.engine.flower.folder import ClientFolder
    from fedms.session import Case, Session

FORMAT = 1


@dataclass(frozen=True)
class Identity:
    """client: its id. n_train: its number of training samples; None where the server knows. state: its own folder.
    data: its samples; None where the run file says where they are."""

    client: int
    n_train: int | None
    state: Path
    data: Path | None


Open = Callable[["RunConfig", "Path | None"], "tuple[Session, Case]"]


def hello(message: Mail, identity: Identity) -> Mail:
    """Says which client this is."""
    return _answer(message, {"client": identity.client, "n_train": identity.n_train})


def train(message: Mail, identity: Identity, open_case: Open) -> Mail:
    """A visit. Whatever goes wrong is told as a reason; the private state is then as it was."""
    return _guarded(message, identity, lambda head, parts: _visit(head, parts, identity, open_case))


def evaluate(message: Mail, identity: Identity, open_case: Open) -> Mail:
    """The client's line of `clients.jsonl`, with what it has in the end."""
    return _guarded(message, identity, lambda head, parts: _evaluate(head, parts, identity, open_case))


def _guarded(message: Mail, identity: Identity,
             act: Callable[[dict[str, Any], dict[str, bytes]], tuple[dict[str, Any], dict[str, bytes]]]) -> Mail:
    echo: dict[str, Any] = {"client": identity.client}
    try:
        head, parts = mail.read(message.content)
        echo.update({name: head[name] for name in ("run", "nonce")})
        if head["format"] != FORMAT:
            raise mail.MailError(f"messages of format {head['format']}, this client's are of format {FORMAT}; update fedms")
        answer, out = act(head, parts)
    except Exception as error:
        traceback.print_exc()       # into the node's own log; the server is told in a line
        return _answer(message, {**echo, "problem": f"{type(error).__name__}: {error}"[:1000]})
    return _answer(message, {**echo, **answer}, out)


def _visit(head: dict[str, Any], parts: dict[str, bytes], identity: Identity,
           open_case: Open) -> tuple[dict[str, Any], dict[str, bytes]]:
    from fedms.client import visit
    from fedms.config import config_from_dict
    from fedms.engine.flower.folder import ClientFolder, State
    from fedms.messages import pack_reply

    config = config_from_dict(head["config"])
    session, case = _opened(head, config, identity, open_case)
    client = case.client(identity.client)
    with ClientFolder(identity.state, head["run"], identity.client) as folder:
        state, message = folder.load(head["kept"]), _message(head, parts, folder)
        session.model.charged = set(state.charged)
        came, after = visit(case.method.client_step, session.model, client, state.private, message)
        digest = folder.save(State(after, frozenset(session.model.charged)), message.stage, message.round)
    answer = {"visit": {"reason": came.reason, "flops": came.flops, "seconds": came.seconds,
                        "peak_memory_bytes": came.peak_memory_bytes}, "kept": digest, "private": bool(after.tensors)}
    if came.reply is None:
        return answer, {}
    packed = pack_reply(came.reply, config.wire.dtype)
    return {**answer, "reply": packed.head}, packed.parts


def _evaluate(head: dict[str, Any], parts: dict[str, bytes], identity: Identity,
              open_case: Open) -> tuple[dict[str, Any], dict[str, bytes]]:
    from fedms.config import config_from_dict
    from fedms.engine.flower.folder import ClientFolder
    from fedms.evaluate import evaluate_client, own_accuracy
    from fedms.resident import Part

    session, case = _opened(head, config_from_dict(head["config"]), identity, open_case)
    with ClientFolder(identity.state, head["run"], identity.client) as folder:
        private, final = folder.load(head["kept"]).private, _message(head, parts, folder)
    record = evaluate_client(case.method, session.model, case.client(identity.client), private, final)
    common = Part(case.partition.global_test)
    return {"record": record, "on_common_test": own_accuracy(case.method, session.model, common, private, final)
            if head["on_common_test"] else None}, {}


def _message(head: dict[str, Any], parts: dict[str, bytes], folder: ClientFolder) -> Message:
    """The message as it arrived, with the constants that came before it."""
    from fedms.messages import Packed, unpack_message

    digest = head["message"].get("constants")
    if digest is not None:
        if "constants" in parts:
            folder.keep_constants(parts["constants"])
        parts = {**parts, "constants": folder.constants(digest)}
    return unpack_message(Packed(head["message"], parts))


def _opened(head: dict[str, Any], config: RunConfig, identity: Identity, open_case: Open) -> tuple[Session, Case]:
    session, case = open_case(config, identity.data)
    if session.foundation.fingerprint != head["model"]:
        raise ValueError(f"model.id {config.model.id}: the weights here are others than the server's")
    return session, case


def _answer(message: Mail, head: dict[str, Any], parts: dict[str, bytes] | None = None) -> Mail:
    return Mail(mail.write(head, mail.buffers(parts or {})), reply_to=message)
