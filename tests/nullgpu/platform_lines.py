"""Prints the lines of `megatron_r1.models.platform` that no call on the null GPU has run.

Those of the ranks' network, which have no GPU's side, are left out."""

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from linecache import getline
from types import CodeType, FrameType
from unittest import mock

import torch

from megatron_r1.base.errors import UserError
from megatron_r1.base.processes import children
from megatron_r1.models import platform

NETWORK = {"ranks_share_host", "trainer_store", "create_store", "_create_listener"}
run: set[tuple[str, int]] = set()


def trace(frame: FrameType, event: str, argument: object):
    if frame.f_code.co_filename != platform.__file__ or frame.f_code.co_name in NETWORK:
        return None
    if event == "line":
        run.add((frame.f_code.co_filename, frame.f_lineno))
    return trace


def lines(code: CodeType) -> set[tuple[str, int]]:
    """Return the lines of a function's body, and of what is defined in it."""
    numbers = {line for _, _, line in code.co_lines() if line is not None}
    own = {(code.co_filename, line) for line in numbers if line > code.co_firstlineno}
    inner = [lines(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return own.union(*inner)


def refused(call: Callable[[], object], message: str) -> None:
    try:
        call()
    except UserError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"it was not refused: {message}")


def call_everything() -> None:
    os.environ |= children.rank_variables(0, 1, children.free_port())
    assert platform.prepare_process(0) == platform.device() == torch.device("cuda", 0)
    assert platform.has_gpu() and platform.distributed_backend() == "nccl"
    platform.join_process_group()
    assert torch.distributed.get_backend() == "nccl"
    assert platform.broadcast_from_rank_zero([1]) == [1]
    platform.silence_warnings()
    platform.synchronize()
    assert platform.empty_in_host_memory((3,), torch.float32).is_pinned()
    os.environ["NULL_GPU_PINNED_BYTES"] = str(31 * 2**30)
    refused(lambda: platform.empty_in_host_memory((21 * 2**30,), torch.uint8), "takes 32 GiB")
    with mock.patch.object(torch, "empty", side_effect=RuntimeError("another")):
        try:
            platform.empty_in_host_memory((3,), torch.float32)
        except RuntimeError as error:
            assert str(error) == "another"
    moved = platform.to_device(torch.ones(3), platform.device())
    assert moved.is_cuda and moved.tolist() == [1.0] * 3
    state = platform.rng_state()
    assert state is not None
    torch.cuda.manual_seed(5)
    platform.set_rng_state(state)
    assert torch.equal(platform.rng_state(), state)
    assert platform.uses_transformer_engine()
    sys.modules["transformer_engine.pytorch"] = None  # as where it is not installed
    refused(platform.uses_transformer_engine, "Transformer Engine does not import")
    with mock.patch.object(metadata, "version", return_value="0.1"):
        refused(platform.prepare_process, "megatron-core 0.1 is installed")
        with warnings.catch_warnings(record=True, action="always") as caught:
            platform.warn_of_transformer_engine()
        assert "transformer-engine 0.1 is installed" in str(caught[0].message)
    with mock.patch.object(metadata, "version", side_effect=metadata.PackageNotFoundError):
        platform.warn_of_transformer_engine()


if __name__ == "__main__":
    sys.settrace(trace)
    call_everything()
    sys.settrace(None)
    torch.distributed.destroy_process_group()
    functions = {f for name, f in inspect.getmembers(platform, inspect.isfunction)}
    own = {f.__code__ for f in functions if f.__code__.co_filename == platform.__file__}
    own = {code for code in own if code.co_name not in NETWORK}
    missed = set().union(*map(lines, own)) - run
    print(f"{len(run)} lines run; not run:")
    print("\n".join(getline(*line).strip() for line in sorted(missed)))
