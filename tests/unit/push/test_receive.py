"""Both ends of each transport in one process, against plain slicing."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import xxhash
from one_receiver import (
    BY_TWO,
    SLOTS,
    TENSORS,
    OneReceiver,
    expected_values,
    slices,
)
from refusals import raised
from torch.distributed import TCPStore
from waiting import PATIENT, wait_until

from megatron_r1.engines.server.errors import EngineLacksPush
from megatron_r1.push.checksum import (
    MIXER,
    RowsWeightedSum,
    RunningChecksum,
    copy_with_checksum,
    tensor_checksum,
    weighted_sum,
)
from megatron_r1.push.control_messages import IncompletePush
from megatron_r1.push.protocol import ReceiverInfo
from megatron_r1.push.rendezvous import EngineRendezvous, TableStore, TrainerRendezvous
from megatron_r1.push.slots import SlotTable, TensorChunk, slot_view
from megatron_r1.push.transports import gloo, shared_memory
from megatron_r1.push.transports.received_chunks import check_coverage
from megatron_r1.push.transports.shared_memory import SharedMemoryFile, remove_stale_files

CHECKSUMS = sys.modules[weighted_sum.__module__]
TRANSPORTS = ("shm", "gloo")


@pytest.fixture
def make_world():
    worlds = []

    def make(*args):
        worlds.append(OneReceiver(*args))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("piece_bytes", [1 << 20, 40])
def test_an_engine_receives_the_slices_in_its_dtype(
    make_world, transport, piece_bytes, monkeypatch
):
    monkeypatch.setattr(gloo, "BUCKET_BYTES", piece_bytes)
    monkeypatch.setattr(CHECKSUMS, "CACHE_BYTES", piece_bytes)
    monkeypatch.setattr(CHECKSUMS, "PASS_BYTES", piece_bytes)
    world = make_world(transport, SLOTS, BY_TWO)
    for push in (1, 2):
        TENSORS["weight"].add_(1)
        threads = world.send(push)
        world.receiver.received_chunks.wait(push, PATIENT)
        for thread in threads:
            thread.join()
        for slot in SLOTS:
            assert torch.equal(slot_view(world.receiver.memory, slot), expected_values(slot)), (
                slot.name
            )
        # By the second push "weight" has changed; of the first nothing is known.
        assert world.receiver.received_chunks.pop_changed_slots() == ({1} if push == 2 else set())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_with_two_areas_a_push_leaves_the_one_before_as_it_is(make_world, transport):
    world = make_world(transport, SLOTS, BY_TWO, 2048, 2)
    pushed = {}
    for push in (1, 2, 3):
        TENSORS["weight"].add_(1)
        pushed[push] = [expected_values(slot).clone() for slot in SLOTS]
        threads = world.send(push)
        world.receiver.received_chunks.wait(push, PATIENT)
        for thread in threads:
            thread.join()
        for age in (0, 1) if push > 1 else (0,):
            buffer = world.table.buffer(world.receiver.memory, push - age)
            for slot, expected in zip(SLOTS, pushed[push - age], strict=True):
                assert torch.equal(slot_view(buffer, slot), expected), (push, age, slot.name)


def test_equal_engines_share_one_table():
    """A trainer rank reads it once for any number of engines."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    tables = TableStore(store)
    receivers = {}
    for name, slots in {"a.1": SLOTS, "b.1": SLOTS, "c.1": SLOTS[:2]}.items():
        for rank in range(2):
            info = ReceiverInfo(SlotTable(2048, slots), f"{name}/{rank}")
            EngineRendezvous(store, name, PATIENT).publish_receiver(rank, info)
        receivers[name] = TrainerRendezvous(store, name, PATIENT, tables=tables).read_receivers(2)
    assert [info.address for info in receivers["b.1"]] == ["b.1/0", "b.1/1"]
    assert len({id(info.table) for infos in receivers.values() for info in infos}) == 2
    assert [infos[1].table.slots for infos in receivers.values()] == [SLOTS, SLOTS, SLOTS[:2]]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_trainer_rank_that_sends_nothing_is_named(make_world, transport):
    world = make_world(transport, SLOTS, BY_TWO)
    world.send(1, senders=[0])[0].join()
    world.receiver.received_chunks.wait(1, PATIENT, sources=[0])
    with raised(IncompletePush, EngineLacksPush.KIND, "trainer ranks 1 "):
        world.receiver.received_chunks.wait(1, 0.1)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", ["experts", "wide"])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 12])  # of experts: all, and two rows
