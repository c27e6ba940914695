"""Python imports this first in a process on the null GPU in which torch's operators compute from
the beginning, and in those that it starts: an engine, and tests that know nothing of it."""

import ctypes
import os

from host_compute import compute_everywhere


class NullRuntime(ctypes.CDLL):
    """vLLM calls some functions of the CUDA runtime by name, in the library that it finds loaded:
    the real one, whose place the preloaded one takes for linked calls only."""

    def __init__(self, name, *args, **kwargs):
        is_runtime = name is not None and "libcudart" in str(name)
        super().__init__(os.environ["LD_PRELOAD"] if is_runtime else name, *args, **kwargs)


ctypes.CDLL = NullRuntime
compute_everywhere()
