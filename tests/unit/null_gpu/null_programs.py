"""Programs that the tests run on the null GPU: `null_programs.py NAME ARGUMENT…` runs that
function. Each prints lines of JSON; `wait()` waits for a line from the test."""

import ctypes
import json
import os
import sys

from null_cuda import (
    BYTE,
    DEFAULT,
    FLOAT,
    NON_BLOCKING,
    SUM,
    Gate,
    UniqueId,
    as_floats,
    asynchronous_error,
    call,
    communicator,
    content,
    copy,
    device_memory,
    done,
    fill,
    floats,
    in_background,
    is_ready,
    library,
    made,
    pinned,
    receive,
    send,
    stream,
)


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


def wait() -> None:
    sys.stdin.readline()


# Streams


def order_in_a_stream() -> None:
    """Two fills and a copy, held up."""
    on = stream(NON_BLOCKING)
    memory, result = device_memory(b"abcd"), pinned(b"----")
    gate = Gate(on)
    gate.is_reached.wait()
    fill(memory, ord("x"), 4, on)
    fill(memory, ord("y"), 2, on)
    copy(result, memory, 4, on)
    call("null_gpu_launch", on)
    held_up = [content(memory, 4).decode(), content(result, 4).decode(), is_ready(on)]
    gate.open()
    done("cudaStreamSynchronize", on)
    say([held_up, [content(memory, 4).decode(), content(result, 4).decode(), is_ready(on)]])


def two_streams() -> None:
    """A stream that is held up, and one that does not wait for it but by an event."""
    first, second = stream(NON_BLOCKING), stream(NON_BLOCKING)
    memory, event = device_memory(b"ab"), made("cudaEventCreate")
    unrecorded = call("cudaEventQuery", event)
    gate = Gate(first)
    fill(memory, ord("x"), 1, first)
    done("cudaEventRecord", event, first)
    fill(memory + 1, ord("y"), 1, second)
    done("cudaStreamSynchronize", second)
    independent = [content(memory, 2).decode(), is_ready(first)]
    done("cudaStreamWaitEvent", second, event, 0)
    copy(memory + 1, memory, 1, second)
    queried = [unrecorded, call("cudaEventQuery", event), is_ready(second)]
    gate.open()
    done("cudaStreamSynchronize", second)
    milliseconds = ctypes.c_float()
    done("cudaEventElapsedTime", ctypes.byref(milliseconds), event, event)
    say([independent, queried, content(memory, 2).decode(), milliseconds.value])


def an_event_is_waited_for_as_it_was_recorded() -> None:
    """A later record of the same event is not waited for."""
    first, second = stream(NON_BLOCKING), stream(NON_BLOCKING)
    event = made("cudaEventCreate")
    done("cudaEventRecord", event, first)
    done("cudaStreamWaitEvent", second, event, 0)
    gate = Gate(first)
    done("cudaEventRecord", event, first)
    done("cudaStreamSynchronize", second)
    say(call("cudaEventQuery", event))
    gate.open()
    done("cudaEventSynchronize", event)
    say(call("cudaEventQuery", event))


def default_stream() -> None:
    """A blocking stream is held up, the default stream waits for it, the next one for both."""
    blocking, other, exempt = stream(), stream(), stream(NON_BLOCKING)
    memory = device_memory(b"abcd")
    gate = Gate(blocking)
    fill(memory, ord("w"), 1, other)
    fill(memory + 1, ord("x"), 1, exempt)
    done("cudaStreamSynchronize", other)
    done("cudaStreamSynchronize", exempt)
    fill(memory + 2, ord("y"), 1, DEFAULT)
    fill(memory + 3, ord("z"), 1, other)
    fill(memory + 1, ord("v"), 1, exempt)
    done("cudaStreamSynchronize", exempt)
    held_up = [content(memory, 4).decode(), is_ready(DEFAULT), is_ready(other), is_ready(exempt)]
    gate.open()
    done("cudaStreamSynchronize", other)
    say([held_up, content(memory, 4).decode()])


