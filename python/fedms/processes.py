"""What the worker processes of this package have in common. This module does not import torch, so an idle client stays small."""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from multiprocessing import parent_process


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
