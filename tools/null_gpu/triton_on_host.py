"""Triton's kernels by its interpreter on the null GPU, whose memory is the host's.

The copies to the CPU and back that the interpreter makes for a GPU are left out. The functions of
`triton.language` stay replaced; to replace them for every kernel and every function that it calls
takes longer than the kernels themselves. It wants TRITON_INTERPRET=1."""

import torch
import triton.language as tl
from host_compute import drain
from triton.runtime import interpreter


def install() -> None:
    """Give the interpreter's kernels the tensors as they are, and replace the language once."""

    def as_they_are(executor, args, kwargs):
        arguments = [getattr(arg, "base", arg) for arg in (*args, *kwargs.values())]
        drain({x.get_device() for x in arguments if isinstance(x, torch.Tensor) and x.is_cuda})
        return list(args), dict(kwargs)

    replace, replaced = interpreter._patch_lang, set()

    def replace_once(function):
        namespace = function.__globals__
        if id(namespace) not in replaced:
            replaced.add(id(namespace))
            replace(function)
        return interpreter._LangPatchScope()

    compute = interpreter.InterpreterBuilder.binary_op

    def compute_numbers(builder, left, right, op):  # not with the bits of bf16
        if left.dtype.scalar != tl.bfloat16 or op.__name__ not in ("add", "subtract", "multiply"):
            return compute(builder, left, right, op)
        wide = [builder.create_fp_to_fp(x, tl.float32, None) for x in (left, right)]
        return builder.create_fp_to_fp(compute(builder, *wide, op), tl.bfloat16, None)

    interpreter.InterpreterBuilder.binary_op = compute_numbers
    interpreter._patch_lang = replace_once
    interpreter.GridExecutor._init_args_hst = as_they_are
    interpreter.GridExecutor._restore_args_dev = lambda executor, *args: None
