"""The verbs of a push on a trainer rank, and the sender behind them, from its model and its place
in Megatron's grid."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_r1.config.training import ParallelConfig
from megatron_r1.weight_sync.plan import TrainerGrid
from megatron_r1.weight_sync.send.sender import WeightSender
from megatron_r1.weights.layout import stage_shards
from megatron_r1.weights.local import local_entries


class WeightPush:
    """model_chunks: this rank's virtual stages. Every method is called on all ranks."""

    def __init__(self, model_chunks: Sequence, hf: dict, parallel: ParallelConfig):
        self._model = (model_chunks, hf, parallel)
        self._sender: WeightSender | None = None

    def open_push(self) -> dict[str, Any]:
        """Before the first engine is connected: where engines find this trainer, "store"."""
        self._sender, address = weight_sender(*self._model)
        return {"store": address}

    def connect_engine(self, **engine: Any) -> dict[str, Any]:
        """`WeightSender.connect`."""
        assert self._sender is not None, "open_push() comes first"
        return self._sender.connect(**engine)

    def send_weights(
        self, push: int, engines: list[int], gone: Sequence[int] = ()
    ) -> dict[str, Any]:
        """`WeightSender.send`."""
        assert self._sender is not None, "open_push() comes first"
        return self._sender.send(push, engines, gone)


def weight_sender(
    model_chunks: Sequence, hf: dict, parallel: ParallelConfig
) -> tuple[WeightSender, list]:
    """model_chunks: this rank's virtual stages. Call on all ranks; rank 0 then hosts the store in
    which engines find them, at the [host, port] that is returned."""
    grid = TrainerGrid.of(parallel, dist.get_world_size())
    stages = stage_shards(
        hf,
        parallel.pipeline,
        parallel.virtual_pipeline,
        pipeline_layout=parallel.pipeline_layout,
        with_mtp=False,
    )
    held = defaultdict(list)
    for parameter, entry in local_entries(model_chunks, hf):
        for piece in entry.pieces:
            held[piece.hf_name].append((parameter, piece))
    store, address = _store()
    return WeightSender(hf, grid, held, store, rank=dist.get_rank(), stages=stages), address


def _store() -> tuple[dist.TCPStore, list]:
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store = None
    if dist.get_rank() == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    port = [store and store.port]
    dist.broadcast_object_list(port, src=0)
    return store or dist.TCPStore(host, port[0], is_master=False), [host, port[0]]
