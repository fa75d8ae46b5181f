"""What processes that this package starts have in common. Imports no torch: an idle client is a small process."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process


def end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, killed or not, whatever is being done here then.

    To be called once in a process that `multiprocessing` started.
    """
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
