"""What the C library does with memory that a training step frees: return it to the system, or keep it for the next step."""
from __future__ import annotations

import ctypes
import sys

# The function and its numbers are those of glibc's malloc.h.
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# In bytes. glibc maps a block that is larger than a threshold by itself and unmaps it when it is freed; the first number is the
# largest value to which glibc raises that threshold. The second is how much free memory it leaves at the end of its heap by default.
_LARGEST_MMAP_THRESHOLD, _TRIM_THRESHOLD = 32 << 20, 128 << 10
# More than a step of any model that is trained on a CPU leaves at the end of the heap.
_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Let freed memory of the CPU stay with this process, from now on.

    A training step frees most of the memory that it took. glibc then returns the free end of its heap to the system, and the next
    step has a page fault for each 4 KiB that it takes again. After this call glibc keeps up to 1 GiB of free memory at the end of its
    heap, so the process stays about as large as its largest step made it. Blocks of more than 32 MiB are still returned to the system.

    `return_freed_memory` does the opposite.

    Returns:
        Whether the call had an effect. It has one only with glibc, the C library of most Linux distributions (Alpine has another).
    """
    return _set(_LARGEST_MMAP_THRESHOLD, _KEPT)


def return_freed_memory(block: int) -> bool:
    """Return freed memory of the CPU to the system, from now on.

    A block of at least `block` bytes is returned as soon as it is freed. Smaller blocks are returned when they are free at the end of
    the heap.

    Returns:
        Whether the call had an effect; see `keep_freed_memory`.
    """
    return _set(block, _TRIM_THRESHOLD)


def _set(mmap_threshold: int, trim_threshold: int) -> bool:
    if _mallopt is None:
        return False
    # As soon as one of the two is set, glibc stops adjusting both by itself. So both are set, even if the first call fails.
    return all([_mallopt(_M_MMAP_THRESHOLD, mmap_threshold), _mallopt(_M_TRIM_THRESHOLD, trim_threshold)])
