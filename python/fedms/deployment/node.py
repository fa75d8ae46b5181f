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
from multiprocessing import active_children, get_context
from typing import Any

from flwr.app import Message as Mail

from fedms.config import ConfigError, RunConfig, config_from_dict
from fedms.deployment import DeploymentError
from fedms.deployment import policy as limits
from fedms.deployment.invitation import foreign_run_file, run_digest
from fedms.deployment.policy import Journal, Refusal
from fedms.deployment.state import JOURNAL, POLICY, PRIVATE, ClientState
from fedms.engines.flower import client as side
from fedms.engines.flower.connection import Connection, Lost, serve
from fedms.engines.flower.transport import release, release_of
from fedms.privacy.member_file import IDENTITIES
from fedms.processes import begin_worker, spared_ctrl_c
from fedms.storage.durable import FolderLock

AGAIN = 5.0             # seconds before a connection is tried again
IDLE = 300.0            # seconds after which a process that did the last visit is ended


@dataclass
class Node:
    """The node of a client.

    Attributes:
        state: The client's folder.
        tell: Called with each line for the client's owner.
        now: Returns the local time; tests replace it.
        device: The device that computes, a value of `run.device`. The server does not decide it.
    """

    state: ClientState
    tell: Callable[[str], None]
    now: Callable[[], datetime.datetime] = datetime.datetime.now
    device: str = "auto"

    def __post_init__(self) -> None:
        self.invitation = self.state.invitation
        self.worker = Worker()

    def run(self, stop: Callable[[], bool]) -> None:
        """Serve the client until `stop` returns True. Connect again whenever the connection is lost.

        Raises:
            DeploymentError: If another process serves this client, or the client has left.
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
        """Return the reply to a message. Errors become the content of the reply and are never raised."""
        self.worker.end_if_idle()
        if message.metadata.message_type == "query":
            return side.greet(message, self._identity_for)
        return side.guarded(message, self.state.about.number, self._obey)

    def _identity_for(self, told: int) -> side.Identity:
        """Return the client's identity under the number that the server's greeting gives. The first number is kept.

        Raises:
            Refusal: If the number is not the one from before.
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
        """Obey a message, if the owner's agreement and policy allow it.

        Raises:
            Refusal: If they do not; the message says which of them.
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
        """Answer a phase of a secure sum. It belongs to a visit that was allowed, so the policy is not checked again."""
        if not self.invitation.config.privacy.masks:
            raise Refusal("secure sums are not part of what this client's owner agreed to")
        answer, sent = self.worker.do("query.sum", head, parts, self._identity(number))
        Journal.read(self.state.folder / JOURNAL).add(0, sum(map(len, (*parts.values(), *sent.values()))), self.now())
        return answer, sent

    def _agreed(self, tables: dict[str, Any]) -> RunConfig:
        """Return the run file of a message, or raise Refusal if the owner has not agreed to it."""
        self._reread()
        if run_digest(tables) != self.invitation.run_sha256:
            try:
                foreign_run_file(tables, f"the server runs fedms {release_of(release())}")
            except (DeploymentError, ConfigError) as problem:
                self.tell(str(problem))
                raise Refusal(str(problem)) from None
            changed = self.state.offer(tables)
            self.tell("the server asks for another run file than you agreed to; look at it and accept it by `fedms client "
                      f"accept {self.state.folder}`: " + "; ".join(changed))
            raise Refusal("the run file is not the one that this client's owner agreed to; what differs: "
                          + ("; ".join(changed) or "nothing that this release knows"))
        return config_from_dict(tables)

    def _reread(self) -> None:
        """Read the invitation again, since another process may have accepted a new one."""
        self.invitation = self.state.invitation

    def _changed(self) -> bool:
        """Return whether the owner has left the federation, in another process."""
        return ClientState(self.state.folder).about.left


class Worker:
    """A process that carries out visits. It is started for the first visit, and again after it has died or was idle."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._used = 0.0

    def do(self, kind: str, head: dict[str, Any], parts: dict[str, bytes],
           identity: side.Identity) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return the answer to a message, or raise Refusal with the reason why there is none."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), begin_worker, ({},))
        try:
            with spared_ctrl_c():
                under_way = self._pool.submit(_work, kind, head, parts, identity)
            done = under_way.result()
        except BrokenProcessPool:
            self.end()
            raise Refusal("the process that did the visit died: killed, or out of memory") from None
        except KeyboardInterrupt:       # asked to stop a second time: the visit is not waited for
            for process in active_children():
                process.kill()
            raise
        finally:
            self._used = time.monotonic()
        if isinstance(done, str):
            raise Refusal(done)
        return done

    def end_if_idle(self) -> None:
        """End the process if its last visit was more than IDLE seconds ago."""
        if self._pool is not None and time.monotonic() - self._used > IDLE:
            self.end()

    def end(self) -> None:
        """End the process, if there is one."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _work(kind: str, head: dict[str, Any], parts: dict[str, bytes],
          identity: side.Identity) -> tuple[dict[str, Any], dict[str, bytes]] | str:
    """Return the answer or, as text, the reason why there is none, because not every error can be sent to another process."""
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
