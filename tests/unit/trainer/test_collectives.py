"""The description of an asynchronous request; tests/parallel/test_rank_monitor.py has collectives
in which a rank is stuck."""

import inspect

import pytest
import torch
import torch.distributed as dist

from megatron_r1.trainer.rank_monitor import describe_collective


@pytest.fixture
def group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def reduced(tp_group, frames, more=None):
    """Wait for a request in the last line that runs, where the frame stays."""
    handle = dist.all_reduce(torch.ones(2), group=tp_group, async_op=True)
    frames.append(inspect.currentframe())
    return handle.wait()


def test_a_request_is_named_with_its_group_and_place(group):
    frames = []
    reduced(group, frames)
    line = inspect.getsourcelines(reduced)[1] + 4
    place = f"waited for by reduced (test_collectives.py:{line})"
    assert describe_collective(frames[0]) == f"a request among ranks 0, {place}"
    reduced(group, frames, more=dist.new_group([0]))
    assert describe_collective(frames[1]) == f"a request, {place}", (
        "either group may be the request's"
    )


def test_other_frames_wait_for_nothing(group):
    handle = dist.all_reduce(torch.ones(2), group=group, async_op=True)
    assert describe_collective(inspect.currentframe()) is None
    handle.wait()
