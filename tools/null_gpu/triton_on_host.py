"""Triton's kernels by its interpreter on the null GPU, whose memory is the host's: without the
copies to the CPU and back that the interpreter makes for a GPU. It wants TRITON_INTERPRET=1."""

import torch
from host_compute import drain
from triton.runtime import interpreter


def install() -> None:
    """Give the interpreter's kernels the tensors as they are."""

    def as_they_are(executor, args, kwargs):
        given = [getattr(arg, "base", arg) for arg in (*args, *kwargs.values())]
        drain({x.get_device() for x in given if isinstance(x, torch.Tensor) and x.is_cuda})
        return list(args), dict(kwargs)

    interpreter.GridExecutor._init_args_hst = as_they_are
    interpreter.GridExecutor._restore_args_dev = lambda executor, *args: None
