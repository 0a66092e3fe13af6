"""Settings of glibc's malloc."""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_freed_memory"]

# Of malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD = 2**26


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep freed memory for the next tensors, instead of returning it to the system.

    By default malloc returns a freed block of 32 MiB or more at once, and freed memory at the end of the heap. The
    system clears the pages that it hands out again, which can take longer than the operation that fills them. The
    process then keeps what it has needed until it ends, with the holes between its tensors. ``dgm`` calls this for its
    own processes.

    Returns:
        Whether the settings took effect. False without glibc, or if the environment configures malloc.

    Source: the manual page of mallopt.
    """
    configured = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if configured or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_TOP_PAD, TOP_PAD)]
    return all(done)
