"""Worker processes that visit clients in parallel, each with its own resident model and, if there are several, its own GPU.

A client is always visited by the same worker, which keeps the client's constants. Results are yielded in the order of the
clients, so a run does not depend on the number of workers.
"""
from __future__ import annotations

import multiprocessing
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from fedms.engines.visitor import Errand, Visitor
from fedms.errors import FedMSError, WorkerDied
from fedms.federated import encoding
from fedms.federated.client import Message, Private
from fedms.federated.packing import pack_message, unpack_message
from fedms.processes import begin_worker, spared_ctrl_c

_EXACT = "fp32"     # the encoding of float32 tensors that keeps all of their bits


class WorkerFailed(FedMSError):
    """A worker process failed with an error, which the message contains."""

    title = "a worker process failed"
    resumable = True


class Workers:
    """Does errands for clients in several processes; see :class:`fedms.engines.visitor.Visits`.

    The processes are spawned, not forked, because a fork would copy the threads of torch in an unknown state. They end when this
    process ends or is killed.

    Args:
        start: Called once in each process; returns its visitor. It must be importable by name.
        environments: Environment variables of each process: which GPU it sees.

    Attributes:
        paid: Names of the constants that clients have paid for.
    """

    def __init__(self, start: Callable[[], Visitor], environments: Sequence[Mapping[str, str]]) -> None:
        self._paid: set[str] = set()
        self._workers = [_Worker(f"worker {number} of {len(environments)}", start, environment)
                         for number, environment in enumerate(environments, start=1)]

    @property
    def paid(self) -> set[str]:
        """See :class:`fedms.engines.visitor.Visits`."""
        return self._paid

    @paid.setter
    def paid(self, names: set[str]) -> None:
        self._paid = set(names)
        for worker in self._workers:
            worker.queue.append(("paid", self._paid))

    def each(self, errand: Errand, message: Message, clients: Sequence[int], state: Callable[[int], Private],
             **further: Any) -> Iterator[tuple[Any, Private]]:
        """See :meth:`Visits.each`. Workers go on to their next clients while results wait to be taken.

        Raises:
            WorkerDied: If a process died.
            WorkerFailed: If one ended with an error.
        """
        packed = pack_message(message, _EXACT)
        for worker in {self._worker_of(client) for client in clients}:
            worker.queue.append(("message", packed))
        for client in clients:
            self._worker_of(client).queue.append(("do", (errand, client, _bytes_of(state(client)), further)))
        done: dict[int, tuple[Any, set[str], bytes]] = {}
        for client in clients:
            while client not in done:
                self._work(done)
            value, paid, after = done.pop(client)
            self._paid |= paid
            yield value, Private(encoding.unpack(after))

    def _worker_of(self, client: int) -> _Worker:
        return self._workers[client % len(self._workers)]

    def _work(self, done: dict[int, tuple[Any, set[str], bytes]]) -> None:
        """Give every idle worker its next task, wait until a worker has a result, and add it to `done`."""
        for worker in self._workers:
            worker.go_on()
        busy: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers if worker.busy}
        for connection in wait(list(busy)):
            result = busy[connection].result()
            if result is not None:
                client, *rest = result
                done[client] = tuple(rest)

    def close(self) -> None:
        """End all processes, including those in the middle of a visit."""
        for worker in self._workers:
            worker.end()


class _Worker:
    """The engine's side of a worker process.

    Attributes:
        queue: What to send next, as (kind, content).
        busy: Whether the process has yet to answer. Its first answer says that it has loaded its model.
    """

    def __init__(self, name: str, start: Callable[[], Visitor], environment: Mapping[str, str]) -> None:
        seen = environment.get("CUDA_VISIBLE_DEVICES")
        self.name = name if seen is None else f"{name} (GPU {seen})"
        self.queue: deque[tuple[str, Any]] = deque()
        self.busy, self._doing = True, "loading the model and the data"
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, start, dict(environment)), daemon=True)
        with spared_ctrl_c():
            self._process.start()
        there.close()       # so that the end of the process is the end of the connection

    def go_on(self) -> None:
        """Send from the queue until the worker is busy. Only a "do" makes it busy and is answered."""
        try:
            while self.queue and not self.busy:
                kind, content = self.queue.popleft()
                if kind == "do":
                    self.busy, self._doing = True, f"busy with client {content[1]}"
                self.connection.send((kind, content))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None

    def result(self) -> tuple[int, Any, set[str], bytes] | None:
        """Receive the worker's answer.

        Returns:
            The client, the result, the constants that were paid for, and the private state; or None once the model is loaded.

        Raises:
            WorkerDied, WorkerFailed: If there will be none.
        """
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        self.busy = False
        if kind == "failed":
            error, where = content
            raise WorkerFailed(f"{self.name}, {self._doing}: {error}") from _Elsewhere(where)
        return content

    def _died(self) -> WorkerDied:
        return WorkerDied(f"{self.name}, {self._doing}, was killed; if memory ran out, use fewer run.workers. The run goes on from "
                          "the last checkpoint, with any number of workers")

    def end(self) -> None:
        """End the process. An idle one ends when its connection is closed; a busy one is killed."""
        self.connection.close()
        if self.busy:
            self._process.kill()
        self._process.join()


class _Elsewhere(Exception):
    """The traceback of an error in a worker, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _serve(connection: Connection, start: Callable[[], Visitor], environment: Mapping[str, str]) -> None:
    """Load the model, then do what the engine sends until the connection ends. This is the main function of a worker."""
    begin_worker(environment)
    try:
        visitor = start()
        connection.send(("loaded", None))
        message = None
        while True:
            kind, content = connection.recv()
            if kind == "paid":
                visitor.paid = set(content)
            elif kind == "message":
                message = unpack_message(content)
            else:
                connection.send(("done", _done(visitor, message, *content)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return      # the engine has ended
    except Exception as error:
        text = str(error) if isinstance(error, FedMSError) else f"{type(error).__name__}: {error}"
        connection.send(("failed", (text, traceback.format_exc())))


def _done(visitor: Visitor, message: Message, errand: Errand, client: int, private: bytes,
          further: Mapping[str, Any]) -> tuple[int, Any, set[str], bytes]:
    before = set(visitor.paid)
    value, after = visitor.do(errand, message, client, Private(encoding.unpack(private)), **further)
    return client, value, visitor.paid - before, _bytes_of(after)


def _bytes_of(private: Private) -> bytes:
    return encoding.pack(private.tensors, _EXACT)
