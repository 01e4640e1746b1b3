"""Return of freed memory to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def release() -> None:
    """Hand freed memory back to the system where the C library (glibc) keeps it. With other libraries nothing happens.

    glibc raises the size from which it asks the system for every tensor anew to that of the tensors it has seen freed. A
    model's layers then come from one heap, which tensors of other sizes fragment. While the rounding of a transformer was
    learned block after block, resident memory grew to twice of what was in use. A call per block costs milliseconds.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no handle of the process
        return None
    return found
