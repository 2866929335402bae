"""How this process asks for memory."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3  # of <malloc.h>
LARGE_BYTES = 2**20


def return_freed_tensors() -> None:
    """Let every freed tensor go back to the system at once.

    The C library keeps freed pieces of up to 32 MB for itself, among which what is still in use is strewn: a fifth of a
    quantization's peak. Elsewhere than under glibc, nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
