"""Memory that is freed and wanted again at once: tensors of a few tens of MB, thousands of times a look."""

from __future__ import annotations

import contextlib
import ctypes

TRIM, MMAP_FROM = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""
KEPT_BYTES, LARGE_BYTES = 256 << 20, 64 << 20


def keep_freed_memory() -> None:
    """Let the C library keep freed memory of up to 256 MB for what is asked for next, pieces over 64 MB apart (glibc; elsewhere nothing).

    By default it returns every tensor over 32 MB to the system, whose pages are cleared for the next one: a look at a scan of
    256 voxels a side takes a tenth longer so.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_FROM, LARGE_BYTES)
        mallopt(TRIM, KEPT_BYTES)


def give_back_memory() -> None:
    """Return what was freed to the system: between looks nothing is kept, nor in between what is (glibc; elsewhere nothing)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
