"""Serving a client: messages come from the server, the owner's policy says whether they are obeyed, and a process of its own
does the work, so that one which dies or grows too large costs a visit, and gives its memory back.

This process does not import torch: an idle client is a small one.
"""
from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from flwr.app import Message as Mail

from fedms.config import RunConfig, config_from_dict
from fedms.deployment import DeploymentError
from fedms.deployment import policy as limits
from fedms.deployment.policy import Journal, Refusal
from fedms.deployment.state import JOURNAL, POLICY, PRIVATE, ClientState
from fedms.engines.flower import client as side
from fedms.engines.flower.connection import Connection, Lost, serve
from fedms.deployment.invitation import run_digest
from fedms.privacy.member_file import IDENTITIES
from fedms.processes import end_with_parent
from fedms.storage.durable import FolderLock

AGAIN = 5.0             # seconds before a connection is tried again
IDLE = 300.0            # seconds after which a process that did the last visit is ended


@dataclass
class Node:
    """One client's node. `tell`: takes a line for its owner. `now`: local time, for tests. `device`: where it computes, a name as
    `run.device` takes it; the server has no say in it."""

    state: ClientState
    tell: Callable[[str], None]
    now: Callable[[], datetime.datetime] = datetime.datetime.now
    device: str = "auto"

    def __post_init__(self) -> None:
        self.invitation = self.state.invitation
        self.worker = Worker()

    def run(self, stop: Callable[[], bool]) -> None:
        """Serves until told to stop; a server that is away is tried again and again.

        Raises:
            DeploymentError: if another process serves this client, or it has left.
        """
        if self.state.about.left:
            raise DeploymentError(f"{self.state.folder}: this client has left; `fedms client join` makes another one")
        try:
            lock = FolderLock(self.state.folder)
        except BlockingIOError as error:
            raise DeploymentError(f"{self.state.folder}: {error}, which serves this client already") from None
        last = ""
        try:
            while not stop():
                try:
                    with Connection(self.invitation.address, self.invitation.authority.encode(), self.state.key()) as connection:
                        self.tell(f"connected to {self.invitation.address} as {self.state.about.name}")
                        last = ""
                        serve(connection, self.answer, lambda: stop() or self._changed())
                except Lost as lost:
                    if str(lost) != last:
                        last = str(lost)
                        self.tell(f"{last}; trying again")
                    _sleep(AGAIN, stop)
        finally:
            self.worker.end()
            lock.release()

    def answer(self, message: Mail) -> Mail:
        """The reply to a message. It never raises: what goes wrong is its content."""
        self.worker.end_if_idle()
        if message.metadata.message_type == "query":
            return side.greet(message, self._identity_for)
        return side.guarded(message, self.state.about.number, self._obey)

    def _identity_for(self, told: int) -> side.Identity:
        """Who this client is by the number that a greeting tells; the first one holds.

        Raises:
            Refusal: if it is another one than before.
        """
        known = self.state.about.number
        if known is None:
            self.state.change(number=told)
        elif known != told:
            raise Refusal(f"the server calls this client number {told}, before it was {known}; ask its operator")
        return self._identity(told)

    def _identity(self, number: int) -> side.Identity:
        return side.Identity(number, None, self.state.folder / PRIVATE, self.state.folder, self.invitation.config,
                             self.state.about.model, self.device)

    def _obey(self, kind: str, head: dict[str, Any], parts: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Does what a message says, if the owner's agreement and policy allow it.

        Raises:
            Refusal: saying what does not.
        """
        number = self.state.about.number
        if number is None:
            raise Refusal("the server has not said which number this client has")
        if kind == "query.sum":
            return self._add_up(head, parts, number)
        config = self._agreed(head["config"])
        if config.privacy.masks and not (self.state.folder / IDENTITIES).exists():
            raise Refusal("this client's owner has not agreed to a list of clients for secure sums yet: fedms client accept "
                          "--invitation FILE, with the invitation as it is after the last client was accepted")
        journal = Journal.read(self.state.folder / JOURNAL)
        try:
            limits.check(limits.read_policy(self.state.folder / POLICY), config, journal, self.state.folder, self.now())
        except (Refusal, DeploymentError) as problem:
            self.tell(str(problem))
            raise Refusal(str(problem)) from None
        where = f"{head['message']['stage']}, round {head['message']['round']}"
        self.tell(f"{'training' if kind == 'train' else 'evaluating'}: {where}")
        started = time.monotonic()
        answer, sent = self.worker.do(kind, head, parts, self._identity(number))
        moved = sum(map(len, parts.values())) + sum(map(len, sent.values()))
        journal.add(1, moved, self.now())
        self.tell(f"done: {where}, {time.monotonic() - started:.1f} s, {moved / 1e6:.2f} MB sent and received")
        if kind == "evaluate":
            self.tell(f"the run has ended; to predict on this machine: fedms export {self.state.folder} --out DIR")
        return answer, sent

    def _add_up(self, head: dict[str, Any], parts: dict[str, bytes], number: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        """A phase of a secure sum. It belongs to a visit that was allowed, so limits of time and load do not end it."""
        if not self.invitation.config.privacy.masks:
            raise Refusal("secure sums are not part of what this client's owner agreed to")
        answer, sent = self.worker.do("query.sum", head, parts, self._identity(number))
        Journal.read(self.state.folder / JOURNAL).add(0, sum(map(len, (*parts.values(), *sent.values()))), self.now())
        return answer, sent

    def _agreed(self, tables: dict[str, Any]) -> RunConfig:
        """The run file of a message, if it is the one that the owner has agreed to."""
        self._reread()
        if run_digest(tables) != self.invitation.run_sha256:
            changed = self.state.offer(tables)
            self.tell("the server asks for another run file than you agreed to; look at it and accept it by `fedms client "
                      f"accept {self.state.folder}`: " + "; ".join(changed))
            raise Refusal("the run file is not the one that this client's owner agreed to; what differs: "
                          + ("; ".join(changed) or "nothing that this release knows"))
        return config_from_dict(tables)

    def _reread(self) -> None:
        """What was accepted by another process meanwhile."""
        self.invitation = self.state.invitation

    def _changed(self) -> bool:
        """Whether the owner has left by another process."""
        return ClientState(self.state.folder).about.left


class Worker:
    """A process that visits the client's data. It is started when there is something to do, and started anew if it died."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._used = 0.0

    def do(self, kind: str, head: dict[str, Any], parts: dict[str, bytes],
           identity: side.Identity) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Raises Refusal with the reason why there is no answer."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), end_with_parent)
        try:
            done = self._pool.submit(_work, kind, head, parts, identity).result()
        except BrokenProcessPool:
            self.end()
            raise Refusal("the process that did the visit died: killed, or out of memory") from None
        finally:
            self._used = time.monotonic()
        if isinstance(done, str):
            raise Refusal(done)
        return done

    def end_if_idle(self) -> None:
        if self._pool is not None and time.monotonic() - self._used > IDLE:
            self.end()

    def end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _work(kind: str, head: dict[str, Any], parts: dict[str, bytes],
          identity: side.Identity) -> tuple[dict[str, Any], dict[str, bytes]] | str:
    """In the worker: the answer, or the reason why there is none; errors may not be ones that can be sent."""
    from fedms.runs.nodes import open_experiment

    try:
        return side.obey(kind, head, parts, identity, open_experiment)
    except Exception as error:
        if os.environ.get("FEDMS_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        return side.reason_of(error)


def _sleep(seconds: float, stop: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop():
        time.sleep(0.1)
