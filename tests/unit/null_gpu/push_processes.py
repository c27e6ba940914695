"""Trainer ranks and engines of a push over NCCL in processes of their own.

Each rank is on a null GPU, behind the controller's own pusher; an engine can be killed at a chosen
round of a push.

`python push_processes.py MODEL ENGINES [colocated] [host] [first] [middle] [last]` pushes; for each
of the last words it kills engine 0 at that round of a push, replaces it, and pushes again. host: on
the CPU, by `host_push`. Prints a line of JSON with what it saw; every engine compares each push
with plain slicing when it loads it. `tools/gpu_check` runs it on real GPUs."""

import asyncio
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from functools import partial
from types import SimpleNamespace

import torch
from torch.distributed import TCPStore

from megatron_r1.config.push import PushConfig
from megatron_r1.controller.push.engine_links import EngineLinks
from megatron_r1.controller.push.pusher import WeightPusher
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.errors import ConnectionBroken, EngineDied, EngineLacksPush
from megatron_r1.push.control_messages import IncompletePush, OpenedPush
from megatron_r1.push.matching import EngineLayout, TrainerGrid, rounds
from megatron_r1.push.rendezvous import EngineRendezvous
from megatron_r1.push.sender import WeightSender, run_in_threads
from megatron_r1.push.transports import nccl, nccl_communicator
from tests.unit.controller.push.small_fleet import SmallFleet
from tests.unit.push.push_models import DEEPSEEK, QWEN
from tests.unit.push.push_world import draw, plain_table, wrong_slots
from tools.bench.push.small_model import rank_tensors

CASES = {
    "qwen": (QWEN, TrainerGrid(2, tensor=2), EngineLayout()),
    "deepseek": (DEEPSEEK, TrainerGrid(4, expert=4), EngineLayout(tensor_parallel=2)),
}
SCATTER_BUCKET_BYTES, RELAY_BUCKET_BYTES = 3001, 5003
"""Of a bucket; odd, so that buckets end within elements."""
PUSH_SECONDS = 600.0
"""Generous: nothing here waits for it to pass."""
STARTS = multiprocessing.get_context("forkserver" if "host" in sys.argv else "spawn")
"""torch for CUDA refuses a GPU in a forked process."""
STARTS.set_forkserver_preload(["tests.unit.null_gpu.push_processes"])  # imports once for all


def tensors_of(hf_config: dict, version: int) -> dict:
    """Return the weights of a version: each element differs from the version before."""
    return {
        name: tensor * (-1) ** version * 2**version for name, tensor in draw(hf_config, 1).items()
    }


class Rounds:
    """Counts the groups of NCCL calls of this process, and kills a process before one of them."""

    def __init__(self):
        self.number, self.deadly, self.victim = 0, None, 0
        self._exchange, self._lock = nccl_communicator.enqueue_send_recv, threading.Lock()
        nccl_communicator.enqueue_send_recv = self.exchange

    def exchange(self, *arguments):
        with self._lock:
            if self.number == self.deadly:
                os.kill(self.victim, signal.SIGKILL)
            self.number += 1
        return self._exchange(*arguments)

    def kill_at(self, number, victim):
        self.number, self.deadly, self.victim = 0, number, victim


class Rank:
    """What every process has.

    Attributes:
        gpu: the GPU of the first of its ranks."""

    def __init__(self, case, gpu, *, on_host):
        self.hf_config, self.grid, self.layout = CASES[case]
        rounds.SCATTER_BUCKET_BYTES = SCATTER_BUCKET_BYTES
        rounds.RELAY_BUCKET_BYTES = RELAY_BUCKET_BYTES
        self.gpu, self.on_host, self.rounds = gpu, on_host, Rounds()
        if on_host:
            import host_push

            host_push.install()
            self.use_gpu, self.gpu_name = host_push.use_gpu, host_push.gpu_name
            self.receiver_class = host_push.HostReceiver
        else:
            if "NULL_GPUS" in os.environ:
                from host_compute import compute_everywhere

                compute_everywhere()
            self.use_gpu, self.gpu_name = torch.cuda.set_device, nccl.gpu_uuid
            self.receiver_class = nccl.NCCLReceiver
        self.use_gpu(gpu)

    @property
    def device(self):
        return torch.device("cpu") if self.on_host else torch.device("cuda", self.gpu)

    def kill_at(self, number, victim=None):
        self.rounds.kill_at(number, victim or os.getpid())

    def num_rounds(self):
        return self.rounds.number


