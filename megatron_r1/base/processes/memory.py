"""Have glibc keep freed memory for later allocations, as a GPU's allocator does.

It would map large blocks anew each time, page by page zeroed: half a second per GB where the kernel
has free pages, three to four where a virtual machine has to get them from its host."""

import contextlib
import ctypes

MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -3, -1, -2, -4
"""Parameters of mallopt (malloc.h)."""


def keep_freed_memory(*, also_large: bool = False) -> None:
    """Have this process, and processes forked from it, keep the memory that they free; do nothing
    with a C library other than glibc.

    also_large: also keep blocks above 32 MiB, the largest that glibc takes from its heap while it
        may map any. Engines need that, which allocate their largest blocks, packed matrices, with
        every push; trainers allocate their largest blocks once."""
    settings = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 512 << 20, TOP_PAD: 64 << 20}
    if also_large:
        settings[MMAP_MAX] = 0
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in settings.items():
            mallopt(parameter, value)
