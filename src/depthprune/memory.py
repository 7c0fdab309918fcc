"""The C library's allocator, told what this program does with memory."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, from glibc's malloc.h
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that were freed, so that the next batch does not fault every page in again.

    On a CPU each batch frees and takes tensors of up to hundreds of megabytes; with glibc's defaults each of them goes
    back to the kernel. Elsewhere than on Linux with glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # musl
    mallopt(_TRIM_THRESHOLD, _LARGEST)
    mallopt(_MMAP_THRESHOLD, _LARGEST)