def test_a_tensor_that_arrives_otherwise_is_named(
    make_world, transport, chunk_bytes, name, monkeypatch
):
    monkeypatch.setattr(CHECKSUMS, "CACHE_BYTES", chunk_bytes)
    monkeypatch.setattr(CHECKSUMS, "PASS_BYTES", chunk_bytes)
    world = make_world(transport, SLOTS, BY_TWO)
    buffer, arrived = world.receiver.received_chunks, world.receiver.received_chunks.chunk_received

    def corrupted(sender, push, index, sent):
        chunk = buffer.chunks[sender][index]
        slot = SLOTS[chunk.slot]
        if (sender, slot.name) == (1, name):  # one bit of one element
            part = slot_view(world.receiver.memory, slot, chunk)
            part.view({4: torch.int32, 2: torch.int16}[part.itemsize])[-1, 1] ^= 1
        arrived(sender, push, index, sent)

    monkeypatch.setattr(world.receiver.received_chunks, "chunk_received", corrupted)
    world.send(1)
    with raised(ValueError, name, "rank 1"):
        world.receiver.received_chunks.wait(1, PATIENT)


def test_checksums_of_odd_rows_are_of_the_elements_in_order_whatever_the_strides():
    wide = torch.randn(300, 2000)
    part = wide[7:290, 3:1501]
    target = torch.zeros(283, 1600)[:, 50 : 50 + 1498]
    known = xxhash.xxh3_64_intdigest(part.contiguous().numpy().tobytes())
    assert tensor_checksum(part) == known
    assert copy_with_checksum(target, part) == known and torch.equal(target, part)
    assert copy_with_checksum(target.clone(), part.to(torch.bfloat16)) != known


def test_a_checksum_that_follows_arriving_rows_is_that_of_all(monkeypatch):
    monkeypatch.setattr(CHECKSUMS, "CACHE_BYTES", 3 * 4 * 50)
    part = torch.randn(283, 80)[:, 7:57]
    running, reports = RunningChecksum(part), []
    for row in (0, 1, 1, 40, 282):
        running.update_to(row)
    assert running.digest() == xxhash.xxh3_64_intdigest(part.contiguous().numpy().tobytes())
    assert copy_with_checksum(torch.zeros(283, 50), part, reports.append) == running.digest()
    assert reports == list(range(3, 283, 3))


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32"])
def test_weighted_sums_are_those_of_a_loop_and_change_with_every_error(dtype, monkeypatch):
    values = (torch.randn(37, 50) * 9).to(getattr(torch, dtype))[:, 3:44]
    bits = {"uint8": torch.int8, "bfloat16": torch.int16, "float32": torch.int32}[dtype]
    words = values.contiguous().view(bits).flatten().tolist()
    expected = sum(words) + MIXER * sum((2 * i + 1) * w for i, w in enumerate(words))
    for at_once in (1 << 22, 100):  # whole, and in runs of rows
        monkeypatch.setitem(weighted_sum.__globals__, "SUMMED_ELEMENTS", at_once)
        assert weighted_sum(values) == expected % 2**64
    in_parts = RowsWeightedSum()
    for rows in (slice(0, 5), slice(5, 6), slice(6, 37)):
        in_parts.update(values[rows])
    assert in_parts.digest() == expected % 2**64
    swapped, flipped = values.clone(), values.clone().contiguous()
    swapped[[4, 20]] = swapped[[20, 4]]
    flipped.view(bits)[11, 7] ^= 1
    assert len({weighted_sum(values), weighted_sum(swapped), weighted_sum(flipped)}) == 3


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({1: None}, "weight"),
        ({0: TensorChunk(0, 0, 4, 0, 1)}, "norm"),
        ({1: TensorChunk(1, 2, 5, 0, 8)}, "weight"),
        ({5: TensorChunk(2, 0, 6, 1, 4)}, "experts"),
    ],
    ids=["none", "too little", "rows twice", "columns twice"],
)
def test_a_plan_that_leaves_out_or_doubles_elements_is_refused(broken, named):
    every = dict(enumerate([*BY_TWO[0], *BY_TWO[1]]))
    check_coverage(SlotTable(2048, SLOTS), every.values())
    with raised(ValueError, named):
        check_coverage(SlotTable(2048, SLOTS), [d for d in (every | broken).values() if d])