def hardware_queues() -> None:
    """A stream that runs, then also has something waiting; another stream's work at either time."""
    first, second = stream(NON_BLOCKING), stream(NON_BLOCKING)
    memory = device_memory(b"ab")
    gate = Gate(first)
    gate.is_reached.wait()
    fill(memory, ord("x"), 1, second)
    done("cudaStreamSynchronize", second)
    fill(memory, ord("y"), 1, first)
    fill(memory + 1, ord("z"), 1, second)
    if os.environ["NULL_GPU_QUEUES"] == "0":
        done("cudaStreamSynchronize", second)
    say("queued")
    wait()
    say([content(memory, 2).decode(), is_ready(second)])
    gate.open()
    done("cudaDeviceSynchronize")
    say(content(memory, 2).decode())


def waits_of_the_host(kind: str) -> None:
    """A thread waits for what is held up; the test looks at it, then it goes on."""
    on, event = stream(NON_BLOCKING), made("cudaEventCreate")
    memory, pageable = device_memory(b"a" * 100_000), ctypes.create_string_buffer(100_000)
    gate = Gate(on)
    fill(memory, ord("b"), 100_000, on)
    done("cudaEventRecord", event, on)
    wait_for = {
        "stream": lambda: done("cudaStreamSynchronize", on),
        "device": lambda: done("cudaDeviceSynchronize"),
        "event": lambda: done("cudaEventSynchronize", event),
        "free": lambda: done("cudaFree", made("cudaMalloc", 1)),
        "operator": lambda: done("null_gpu_drain", 0, on),
        "copy": lambda: copy(ctypes.addressof(pageable), memory, 100_000, on),
    }
    thread = in_background(wait_for[kind])
    say("waits")
    wait()
    say([thread.is_alive(), content(memory, 1).decode()])
    gate.open()
    thread.join()
    say([content(memory, 1).decode(), pageable.raw[:1].decode()])


def pageable_sources() -> None:
    """A small copy from pageable memory takes it along, one from pinned memory does not."""
    on = stream(NON_BLOCKING)
    memory, small = device_memory(b"----"), ctypes.create_string_buffer(b"ab")
    source = pinned(b"cd")
    gate = Gate(on)
    copy(memory, ctypes.addressof(small), 2, on)
    copy(memory + 2, source, 2, on)
    ctypes.memmove(small, b"xx", 2)
    ctypes.memmove(source, b"yy", 2)
    gate.open()
    done("cudaStreamSynchronize", on)
    say(content(memory, 4).decode())


# NCCL


def one_way(rank: str, *buffered: str) -> None:
    """Rank 0 sends as often as the argument says, before rank 1 receives."""
    done("cudaSetDevice", int(rank))
    comm, on = communicator("one way", 2, int(rank)), stream(NON_BLOCKING)
    memory = device_memory(b"0123" if rank == "0" else b"----")
    if rank == "0":
        for number in range(int(buffered[0])):
            send(memory + number, 1, 1, comm, on)
            event = made("cudaEventCreate")
            done("cudaEventRecord", event, on)
            if number < int(buffered[1]):
                done("cudaEventSynchronize", event)
        say(is_ready(on))
        wait()
        say(is_ready(on))
    else:
        wait()
        for number in range(int(buffered[0])):
            receive(memory + number, 1, 0, comm, on)
    done("cudaStreamSynchronize", on)
    say(content(memory, 4).decode())
    done("ncclCommDestroy", comm)


ORDERS = {
    # Trainers 0 and 1, engines 2 and 3: who sends to whom, as each issues its calls.
    "crossed": {0: (2, 3), 1: (3, 2), 2: (1, 0), 3: (0, 1)},
    "common": {0: (2, 3), 1: (2, 3), 2: (0, 1), 3: (0, 1)},
}


def four_links(order: str, rank: str) -> None:
    """Two trainer ranks send to two engine ranks, over a communicator for each link, all on the
    default stream."""
    own = int(rank)
    done("cudaSetDevice", own)
    links = {}
    for trainer, engine in ((0, 2), (0, 3), (1, 2), (1, 3)):
        if own in (trainer, engine):
            name = f"{trainer}-{engine}"
            links[engine if own == trainer else trainer] = communicator(name, 2, own > 1)
    memory = device_memory(rank.encode() * 2)
    for place, peer in enumerate(ORDERS[order][own]):
        if own < 2:
            send(memory, 1, 1, links[peer], DEFAULT)
        else:
            receive(memory + place, 1, 0, links[peer], DEFAULT)
    say("issued")
    wait()
    ready = is_ready(DEFAULT)
    say(ready)
    wait()
    if not ready:
        for peer in reversed(ORDERS[order][own]):  # the other order would let the second call run
            done("ncclCommAbort", links[peer])
    done("cudaDeviceSynchronize")
    say(content(memory, 2).decode())


