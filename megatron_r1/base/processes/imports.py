"""Imports with garbage collection off.

Large frameworks make millions of objects that stay; Python's collector walks them again and again.
On two cores `import vllm`'s server takes 4.4 instead of 8.1 seconds, the trainer's modules 2.6
instead of 5.8."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection inside the block, then freeze what was imported. Objects that
    exist at the end are excluded from collection for good (`gc.freeze`), which also saves forked
    children their copies of them."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