@pytest.mark.more
def test_memory_of_a_process_that_was_killed_is_swept_away(monkeypatch):
    """And not that of one that lives: it is locked."""
    monkeypatch.setattr(shared_memory, "STALE_AGE_SECONDS", -1.0)
    paths = [
        shared_memory.SHM_FOLDER / f"{shared_memory.FILE_PREFIX}test.{os.getpid()}_{i}"
        for i in (0, 1)
    ]
    code = (
        "import sys, signal, pathlib\n"
        "from megatron_r1.push.transports.shared_memory import SharedMemoryFile\n"
        "held = SharedMemoryFile(pathlib.Path(sys.argv[1]), 4096)\n"
        "print('created', flush=True)\n"
        "signal.pause()"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, paths[0]], stdout=subprocess.PIPE)
    assert killed.stdout.readline() == b"created\n"
    own = SharedMemoryFile(paths[1], 4096)
    remove_stale_files()
    assert [path.exists() for path in paths] == [True, True]
    killed.kill()
    killed.communicate()
    remove_stale_files()
    assert [path.exists() for path in paths] == [False, True]
    own.close()
    assert not paths[1].exists()


def test_a_receiver_that_closes_while_it_connects_leaves_no_sender_waiting(make_world, monkeypatch):
    created, closed = gloo.pair_group, threading.Event()

    def pair_group(rendezvous, *arguments, is_sender):
        groups = created(rendezvous, *arguments, is_sender=is_sender)
        if not is_sender:
            closed.wait()
        return groups

    monkeypatch.setattr(gloo, "pair_group", pair_group)
    monkeypatch.setattr(gloo, "CLOSE_SECONDS", 0.0)
    whole = [TensorChunk(i, 0, s.height, 0, s.width) for i, s in enumerate(SLOTS)]
    world = make_world("gloo", SLOTS, {0: whole})
    world.receiver.close()
    closed.set()
    with pytest.raises(RuntimeError):
        world.senders[0].send(1, slices(world.table, whole))


def test_a_receiver_that_closes_before_its_first_call_leaves_no_sender_waiting(
    make_world, monkeypatch
):
    receive, closed = gloo.GlooReceiver._receive_pushes, threading.Event()

    def receive_pushes(end, *arguments):
        closed.wait()
        receive(end, *arguments)

    monkeypatch.setattr(gloo.GlooReceiver, "_receive_pushes", receive_pushes)
    monkeypatch.setattr(gloo, "CLOSE_SECONDS", 0.0)
    whole = [TensorChunk(i, 0, s.height, 0, s.width) for i, s in enumerate(SLOTS)]
    world = make_world("gloo", SLOTS, {0: whole})
    wait_until(lambda: world.receiver._groups)
    world.receiver.close()
    closed.set()
    with pytest.raises(RuntimeError):
        world.senders[0].send(1, slices(world.table, whole))


def test_a_sender_that_comes_too_late_leaves_nothing(tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(FileNotFoundError):
        shared_memory.map_file(gone, 64)
    assert not gone.exists()
