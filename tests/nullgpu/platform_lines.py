"""Calls every function of `megatron_r1.platform` on the null GPU, and prints the lines of it that
were not run."""

import inspect
import os
import sys
from pathlib import Path
from types import CodeType, FrameType

import torch

from megatron_r1 import platform
from megatron_r1.errors import UserError
from megatron_r1.processes import children

FILE = platform.__file__
run: set[int] = set()


def trace(frame: FrameType, event: str, argument: object):
    if frame.f_code.co_filename != FILE:
        return None
    if event == "line":
        run.add(frame.f_lineno)
    return trace


def lines(code: CodeType) -> set[int]:
    """Return the lines of a function's body, and of what is defined in it."""
    own = {
        line for _, _, line in code.co_lines() if line is not None and line > code.co_firstlineno
    }
    inner = [lines(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return own.union(*inner)


def call_everything() -> None:
    os.environ |= children.rank_variables(0, 1, children.free_port())
    assert platform.prepare(0) == platform.device() == torch.device("cuda", 0)
    assert platform.has_gpu() and platform.distributed_backend() == "nccl"
    platform.join_process_group()
    assert torch.distributed.get_backend() == "nccl"
    assert platform.from_rank_zero([1]) == [1]
    platform.silence_warnings()
    platform.synchronize()
    assert platform.empty_on_host((3,), torch.float32).is_pinned()
    state = platform.rng_state()
    assert state is not None
    torch.cuda.manual_seed(5)
    platform.set_rng_state(state)
    assert torch.equal(platform.rng_state(), state)
    assert platform.uses_transformer_engine()
    sys.modules["transformer_engine.pytorch"] = None  # as where it is not installed
    try:
        platform.uses_transformer_engine()
    except UserError as error:
        assert "Transformer Engine does not import" in str(error)
    else:
        raise AssertionError("a GPU without Transformer Engine has to be refused")


if __name__ == "__main__":
    sys.settrace(trace)
    call_everything()
    sys.settrace(None)
    torch.distributed.destroy_process_group()
    functions = [f for _, f in inspect.getmembers(platform, inspect.isfunction)]
    own = [f.__code__ for f in functions if f.__module__ == platform.__name__]
    missed = set().union(*map(lines, own)) - run
    source = Path(FILE).read_text().splitlines()
    print(f"{len(run)} lines run; not run:")
    print("\n".join(source[line - 1].strip() for line in sorted(missed)))
