"""Deltas: bytes against plain equality, and both ends of a gloo pair over several pushes."""

import pytest
import torch
from one_receiver import (
    BY_TWO,
    SLOTS,
    TENSORS,
    WINDOWED,
    WINDOWED_BY_TWO,
    OneReceiver,
    expected_values,
)
from refusals import raised
from waiting import PATIENT

from megatron_r1.config.push import PushConfig
from megatron_r1.weight_sync.rendezvous.offers import ReceiverInfo
from megatron_r1.weight_sync.table import Delivery, Slot, SlotTable, slot_view
from megatron_r1.weight_sync.transports import buckets, delta, sender_class

LARGE = [Slot("large", 0, 512, 0, 256, 0, 1024, "float32")]


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 31, 32, 33, 4096, 4099])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_a_delta_turns_the_old_state_into_the_new_and_is_never_longer(size, share):
    draw = torch.Generator().manual_seed(size)
    old = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=draw)
    new = torch.where(torch.rand(size, generator=draw) < share, old ^ 129, old)
    encoded = delta.encode(new, old)
    state = old.clone()
    # Within a buffer it may begin at any byte.
    delta.patch(state, torch.cat([torch.zeros(1, dtype=torch.uint8), encoded])[1:])
    assert torch.equal(state, new)
    assert len(encoded) <= size


def test_a_delta_is_as_long_as_its_definition_says():
    """One bit for each block of 4 bytes, 4 bytes for each that differs, and what is left over."""
    old = torch.zeros(4 * 1000 + 3, dtype=torch.uint8)
    new = old.clone()
    new[[0, 1, 2, 3, 4, 3998, 4001]] = 1  # three blocks, and one byte of the rest
    assert len(delta.encode(new, old)) == 125 + 3 * 4 + 3


class Pair(OneReceiver):
    """A OneReceiver whose senders send deltas; areas: 2 as on a CPU, 1 as on a GPU."""

    def __init__(self, slots, deliveries, full_every, areas):
        self.full_every = full_every
        super().__init__("gloo", slots, deliveries, 1 << 19, areas)

    def push(self, number, tensors):
        """Send from `tensors`, check every slot, and return the bytes on the wire."""
        for name, values in tensors.items():
            TENSORS[name] = values
        for thread in self.send(number):
            thread.join()
        self.receiver.buffer.wait(number, 0, PATIENT)
        area = self.table.area(self.receiver.memory, number)
        for slot in self.table.slots:
            assert torch.equal(slot_view(area, slot), expected_values(slot)), (number, slot.name)
        return sum(end.num_bytes_sent for end in self.senders.values())


@pytest.fixture
def make_pair(monkeypatch):
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 1 << 16)  # several in a push
    for name in list(TENSORS):
        monkeypatch.setitem(TENSORS, name, TENSORS[name].clone())
    monkeypatch.setitem(TENSORS, "large", torch.randn(512, 256))
    pairs = []

    def make(slots=LARGE, deliveries=None, full_every=100, areas=1):
        halves = {0: [part(0, 0, 200)], 1: [part(0, 200, 512)]}
        pairs.append(Pair(slots, deliveries or halves, full_every, areas))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


def part(slot, top, bottom, right=256):
    return Delivery(slot, top, bottom, 0, right)


def trained(step):
    """`large` with one element in a hundred moved."""
    values = TENSORS["large"].clone()
    moved = torch.rand(values.shape, generator=torch.Generator().manual_seed(step)) < 0.01
    return {"large": torch.where(moved, values + 1, values)}


@pytest.mark.parametrize("areas", [1, 2])
def test_only_the_first_of_every_so_many_pushes_is_whole(make_pair, areas):
    pair, whole = make_pair(full_every=4, areas=areas), 512 * 256 * 4
    sent = [pair.push(number, trained(number)) for number in range(1, 10)]
    for number, num_bytes in enumerate(sent):
        if number % 4 == 0:
            assert num_bytes == whole
        else:  # the mask, 1% of the elements, give or take, and a length for each bucket
            assert whole / 32 + 0.008 * whole < num_bytes < whole / 32 + 0.013 * whole
    assert pair.push(10, {}) < whole / 31  # nothing has changed


def test_a_state_that_has_changed_altogether_is_sent_as_it_is(make_pair):
    pair = make_pair()
    first = pair.push(1, {})
    assert pair.push(2, {"large": torch.randn(512, 256)}) <= first + 8 * (first // (1 << 16) + 2)
    pair.push(3, trained(3))


@pytest.mark.parametrize("areas", [1, 2])
def test_slices_of_several_tensors_and_dtypes_and_memory_between_them(make_pair, areas):
    pair = make_pair(SLOTS, BY_TWO, areas=areas)
    for number in range(1, 6):
        changed = "weight" if number % 2 else "experts"
        values = TENSORS[changed].clone()
        values[number] += 1
        pair.push(number, {changed: values})


def test_a_memory_that_is_not_what_was_sent_is_found_and_named(make_pair):
    pair = make_pair()
    pair.push(1, {})
    slot_view(pair.table.area(pair.receiver.memory, 1), LARGE[0])[300, 17] += 1
    with raised(ValueError, "large", "rank 1"):
        pair.push(2, trained(2))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the sender's
def test_a_receiver_that_has_another_base_refuses_the_delta(make_pair):
    pair = make_pair()
    pair.push(1, {})
    pair.senders[0]._base = 7
    with raised(ValueError, "push 7", "push 1"):
        pair.push(2, {})


def test_after_a_push_that_broke_off_and_for_a_new_connection_all_is_sent(make_pair):
    pair, whole = make_pair(), 512 * 256 * 4
    pair.push(1, {})
    with pytest.raises(IndexError):
        pair.senders[0].send(2, 0, [])
    assert pair.senders[0]._base == 0
    again = make_pair()
    assert again.push(1, {}) == whole


def test_windows_are_refused():
    table = SlotTable(512, WINDOWED)
    end = sender_class("gloo")(None, 0, 0, ReceiverInfo(table), 50)
    with raised(ValueError, "push.delta", 4, "push.memory_gib"):
        end.plan(WINDOWED_BY_TWO[0])
    sender_class("gloo")(None, 0, 0, ReceiverInfo(table)).plan(WINDOWED_BY_TWO[0])


def test_deltas_within_one_host_are_refused():
    with raised(ValueError, "push.delta", "push.transport: shm"):
        PushConfig(delta=True)
    PushConfig(delta=True, transport="gloo")