class TrainerRank(Rank):
    def __init__(self, case, rank, port, **place):
        super().__init__(case, rank, **place)
        self.rank, self.port, self.num_shared = rank, port, 0
        self.store = TCPStore("127.0.0.1", port, is_master=False)
        self.held = rank_tensors(self.hf_config, self.grid, rank, tensors_of(self.hf_config, 0))
        self.held = {
            name: [(tensor.to(self.device), piece) for tensor, piece in pieces]
            for name, pieces in self.held.items()
        }
        gpus = [self.gpu_name(number) for number in range(self.grid.world_size)]
        client = TCPStore("127.0.0.1", port, is_master=False)
        arguments = self.hf_config, self.grid, self.held, client, self.share
        self.sender = WeightSender(*arguments, rank=rank, gpus=gpus)

    def share(self, value):
        self.num_shared += 1
        key = f"shared/{self.num_shared}"
        if self.rank == 0:
            self.store.set(key, value)
        return self.store.get(key)

    def train(self, version):
        new = rank_tensors(
            self.hf_config, self.grid, self.rank, tensors_of(self.hf_config, version)
        )
        for name, pieces in self.held.items():
            for (parameter, _), (value, _) in zip(pieces, new[name], strict=True):
                parameter.copy_(value)

    def connect_sets(self, **arguments):
        return self.sender.connect(**arguments)

    def send_weights(self, **arguments):
        return self.sender.send(**arguments)

    def open_push(self):
        return OpenedPush(("127.0.0.1", self.port))


class EngineRanks(Rank):
    """All ranks of an engine, in threads of one process."""

    def __init__(self, case, first_gpu, *, is_colocated, **place):
        super().__init__(case, first_gpu, **place)
        self.receivers, self.is_colocated = [], is_colocated

    def init_weight_transfer(self, info):
        before, self.receivers = self.receivers, []
        for receiver in before:
            receiver.close()

        def receiver(rank):
            self.use_gpu(self.gpu + rank)
            table = plain_table(self.hf_config, self.layout, rank)
            memory = before[rank].reusable_memory(table) if before else None
            store = TCPStore(*info.store, is_master=False)
            seconds = info.timeout_seconds, info.push_timeout_seconds
            place = {"member": info.member_index, "num_members": info.num_members}
            met = EngineRendezvous(store, info.name, *seconds, **place)
            return self.receiver_class(met, rank, table, memory, info.allocates_per_push)

        ranks = range(self.layout.ranks_per_engine)
        self.receivers = run_in_threads([partial(receiver, rank) for rank in ranks])

    def swap_weights(self, push, version):
        """Compare what has arrived with the weights of this version."""
        expected, wrong = tensors_of(self.hf_config, version), []
        for rank, receiver in enumerate(self.receivers):
            receiver.received_chunks.wait(push, PUSH_SECONDS)
            place = SimpleNamespace(memory=receiver.memory.cpu(), table=receiver.table)
            wrong += wrong_slots(SimpleNamespace(receivers={rank: place}), expected, push)
            receiver.free_memory()
        assert wrong == [], wrong


def serve(pipe, kind, *arguments, **keywords):
    """Answer calls of methods until the pipe is closed."""
    faulthandler.register(signal.SIGUSR1)
    try:
        served = kind(*arguments, **keywords)
        while True:
            name, values, options = pipe.recv()
            try:
                pipe.send((True, getattr(served, name)(*values, **options)))
            except Exception as error:
                traceback.print_exc()
                pipe.send((False, f"{type(error).__name__}: {error}"))
    except EOFError:
        os._exit(0)  # threads may be in a call


class Process:
    """A process, whose methods `call` calls."""

    def __init__(self, kind, *arguments, **keywords):
        self._pipe, theirs = STARTS.Pipe()
        self.process = STARTS.Process(
            target=serve, args=(theirs, kind, *arguments), kwargs=keywords, daemon=True
        )
        self.process.start()
        theirs.close()
        self._lock = threading.Lock()

    async def call(self, name, *values, **options):
        return await asyncio.to_thread(self._call, name, values, options)

    def _call(self, name, values, options):
        with self._lock:
            try:
                self._pipe.send((name, values, options))
                is_correct, result = self._pipe.recv()
            except (EOFError, OSError) as error:
                raise ConnectionBroken("cut") from error
        if not is_correct:
            raise (
                EngineLacksPush(result, 500)
                if IncompletePush.CODE in result
                else RuntimeError(result)
            )
        return result

    def close(self):
        self._pipe.close()
        self.process.kill()
        self.process.join()


class Trainer:
    def __init__(self, case, *, on_host):
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world = range(CASES[case][1].world_size)
        self.ranks = [
            Process(TrainerRank, case, rank, self.store.port, on_host=on_host) for rank in world
        ]

    async def call_all(self, operation, on_start=None, **arguments):
        if on_start:
            on_start()
        return await self.run(operation.__name__, **arguments)

    async def run(self, method, **arguments):
        return await asyncio.gather(*(rank.call(method, **arguments) for rank in self.ranks))

    @property
    def pids(self):
        return [rank.process.pid for rank in self.ranks if rank.process.is_alive()]


