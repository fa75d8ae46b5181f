"""What the worker processes of this package have in common. This module does not import torch, so an idle client stays small."""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker


@contextmanager
def spared_ctrl_c() -> Iterator[None]:
    """Start worker processes within the context. Ctrl-C, which reaches the whole group of processes, then does not end them while they
    import what they need, before `begin_worker`. This process gets it at the end of the context."""
    resource_tracker.ensure_running()       # its start would end the blocking
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})      # processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(environment: Mapping[str, str]) -> None:
    """Make a process that `multiprocessing` has started a worker of its parent. Call it first in the process.

    Ctrl-C reaches the whole group of processes. A worker ignores it, because its parent alone decides when to stop. The worker
    ends with its parent.

    Args:
        environment: Environment variables to set, such as which GPU is visible. Torch must not have looked for GPUs yet.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    os.environ.update(environment)


def end_with_parent() -> None:
    """End this process as soon as its parent has ended or was killed, whatever this process is doing then.

    Call it once in a process that `multiprocessing` has started.
    """
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
