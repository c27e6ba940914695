"""The controller's handle on the trainer ranks."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket as sockets
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from megatron_r1 import processes
from megatron_r1.config import Config
from megatron_r1.models import read_hf_config
from megatron_r1.training.cost import sample_cost
from megatron_r1.training.packing import pack
from megatron_r1.training.wire import Call, Microbatches, Reply, Sample, Share


class TrainerError(RuntimeError):
    """A trainer rank failed or vanished; the message says which and why."""


class TrainerClient:
    """All trainer ranks as one: a call runs on all of them; the last stage's answer counts."""

    def __init__(
        self,
        config: Config,
        log_folder: Path,
        bind: str = "tcp://127.0.0.1:*",
        world_size: int | None = None,
    ):
        """bind: where ranks come to; world_size: how many, if others start them (torchrun)."""
        self._world_size = world_size or config.parallel.processes
        self.config, self.log_folder = config, Path(log_folder)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(bind)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._processes: list[subprocess.Popen] = []
        self._places: list[dict[str, Any]] = []
        self._decode = msgspec.msgpack.Decoder(Reply).decode
        self._busy = asyncio.Lock()
        self.is_usable = True
        """False once a call did not come to its end: the ranks may be anywhere."""
        self._cost = sample_cost(read_hf_config(config.model.path))

    @property
    def num_parameters(self) -> int:
        return self._places[0]["num_parameters"]

    @property
    def data_size(self) -> int:
        return self._places[0]["data_size"]

    def launch(self) -> None:
        """Start `parallel.processes` ranks on this machine, each with its log in the log folder."""
        count = self.config.parallel.processes
        with sockets.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = self.config.model_dump_json()
        for rank in range(count):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            command = [sys.executable, "-m", "megatron_r1.training.worker", settings, self.address]
            self._processes.append(processes.start(command, self._log(rank), environment))

    async def connect(self) -> None:
        """Wait until every rank has built its model.

        Raises the first one's reason: ValueError for the user's mistake, else TrainerError.
        """
        replies = await self._gather(self._world_size)
        self._places = [replies[rank] for rank in range(self._world_size)]

    async def load(self, minibatches: list[list[Sample]]) -> dict[str, float]:
        """Send each model replica its own share of every mini-batch, packed into micro-batches.

        Returns how well that went: `packing/waste`, `packing/fill` (`packing.Packing`),
        `packing/microbatches` per rank and update, and `packing/padding`, the share of tokens that
        stand for nothing.
        """
        limit = self.config.parallel.tokens_per_microbatch
        shares: list[list[Microbatches]] = [[] for _ in range(self.data_size)]
        packings = [
            pack([len(s) for s in samples], self.data_size, limit, cost=self._cost)
            for samples in minibatches
        ]
        for samples, packing in zip(minibatches, packings, strict=True):
            for rank, share in enumerate(packing.shares):
                shares[rank].append(Microbatches([[samples[i] for i in m] for m in share]))
        loaded = await self._everywhere("load", shares=shares)
        return {
            "packing/waste": fmean(p.waste for p in packings),
            "packing/fill": fmean(p.fill for p in packings),
            "packing/microbatches": fmean(len(p.shares[0]) for p in packings),
            **loaded,
        }

    async def update(
        self, index: int, loss: str, settings: dict[str, Any], learning_rate: float
    ) -> dict[str, float]:
        """One optimizer step on mini-batch `index`; its metrics.

        Raises TrainerError when loss or gradient is not a number: the weights are then lost, and
        the newest checkpoint is from before.
        """
        arguments = {"index": index, "loss": loss, "settings": settings}
        metrics = await self.call("update", **arguments, learning_rate=learning_rate)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise TrainerError(
                    f"{name} is {metrics[name]}: the run stops before a checkpoint is made of it. "
                    "The newest checkpoint is good; lower optimizer.learning_rate in a new run"
                )
        return metrics

    async def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Run `operation` on every rank; the answer is the last pipeline stage's."""
        return await self._everywhere(operation, arguments)

    async def close(self) -> None:
        """Stop the ranks."""
        if self._places and all(p.poll() is None for p in self._processes):
            with contextlib.suppress(TimeoutError, TrainerError):
                await asyncio.wait_for(self.call("stop"), timeout=10)
        self.kill()
        self._socket.close(linger=0)

    def kill(self) -> None:
        for process in self._processes:
            processes.stop(process, timeout_seconds=5)

    async def _everywhere(
        self,
        operation: str,
        arguments: dict[str, Any] | None = None,
        shares: list[list[Microbatches]] | None = None,
    ) -> dict[str, Any]:
        encode = msgspec.msgpack.encode
        async with self._busy:
            for rank, place in enumerate(self._places):
                share = None
                if shares and place["leads_replica"]:
                    share = encode(Share(shares[place["data_rank"]]))
                call = Call(operation, arguments or {}, share)
                try:
                    await self._socket.send_multipart([str(rank).encode(), encode(call)])
                except zmq.ZMQError:
                    self.is_usable = False
                    raise TrainerError(self._obituary(rank)) from None
            self.is_usable = False
            replies = await self._gather(len(self._places))
            self.is_usable = True
        return next(replies[p["rank"]] for p in self._places if p["last_stage"])

    async def _gather(self, count: int) -> dict[int, dict[str, Any]]:
        replies: dict[int, dict[str, Any]] = {}
        while len(replies) < count:
            if not await self._socket.poll(timeout=500):
                lost = self._lost(replies)
                # What a rank that died had to say may have arrived since.
                if lost is not None and not await self._socket.poll(timeout=500):
                    raise TrainerError(self._obituary(lost))
                continue
            _, payload = await self._socket.recv_multipart()
            reply = self._decode(payload)
            if reply.error is not None:
                raise (ValueError if reply.is_mistake else TrainerError)(reply.error)
            replies[reply.rank] = reply.result or {}
        return replies

    def _lost(self, replies: dict[int, Any]) -> int | None:
        """A rank that owes a reply and whose process has ended."""
        for rank, process in enumerate(self._processes):
            if rank not in replies and process.poll() is not None:
                return rank
        return None

    def _obituary(self, rank: int) -> str:
        if rank >= len(self._processes):
            return f"trainer rank {rank} is gone"
        code, log = self._processes[rank].poll(), self._log(rank)
        how = f"was killed by signal {-code}" if code and code < 0 else f"exited with code {code}"
        return f"trainer rank {rank} {how}; the end of {log}:\n{processes.last_lines(log)}"

    def _log(self, rank: int) -> Path:
        return self.log_folder / f"trainer_{rank}.log"
