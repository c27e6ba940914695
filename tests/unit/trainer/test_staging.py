"""What of the optimizer's state a rank copies to the host, and what memory that takes."""

from functools import partial

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_r1.models import platform

platform.prepare_process()

from megatron_r1.trainer.checkpoints.staging import AddressRanges, StagingBuffers  # noqa: E402

MIB = 2**20


def entry(key: str, data: torch.Tensor, replica: int = 0) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, data, replica_id=replica)


def test_parts_are_what_two_sets_of_memory_have_in_common():
    memory = torch.arange(100.0)
    ranges = AddressRanges(
        [memory[10:20], memory[20:25], memory[40:50], memory[90:100], memory[3:3]]
    )
    assert ranges.num_bytes == 4 * (15 + 10 + 10)
    found = [memory[5:95][part] for part in ranges.overlaps(memory[5:95])]
    assert torch.cat(found).tolist() == [*range(10, 25), *range(40, 50), *range(90, 95)]
    assert list(ranges.overlaps(memory[25:40])) == [] == list(AddressRanges([]).overlaps(memory))
    assert ranges.contains(memory[12:22]) and ranges.contains(memory[25:25])
    assert not ranges.contains(memory[12:26]) and not ranges.contains(memory[0:12])


def test_a_rectangle_lies_between_its_first_and_its_last_number():
    memory = torch.arange(60.0)
    columns = memory.view(6, 10)[1:4, 2:5]
    (part,) = AddressRanges([columns]).overlaps(memory)
    assert memory[part].tolist() == list(range(12, 35))


def fill_with_7(tensor: torch.Tensor, wanted: AddressRanges) -> None:
    for part in wanted.overlaps(tensor):
        tensor[part].fill_(7)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_pages_that_nobody_writes_take_no_memory():
    memory, before = StagingBuffers(), resident_bytes()
    whole = memory.gathered_buffer("weights", 64 * MIB)  # 256 MiB
    memory.plan_gather("weights", partial(fill_with_7, whole))
    memory.gather({"mine": entry("optimizer.state.param.a", whole[MIB : 5 * MIB])})
    assert whole[MIB : 5 * MIB].eq(7).all() and memory.filled.num_bytes == 16 * MIB
    assert resident_bytes() - before < 64 * MIB
    assert memory.gathered_buffer("weights", 64 * MIB) is whole


def test_only_what_this_rank_writes_is_gathered_and_written():
    memory = StagingBuffers()
    whole = memory.gathered_buffer("weights", 100)
    memory.plan_gather("weights", partial(fill_with_7, whole))
    mine = entry("optimizer.state.param.a", whole[:40].view(4, 10))
    other = entry("optimizer.state.param.b", whole[40:], replica=1)
    weights = entry("weight", torch.ones(3))
    memory.gather({"nested": [mine, other], "model": weights})
    assert whole.tolist() == [7.0] * 40 + [0.0] * 60
    assert memory.copy(mine.data).eq(7).all() and memory.copy(weights.data).eq(1).all()
    with pytest.raises(AssertionError, match="gathered"):
        memory.copy(other.data)


def test_a_copy_that_was_made_before_the_state_is_there_is_an_error():
    memory = StagingBuffers()
    whole = memory.gathered_buffer("weights", 10)
    with pytest.raises(AssertionError, match=r"optimizer\.state\.exp_avg\.a"):
        memory.gather({"mine": entry("optimizer.state.exp_avg.a", whole.clone())})
