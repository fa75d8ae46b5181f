"""What the C library does with memory that a training step frees: return it to the system, or keep it for the next step."""
from __future__ import annotations

import ctypes
import sys

# The function and its numbers are those of glibc's malloc.h.
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# The bounds between which glibc itself moves the size from which a block is mapped and unmapped by itself, and its bound of free
# memory at the end of the heap, in bytes.
_LARGEST_MMAP_THRESHOLD, _TRIM_THRESHOLD = 32 << 20, 128 << 10
# More than a step of any model that is trained on a CPU leaves at the end of the heap.
_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Let freed memory of the CPU stay with this process, from now on.

    A training step frees all that it made. glibc returns the end of its heap to the system then, and the next step meets a page fault
    at every 4 KiB that it gets again. With this call up to 1 GiB of free memory is kept. The process stays as large as its largest step
    was. Blocks of more than 32 MiB are returned as ever.

    `fedms.training.memory.hand_back_large_blocks` does the opposite.

    Returns:
        Whether it had an effect: it has with glibc alone, which Linux distributions other than Alpine use.
    """
    return _set(_LARGEST_MMAP_THRESHOLD, _KEPT)


def return_freed_memory(block: int) -> bool:
    """Return freed memory of the CPU to the system, from now on: each block of `block` bytes or more as soon as it is freed, and of
    smaller ones what lies free at the end of the heap.

    Returns:
        Whether it had an effect, see `keep_freed_memory`.
    """
    return _set(block, _TRIM_THRESHOLD)


def _set(mmap_threshold: int, trim_threshold: int) -> bool:
    # Each of the two ends glibc's own adjusting of both.
    return _mallopt is not None and all([_mallopt(_M_MMAP_THRESHOLD, mmap_threshold), _mallopt(_M_TRIM_THRESHOLD, trim_threshold)])
