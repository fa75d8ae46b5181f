"""Pieces of work in several processes, and the progress of all of them in one place."""
from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from fedms.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item, Progress, Callable[[], bool]], Result]


class WorkerDied(Exception):
    """A worker process ended without a word, as one does that the system kills for want of memory."""


def in_processes(work: Work[Item, Result], items: Sequence[Item], jobs: int, progress: Progress,
                 stop: Callable[[], bool]) -> Iterator[tuple[Item, Result]]:
    """`work(item, progress, stop)` for all items, `jobs` at a time, each pair as it is done; fewer if it is stopped.

    Processes are spawned, not forked: a fork would copy the threads of torch in an unknown state. `work` must be
    importable by name, items and results plain enough to be pickled.

    Raises:
        WorkerDied: if a process died.
        Whatever `work` raises first; no further item is begun, and those under way are asked to stop.
    """
    context = multiprocessing.get_context("spawn")
    events, stopping = context.Queue(), context.Event()
    with ProcessPoolExecutor(min(jobs, len(items)), context, _begin, (events, stopping)) as pool:
        futures: dict[Future, Item] = {pool.submit(_call, work, item): item for item in items}
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                _pass_on(events, progress)
                if stop() and not stopping.is_set():
                    stopping.set()
                    waiting -= {future for future in waiting if future.cancel()}
                for future in done:
                    yield futures[future], future.result()
        except BrokenProcessPool:
            if stop():      # the signal reached the workers too
                return
            raise WorkerDied(f"one of {jobs} processes died; if memory ran out, fewer --jobs help. What had ended is "
                             "kept: the same command goes on") from None
        finally:
            stopping.set()
            for future in waiting:
                future.cancel()


# In a worker

_worker: dict[str, Any] = {}


def _begin(events: Any, stopping: Any) -> None:
    # Ctrl-C reaches the whole group of processes; the parent alone decides, and tells by `stopping`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.update(events=events, stopping=stopping)


def _call(work: Work, item: Any) -> Any:
    return work(item, _Sender(_worker["events"]), _worker["stopping"].is_set)


class _Sender(Progress):
    """Tells the parent of visits and notes; rounds of runs side by side would make no readable text."""

    def __init__(self, events: Any) -> None:
        self.events = events

    def visit(self, stage: str, round: int, client: int, **metrics: Any) -> None:
        self.events.put(("visit", (stage, round, client)))

    def note(self, text: str) -> None:
        self.events.put(("note", (text,)))


def _pass_on(events: Any, progress: Progress) -> None:
    while True:
        try:
            name, arguments = events.get_nowait()
        except queue.Empty:
            return
        getattr(progress, name)(*arguments)
