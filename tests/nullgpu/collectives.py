"""Every collective and message that we or Megatron send over NCCL, between null GPUs, against what
each must give: `collectives.py`, under torchrun. What NCCL or the null GPU has to refuse:
`collectives.py unequal`, a collective of unequal sizes, and `collectives.py shared`, ranks on one
GPU. `collectives.py unreceived`: a send that is not received ends by torch's time limit, which
aborts it, and the GPU goes on. Prints a line for each rank."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


def filled(value: float, size: int = 3) -> Tensor:
    return torch.full((size,), float(value)).cuda()


def expect(got: Tensor, *values: float) -> None:
    assert got.cpu().tolist() == list(values), (got.cpu(), values)


def reductions(rank: int, size: int) -> None:
    ranks = range(size)
    for dtype in DTYPES:
        own = (torch.arange(10) + rank).to(dtype).cuda()
        dist.all_reduce(own)
        expect(own, *(sum(i + r for r in ranks) for i in range(10)))
    for operation, value in (("MAX", size - 1), ("MIN", 0), ("AVG", (size - 1) / 2)):
        own = filled(rank)
        dist.all_reduce(own, op=getattr(dist.ReduceOp, operation))
        expect(own, *[value] * 3)
    part = filled(0, 2)
    dist.reduce_scatter_tensor(part, torch.arange(2.0 * size).cuda())
    expect(part, 2 * rank * size, (2 * rank + 1) * size)
    own = filled(rank)
    dist.reduce(own, 1)
    if rank == 1:
        expect(own, *[sum(ranks)] * 3)
    with dist._coalescing_manager(async_ops=True) as several:
        one, other = filled(1), filled(2, 2)
        dist.all_reduce(one)
        dist.all_reduce(other)
    several.wait()
    expect(other, 2 * size, 2 * size)


def copies(rank: int, size: int) -> None:
    ranks = range(size)
    whole = filled(0, 2 * size)
    dist.all_gather_into_tensor(whole, torch.tensor([rank, rank + 0.5]).cuda())
    expect(whole, *(value for r in ranks for value in (r, r + 0.5)))
    parts = [filled(0) for _ in ranks]
    dist.all_gather(parts, filled(rank))
    expect(parts[-1], *[size - 1] * 3)
    own = filled(rank)
    dist.broadcast(own, 1)
    expect(own, 1, 1, 1)
    swapped = filled(0, size)
    dist.all_to_all_single(swapped, (torch.arange(size) + 10.0 * rank).cuda())
    expect(swapped, *(10 * r + rank for r in ranks))
    sent = [r + 1 for r in ranks]  # to each rank
    uneven = filled(0, size * (rank + 1))
    dist.all_to_all_single(uneven, filled(rank, sum(sent)), [rank + 1] * size, sent)
    expect(uneven, *(r for r in ranks for _ in range(rank + 1)))
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert [found["rank"] for found in objects] == list(ranks)


def messages(rank: int, size: int) -> None:
    after, before = (rank + 1) % size, (rank - 1) % size
    arrived = filled(0)
    both = [dist.P2POp(dist.irecv, arrived, before), dist.P2POp(dist.isend, filled(rank), after)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    expect(arrived, *[before] * 3)
    for number in range(200):  # more than may wait unread
        if rank == 0:
            dist.send(filled(number), 1)
        elif rank == 1:
            dist.recv(arrived, 0)
            expect(arrived, *[number] * 3)


def groups(rank: int, size: int) -> None:
    first, last = dist.new_group([0, 1]), dist.new_group([size - 1])
    own = filled(rank)
    if rank < 2:
        dist.all_reduce(own, group=first)
        expect(own, 1, 1, 1)
    if rank == size - 1:
        dist.all_reduce(own, group=last)


def refused(call) -> None:
    try:
        call()
    except RuntimeError:
        return
    raise AssertionError("it went through")


def send_in_vain(rank: int) -> None:
    dist.barrier()
    torch.cuda.synchronize()
    store = dist.distributed_c10d._get_default_store()
    if rank:
        store.wait(["released"], timedelta(hours=1))
        return
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    refused(dist.isend(filled(1), 1).wait)
    torch.cuda.synchronize()
    print("the send is released", flush=True)
    store.set("released", "")


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "shared" in sys.argv:
        device = torch.device("cuda", 0)
        refused(lambda: dist.init_process_group("nccl", device_id=device))
        return
    if {"unequal", "unreceived"} & set(sys.argv):
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # else torch's watchdog ends the process
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    if "unequal" in sys.argv:
        refused(lambda: dist.all_reduce(filled(1, 3 + rank), async_op=True).wait())
        return
    if "unreceived" in sys.argv:
        send_in_vain(rank)
        return
    for part in (reductions, copies, messages, groups):
        part(rank, size)
    dist.destroy_process_group()
    print("all are right", flush=True)


if __name__ == "__main__":
    main()
