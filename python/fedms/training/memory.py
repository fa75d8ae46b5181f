"""Memory of this process: returning it to the system, and measuring its present and its largest size."""
from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import psutil

from fedms_ext.freed_memory import keep_freed_memory, return_freed_memory

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)      # glibc alone has it
_PEAK = re.compile(rb"VmHWM:\s*(\d+) kB")

# Bytes from which a block of memory is one of its own, which goes back to the system when it is freed. Each page of such a block
# costs a page fault when it is allocated again, a tenth of the time of a step on a language model. At 8 MiB that is spared, but a run
# then exceeds its planned memory by more than the 5 % that a plan keeps in reserve.
LARGE_BLOCK = 2**20


def hand_back_large_blocks() -> None:
    """Let the memory of tensors of `LARGE_BLOCK` bytes or more go back to the system as soon as they are freed, from now on.

    Otherwise glibc raises that bound to 32 MiB step by step and keeps freed memory in pieces that do not fit later tensors. The
    process then uses half as much memory again as all that it holds. Call this before a model is loaded.

    With `FEDMS_KEEP_MEMORY=1` in the environment freed memory is kept instead, see `fedms_ext.keep_freed_memory`.
    """
    if os.environ.get("FEDMS_KEEP_MEMORY") == "1":
        keep_freed_memory()
    else:
        return_freed_memory(LARGE_BLOCK)


def reset_peak_memory() -> None:
    """Return free memory to the system and restart the measurement of `peak_memory`.

    Only Linux can reset the peak; elsewhere it is the peak since the start of the process.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory() -> int:
    """Return the largest resident size in bytes since the last reset."""
    try:
        with open("/proc/self/status", "rb", buffering=0) as status:     # at each visit: a third of the time of read_text
            return int(_PEAK.search(status.read())[1]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Return the present resident size in bytes."""
    return psutil.Process().memory_info().rss
