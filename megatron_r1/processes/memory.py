"""Have glibc keep what is freed for what is allocated next, as a GPU's allocator does.

It would map large blocks anew each time, page by page zeroed: half a second per GB where the kernel
has pages at hand, three to four where a virtual machine asks its host for them.
"""

import contextlib
import ctypes

MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -3, -1, -2, -4
"""mallopt's names for them (malloc.h)."""


def keep_freed_memory(*, also_large: bool = False) -> None:
    """For this process and those forked from it; harmless where the C library is another one.

    also_large: blocks above 32 MiB too, the largest that glibc takes from its heap while it may map
    any. For engines, which make their largest ones, packed matrices, anew with every push; trainers
    have theirs for good, or for once."""
    settings = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 512 << 20, TOP_PAD: 64 << 20}
    if also_large:
        settings[MMAP_MAX] = 0
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in settings.items():
            mallopt(parameter, value)