class Client:
    """An engine's client.

    Attributes:
        version: the version of the weights that the engine has loaded.
        swaps: how often it has loaded weights."""

    def __init__(self, *arguments, **keywords):
        self.process, self.version, self.swaps = Process(EngineRanks, *arguments, **keywords), 0, 0

    @property
    def pid(self):
        return self.process.process.pid

    async def init_weight_transfer(self, info, resume):
        await self.process.call("init_weight_transfer", info)

    async def swap_weights(self, update, version, resume=True):
        await self.process.call("swap_weights", update.push_number, version)
        self.version, self.swaps = version, self.swaps + 1

    async def sleep(self):
        pass

    async def wake(self, *parts):
        pass

    async def resume(self):
        pass


class Fleet(SmallFleet):
    async def swap_weights(self, update, version):
        """As `EngineFleet.swap_weights`."""
        engines = [engine for engine in self.engines if engine.is_up]
        calls = [engine.client.swap_weights(update, version) for engine in engines]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for engine, outcome in zip(engines, outcomes, strict=True):
            if isinstance(outcome, (EngineLacksPush, ConnectionBroken, EngineDied)):
                self.replace(engine, EngineDied(str(outcome)))
            elif outcome is not None:
                raise outcome


async def watch(engine):
    """Note the engine's death, as its watchdog would."""
    while engine.client.process.process.is_alive():
        await asyncio.sleep(0.2)
    engine.death_noticed.set()


async def story(case, engines, *, is_colocated, on_host, killed_at):
    _, grid, layout = CASES[case]
    first = 0 if is_colocated else grid.world_size
    trainer = Trainer(case, on_host=on_host)
    watchers, seconds = [], []

    def make_engine(index, is_up=True):
        gpu = first + index * layout.ranks_per_engine
        client = Client(case, gpu, is_colocated=is_colocated, on_host=on_host)
        server = SimpleNamespace(describe_end=lambda: "?")
        engine = Engine(index, server, client, is_up=is_up)
        watchers.append(asyncio.create_task(watch(engine)))
        return engine

    fleet = Fleet(make_engine(index) for index in range(engines))
    settings = PushConfig(transport="nccl", timeout_seconds=PUSH_SECONDS)
    quiet = {"notify": lambda line: None}
    links = EngineLinks(trainer, settings, [], layout, colocated=is_colocated, **quiet)
    pusher = WeightPusher(fleet, links)

    async def push(version):
        async with pusher.updating_weights():
            if version == 1:
                await pusher.open()
            await trainer.run("train", version=version)
            start = time.monotonic()
            await pusher.push(version)
        seconds.append(round(time.monotonic() - start, 2))
        print(f"push {version}: {seconds[-1]} s", file=sys.stderr, flush=True)

    def counting():
        """Of an engine the victim counts its own rounds, in NCCL or as trainer rank 0's."""
        return trainer.ranks[0] if is_colocated else fleet.engines[0].client.process

    # The limit for connecting is not one for their start.
    await asyncio.gather(*(engine.client.process.call("num_rounds") for engine in fleet.engines))
    await push(1)
    version, pids, seen = 1, trainer.pids, {}
    if killed_at:
        seen |= {"lost": [], "others": [], "rounds": []}
    for place in killed_at:
        victim, others = fleet.engines[0], fleet.engines[1:]
        before = [(engine.client.pid, engine.client.swaps) for engine in others]
        number = await counting().call("num_rounds")
        at = {"first": 0, "middle": number // 2, "last": number - 1}[place]
        await counting().call("kill_at", at, victim.client.pid)
        await push(version + 1)
        seen["lost"] += [index for index, _ in fleet.lost]
        fleet.lost.clear()
        seen["others"] += [
            pid == engine.client.pid and engine.client.swaps == swaps + 1
            for engine, (pid, swaps) in zip(others, before, strict=True)
        ]
        seen["rounds"].append(number)
        new = make_engine(0, is_up=False)
        await new.client.process.call("num_rounds")  # it has started
        async with pusher.send_weights(new):
            fleet.engines[0], new.is_up = new, True
        await counting().call("kill_at", None)
        version += 2
        await push(version)
    for _ in range(1 if killed_at else 2):
        version += 1
        await push(version)
    seen["trainer"] = trainer.pids == pids and len(pids) == grid.world_size
    seen["seconds"] = seconds
    seen["current"] = [engine.client.version == version for engine in fleet.engines]
    seen["sets"] = [len(one.engines) for one in pusher.links.sets]
    for watcher in watchers:
        watcher.cancel()
    for process in [*trainer.ranks, *(engine.client.process for engine in fleet.engines)]:
        process.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    words = sys.argv[3:]
    at = [word for word in words if word in ("first", "middle", "last")]
    places = {"is_colocated": "colocated" in words, "on_host": "host" in words}
    asyncio.run(story(sys.argv[1], int(sys.argv[2]), killed_at=at, **places))
