"""How the process keeps its memory."""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_freed_memory"]

# Of malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST = 2**31 - 1
TOP_PAD = 2**26


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep freed memory for the next tensors, instead of returning it to the system.

    By default malloc returns a freed block of 32 MiB or more at once, and freed memory at the end of the heap. The
    system clears the pages that it hands out again, which can take longer than the operation that fills them. The
    process then keeps the most memory that it ever needed, until it ends. ``dgm`` calls this for its own processes.

    Returns:
        Whether malloc was told so: not without glibc, nor where the environment already configures malloc.

    Source: the manual page of mallopt.
    """
    configured = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if configured or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = {M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: LARGEST, M_TOP_PAD: TOP_PAD}
    return all(mallopt(option, value) for option, value in options.items())