def ranks_of_a_push(enqueued: str) -> None:
    """Processes of a push as threads, each with a GPU of its own.

    Each enqueues its steps on the default stream: `[[is send, peer, bucket] that start], [those
    that are waited for]`. As torch does, a link has a communicator and a stream of its own, which
    waits for what the default stream has had until the call; several calls that start together are
    a group. Says when all have enqueued, and, after each line, which have ended."""
    steps = {int(rank): of_rank for rank, of_rank in json.loads(enqueued).items()}
    are_ready = {}
    threads = [in_background(_rank_of_a_push, *each, are_ready) for each in steps.items()]
    for thread in threads:
        thread.join()
    say("enqueued")
    while sys.stdin.readline():
        say([are_ready[rank]() for rank in steps])


def _rank_of_a_push(rank: int, steps: list, are_ready: dict) -> None:
    done("cudaSetDevice", rank)
    links = {(sends, peer) for starts, _ in steps for sends, peer, _ in starts}
    own = {}
    for sends, peer in sorted(links, key=lambda link: _link(rank, *link)):  # all in one order
        sender, receiver = _link(rank, sends, peer)
        own[sends, peer] = communicator(f"{sender}-{receiver}", 2, not sends), stream(NON_BLOCKING)
    memory, events = device_memory(b"-"), {}
    for starts, waits in steps:
        here = made("cudaEventCreate")
        done("cudaEventRecord", here, DEFAULT)
        done("ncclGroupStart")
        for sends, peer, _ in starts:
            comm, on = own[sends, peer]
            done("cudaStreamWaitEvent", on, here, 0)
            (send if sends else receive)(memory, 1, int(sends), comm, on)
        done("ncclGroupEnd")
        for call_ in starts:
            event = events[tuple(call_)] = made("cudaEventCreate")
            done("cudaEventRecord", event, own[call_[0], call_[1]][1])
        for call_ in waits:
            done("cudaStreamWaitEvent", DEFAULT, events[tuple(call_)], 0)
    last = made("cudaEventCreate")
    done("cudaEventRecord", last, DEFAULT)
    are_ready[rank] = lambda: call("cudaEventQuery", last) == 0


def _link(rank: int, sends: bool, peer: int) -> tuple[int, int]:
    return (rank, peer) if sends else (peer, rank)


def both_ways(rank: str, is_grouped: str) -> None:
    """Two ranks send to each other and receive from each other."""
    own = int(rank)
    done("cudaSetDevice", own)
    comm, on = communicator("both ways", 2, own), stream(NON_BLOCKING)
    source, target = device_memory(rank.encode()), device_memory(b"-")
    if is_grouped == "grouped":
        done("ncclGroupStart")
    send(source, 1, 1 - own, comm, on)
    receive(target, 1, 1 - own, comm, on)
    if is_grouped == "grouped":
        done("ncclGroupEnd")
    say("issued")
    wait()
    done("cudaStreamSynchronize", on)
    say(content(target, 1).decode())


def order_of_a_communicator(rank: str) -> None:
    """Rank 0 sends twice on two streams, of which the first is held up."""
    done("cudaSetDevice", int(rank))
    comm = communicator("order", 2, int(rank))
    first, second = stream(NON_BLOCKING), stream(NON_BLOCKING)
    memory = device_memory(b"ab" if rank == "0" else b"--")
    if rank == "0":
        gate = Gate(first)
        send(memory, 1, 1, comm, first)
        send(memory + 1, 1, 1, comm, second)
        say("issued")
        wait()
        say([is_ready(first), is_ready(second)])
        gate.open()
    else:
        receive(memory, 1, 0, comm, first)
        receive(memory + 1, 1, 0, comm, second)
        say("issued")
    done("cudaStreamSynchronize", second)
    say(content(memory, 2).decode())


def abort(rank: str, how: str) -> None:
    """Rank 0 sends to a rank that never receives, and aborts; or that one is killed first."""
    done("cudaSetDevice", int(rank))
    comm, on = communicator("abort", 2, int(rank)), stream(NON_BLOCKING)
    memory = device_memory(b"ab")
    if rank == "1":
        say("joined")
        wait()
        return
    send(memory, 1, 1, comm, on)
    fill(memory + 1, ord("x"), 1, on)
    thread = in_background(lambda: done("cudaStreamSynchronize", on))
    say("issued")
    wait()
    while how == "reported" and not asynchronous_error(comm):
        pass
    say([is_ready(on), thread.is_alive(), asynchronous_error(comm)])
    done("ncclCommAbort", comm)
    thread.join()
    say([is_ready(on), content(memory, 2).decode()])


