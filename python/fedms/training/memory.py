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

# Bytes from which a block of memory is one of its own, which goes back to the system when it is freed. The system has to clear its
# pages when it is allocated again. PyTorch asks for pages of 2 MiB in the place of 4 KiB for tensors of 2 MiB or more, which makes that
# cheaper. Of `fedms run sentiment --set model.frozen=int8 --set stage1.rounds=2 --set stage2.rounds=1 --set run.threads=1` (Zen 4,
# glibc 2.36; user and system time, largest size of the process, once each):
#   1 MiB, pages of 4 KiB    73 s    917 MiB
#   128 KiB                  59 s    913 MiB
#   1 MiB                    58 s    916 MiB
#   4 MiB                    48 s    991 MiB
#   freed memory kept        41 s   1115 MiB    with FEDMS_KEEP_MEMORY=1
# Of the last six configurations of `tests/system/limited.py` three went beyond their plan's limit at 1 MiB, because smaller blocks were
# kept in pieces that did not fit later ones; one of them took 785 to 805 MiB, and takes the planned 755 at 128 KiB.
LARGE_BLOCK = 2**17

# Products of 16 bits are computed by oneDNN, which compiles a kernel for each shape; batches of texts have hundreds of shapes. oneDNN and
# PyTorch's interface to it, ideep, keep 1024 of them each, by default and until the process ends. One linear layer 384 -> 384 in bf16
# with 20 to 619 rows leaves 420 MiB so, and 57 MiB where 64 are kept. A bf16 run of MiniLM (`SMALL` of tests/system/limited.py, depth 6,
# micro-batches of 16, one thread; of which 709 MiB were planned, three interleaved runs) takes as long with 64 as with 1024, 22 s of a
# processor; with none kept it takes 53 s. On all samples (`fedms run sentiment --set run.dtype=bf16 --set stage1.rounds=1 --set
# stage2.rounds=1 --set run.threads=1`, two pairs on a machine in use) 64 cost 1.6 % more: 89 s in the place of 87.5, 840 MiB of 1373.
KERNELS_KEPT = 64


def hand_back_large_blocks() -> None:
    """Let the memory of tensors of `LARGE_BLOCK` bytes or more go back to the system as soon as they are freed, from now on.

    Otherwise glibc raises that bound to 32 MiB step by step and keeps freed memory in pieces that do not fit later tensors. The
    process then uses half as much memory again as all that it holds. Call this before a model is loaded.

    At most `KERNELS_KEPT` kernels for products of 16 bits are kept, unless `ONEDNN_PRIMITIVE_CACHE_CAPACITY` or `LRU_CACHE_CAPACITY` (of
    ideep) stands in the environment, or this process computed such a product before.

    Tensors of 2 MiB or more get large pages where the system has them (`transparent_hugepage` is `madvise` or `always`), unless
    `THP_MEM_ALLOC_ENABLE=0` stands in the environment, or this process made a tensor before: PyTorch reads the variable once.

    With `FEDMS_KEEP_MEMORY=1` in the environment freed memory is kept instead, see `fedms_ext.keep_freed_memory`.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for library in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(library, str(KERNELS_KEPT))
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
