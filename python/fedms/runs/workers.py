"""Worker processes: pieces of work side by side, and the progress of all of them in one place."""
from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from fedms.errors import WorkerDied
from fedms.processes import begin_worker, spared_ctrl_c
from fedms.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item, Progress, Callable[[], bool]], Result]
"""Called with an item, where to report progress, and whether to stop."""


def in_processes(start: Callable[[], Work[Item, Result]], items: Sequence[Item], jobs: int, progress: Progress,
                 stop: Callable[[], bool], environments: Sequence[Mapping[str, str]] = ()) -> Generator[tuple[Item, Result], None, None]:
    """Do a piece of work for each item, `jobs` at a time, and yield each item with its result as soon as it is done.

    Processes are spawned, not forked: a fork would copy the threads of torch in an unknown state.

    Args:
        start: Called once in each process; returns the function that does the work, which may keep what items have in
            common. It must be importable by name.
        items: The items, plain enough to be pickled, as are the results.
        jobs: Number of processes.
        progress: Told of visits and notes of all processes.
        stop: Asked several times a second whether to stop. Then fewer items are yielded.
        environments: Environment variables of the processes, dealt out in turn: which GPU each sees.

    Raises:
        WorkerDied: If a process died.
        Exception: Whatever the work raises first. No further item is begun, and those under way are asked to stop.
        KeyboardInterrupt: The processes have then been killed, as they are when the generator is closed before its end.
    """
    context = multiprocessing.get_context("spawn")
    events, stopping, own = context.Queue(), context.Event(), context.Queue()
    count, others = min(jobs, len(items)), set(multiprocessing.active_children())
    for number in range(count):
        own.put(dict(environments[number % len(environments)]) if environments else {})
    with ProcessPoolExecutor(count, context, _Worker.begin, (start, events, stopping, own)) as pool:
        with spared_ctrl_c():
            futures: dict[Future, Item] = {pool.submit(_Worker.do, item): item for item in items}
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
            raise WorkerDied(f"one of {jobs} worker processes was killed; if memory ran out, use fewer --jobs. Runs that "
                             "have ended are kept, and the same command goes on with the others") from None
        except (KeyboardInterrupt, GeneratorExit):      # nothing that is under way is waited for
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise
        except BaseException:
            stopping.set()
            raise
        finally:
            for future in waiting:
                future.cancel()


class _Worker:
    """The state of a worker process, which an executor can hand from its initializer to its tasks by a global alone."""

    current: _Worker | None = None

    def __init__(self, work: Work[Any, Any], events: Any, stopping: Any) -> None:
        self.work, self.progress, self.stopping = work, _Sender(events), stopping

    @staticmethod
    def begin(start: Callable[[], Work[Any, Any]], events: Any, stopping: Any, own: Any) -> None:
        begin_worker(own.get())
        _Worker.current = _Worker(start(), events, stopping)

    @staticmethod
    def do(item: Any) -> Any:
        worker = _Worker.current
        assert worker is not None       # `begin` ran first in this process
        return worker.work(item, worker.progress, worker.stopping.is_set)


class _Sender(Progress):
    """Sends visits and notes to the parent process. Rounds of runs side by side would make no readable text."""

    def __init__(self, events: Any) -> None:
        self.events = events

    def visit(self, stage: str, round: int, client: int | None, **metrics: Any) -> None:
        self.events.put(("visit", (stage, round, client)))

    def note(self, text: str) -> None:
        self.events.put(("note", (text,)))


def _pass_on(events: Any, progress: Progress) -> None:
    """Report what the workers have sent so far."""
    while True:
        try:
            name, arguments = events.get_nowait()
        except queue.Empty:
            return
        getattr(progress, name)(*arguments)