def circle_of_events(rank: str) -> None:
    """Each rank sends on a stream that waits for an event behind a receive on another one."""
    own = int(rank)
    done("cudaSetDevice", own)
    comms = [communicator(f"events {number}", 2, own) for number in range(2)]
    first, second, event = stream(NON_BLOCKING), stream(NON_BLOCKING), made("cudaEventCreate")
    memory = device_memory(b"ab")
    receive(memory, 1, 1 - own, comms[own], first)
    done("cudaEventRecord", event, first)
    done("cudaStreamWaitEvent", second, event, 0)
    send(memory, 1, 1 - own, comms[1 - own], second)
    say("issued")
    wait()


def circle_of_hosts(rank: str) -> None:
    """Each rank sends, waits for that on the host, and would receive then."""
    own = int(rank)
    done("cudaSetDevice", own)
    comm, on = communicator("hosts", 2, own), stream(NON_BLOCKING)
    memory = device_memory(b"ab")
    send(memory, 1, 1 - own, comm, on)
    done("cudaStreamSynchronize", on)
    receive(memory, 1, 1 - own, comm, on)


def create_without_blocking() -> None:
    """Begin to make a communicator whose other rank does not come, and abort that."""
    config = (ctypes.c_uint * 6)(24, 0, 0xCAFEBEEF, 21400)  # size, magic, version; not `blocking`
    handle, name = ctypes.c_size_t(), UniqueId(b"alone")
    begun = call("ncclCommInitRankConfig", ctypes.byref(handle), 2, name, 0, config)
    comm, memory = handle.value, device_memory(b"a")
    issued = call("ncclSend", memory, 1, BYTE, 1, comm, stream())
    say([begun, asynchronous_error(comm), issued])
    wait()
    done("ncclCommAbort", comm)
    say("aborted")
    wait()


def create(size: str, rank: str, gpu: str) -> None:
    """Join a communicator; say when all have come, or the error."""
    done("cudaSetDevice", int(gpu))
    say("begins")
    handle, name = ctypes.c_size_t(), UniqueId(b"create")
    say(call("ncclCommInitRank", ctypes.byref(handle), int(size), name, int(rank)))


def configured(*configurations: str) -> None:
    """A communicator of this rank alone by each, with a call of the first, and halves of it."""
    results, comm = [], ctypes.c_size_t()
    for number, config in enumerate(configurations):
        identifier, made_one = UniqueId(b"%d" % number), ctypes.c_size_t()
        arguments = (ctypes.byref(made_one), 1, identifier, 0, bytes.fromhex(config))
        results.append(call("ncclCommInitRankConfig", *arguments))
        comm = comm or made_one
    memory = device_memory(b"ab")
    done("ncclAllReduce", memory, memory, 2, BYTE, SUM, comm, stream())
    done("ncclCommSplit", comm, 0, 0, ctypes.byref(ctypes.c_size_t()), None)
    say(results)


def collectives(rank: str, size: str) -> None:
    """The collectives of three ranks."""
    own, ranks = int(rank), int(size)
    done("cudaSetDevice", own)
    comm, on = communicator("collectives", ranks, own), stream(NON_BLOCKING)
    source, target = device_memory(floats([own, own + 0.5])), device_memory(floats([9] * 8))
    reduced, root = [], device_memory(floats([own]))
    for operation in range(5):
        done("ncclAllReduce", source, target, 2, FLOAT, operation, comm, on)
        done("cudaStreamSynchronize", on)
        reduced.append(as_floats(target, 2))
    done("ncclGroupStart")
    grouped = device_memory(floats([own, own, own]))
    done("ncclAllReduce", grouped, grouped, 1, FLOAT, SUM, comm, on)
    done("ncclAllReduce", grouped + 4, grouped + 4, 2, FLOAT, SUM, comm, on)
    done("ncclGroupEnd")
    done("ncclAllGather", source, target, 2, FLOAT, comm, on)
    done("ncclBroadcast", root, root, 1, FLOAT, 1, comm, on)
    done("ncclReduceScatter", target, target + 28, 1, FLOAT, SUM, comm, on)
    done("cudaStreamSynchronize", on)
    reduced.append(as_floats(grouped, 3))
    say([reduced, as_floats(target, 2 * ranks), as_floats(root, 1), as_floats(target + 28, 1)])


def disagree(rank: str) -> None:
    """An all-reduce of other sizes."""
    done("cudaSetDevice", int(rank))
    comm, on = communicator("disagree", 2, int(rank)), stream(NON_BLOCKING)
    memory = device_memory(bytes(16))
    done("ncclAllReduce", memory, memory, 1 + int(rank), BYTE, SUM, comm, on)
    while not asynchronous_error(comm):
        pass
    say([asynchronous_error(comm), is_ready(on)])
    done("ncclCommAbort", comm)
    done("cudaStreamSynchronize", on)


# Memory and counters


def hold(num_bytes: str) -> None:
    """Allocate so much, and keep it; say the error, and what is left."""
    handle, left, total = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_size_t()
    while True:
        error = call("cudaMalloc", ctypes.byref(handle), int(num_bytes))
        done("cudaMemGetInfo", ctypes.byref(left), ctypes.byref(total))
        say([error, left.value, total.value])
        wait()


def physical_memory(num_bytes: str) -> None:
    """Make memory of the driver, map it, unmap it, release it; what is left at each step."""
    driver = ctypes.CDLL(os.environ["NULL_GPU_LIBRARY"].replace("libnullgpu.so", "libcuda.so.1"))
    size = ctypes.c_size_t(int(num_bytes))
    left, total = ctypes.c_size_t(), ctypes.c_size_t()
    handle, second, address = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_size_t()
    properties = (ctypes.c_int * 16)()
    found = []

    def look(error: int) -> None:
        done("cudaMemGetInfo", ctypes.byref(left), ctypes.byref(total))
        found.append([error, left.value])

    zero = ctypes.c_size_t(0)
    look(0)
    look(driver.cuMemCreate(ctypes.byref(handle), size, properties, zero))
    look(driver.cuMemCreate(ctypes.byref(second), size, properties, zero))
    look(driver.cuMemAddressReserve(ctypes.byref(address), size, zero, zero, zero))
    look(driver.cuMemMap(address, size, zero, handle, zero))
    fresh = content(address.value, 4).hex()
    look(driver.cuMemRelease(handle))
    look(driver.cuMemUnmap(address, size))
    say([found, fresh])


def freed_memory(use: str) -> None:
    """Read freed memory, or write to it."""
    memory = device_memory(floats([1, 2]))
    done("cudaFree", memory)
    say(content(memory, 8).hex())
    if use == "write":
        ctypes.memset(memory, 0, 1)
    say("lives")


def communicators_take_memory() -> None:
    left, total = ctypes.c_size_t(), ctypes.c_size_t()
    found = []
    for step in ("", "made", "destroyed"):
        if step == "made":
            comm = communicator("alone", 1, 0)
        elif step:
            done("ncclCommDestroy", comm)
        done("cudaMemGetInfo", ctypes.byref(left), ctypes.byref(total))
        found.append(left.value)
    graph = made("cudaGraphInstantiate", 0, 0)
    done("cudaMemGetInfo", ctypes.byref(left), ctypes.byref(total))
    found.append(left.value)
    done("cudaGraphExecDestroy", graph)
    say(found)


def counted() -> None:
    """Waits under two labels; the counters are written at the end."""
    on, memory = stream(NON_BLOCKING), device_memory(bytes(1000))
    pageable = ctypes.create_string_buffer(1000)
    library.null_gpu_label(b"first to last")
    for _ in range(3):
        fill(memory, 1, 1000, on)
        call("null_gpu_launch", on)
    say(library.null_gpu_waits(0))
    done("cudaStreamSynchronize", on)
    library.null_gpu_label(b"after")
    copy(ctypes.addressof(pageable), memory, 1000, on)
    copy(ctypes.addressof(pageable), memory, 1000, on)
    done("cudaDeviceSynchronize")
    done("cudaFree", memory)
    pinned(bytes(5000))
    made("cudaMalloc", 1 << 20)
    say(library.null_gpu_waits(0))


if __name__ == "__main__":
    name, *given = sys.argv[1:]
    globals()[name](*given)
