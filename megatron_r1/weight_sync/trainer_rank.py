"""The operations of a push on a trainer rank."""

import os
import resource
import socket
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1 import platform
from megatron_r1.config import Config
from megatron_r1.weight_sync.plan import TrainerGrid
from megatron_r1.weight_sync.results import ConnectedSets, OpenedPush, SentWeights
from megatron_r1.weight_sync.send.sender import WeightSender
from megatron_r1.weight_sync.transports.base import gpu_uuid
from megatron_r1.weights.layout import recipe_stages
from megatron_r1.weights.local import local_entries


class WeightPush:
    """The sender of a rank, created from its model by `open_push`; every method is called on all
    trainer ranks.

    model_chunks: this rank's virtual stages."""

    def __init__(self, model_chunks: Sequence, hf: dict, config: Config):
        self._model_chunks, self._hf, self._config = model_chunks, hf, config
        self._sender: WeightSender | None = None

    def open_push(self) -> OpenedPush:
        """Create the sender, before the first engine is connected."""
        stages = recipe_stages(self._config, self._hf)
        held = defaultdict(list)
        for parameter, entry in local_entries(self._model_chunks, self._hf):
            for piece in entry.pieces:
                held[piece.hf_name].append((parameter, piece))
        grid = TrainerGrid.from_recipe(self._config.parallel, dist.get_world_size())
        store, address = _open_store()
        rank = dist.get_rank()
        self._sender = WeightSender(
            self._hf,
            grid,
            held,
            store,
            platform.from_rank_zero,
            rank=rank,
            stages=stages,
            drafts=self._config.rollout.drafts_by_mtp,
            gpus=_gpus() if self._config.push.transport == "nccl" else (),
        )
        return {"store": address}

    def connect_sets(self, **arguments: Any) -> ConnectedSets:
        """Connect this rank with sets of engines, as `WeightSender.connect` does."""
        assert self._sender is not None, "open_push() comes first"
        return self._sender.connect(**arguments)

    def send_weights(self, push: int, sets: list[str], gone: Sequence[str] = ()) -> SentWeights:
        """Push to sets of engines, as `WeightSender.send` does."""
        assert self._sender is not None, "open_push() comes first"
        return self._sender.send(push, sets, gone)


def _gpus() -> list[tuple[str, str]]:
    """Return the UUID and the node of every rank's GPU."""
    found: list[Any] = [None] * dist.get_world_size()
    # Over all ranks: each plans the whole push, for which it needs to know who shares a GPU.
    dist.all_gather_object(found, (gpu_uuid(torch.cuda.current_device()), socket.gethostname()))
    return found


def _open_store() -> tuple[dist.TCPStore, list]:
    """Return a client of the store that rank 0 hosts, and its [host, port]."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store = None
    if dist.get_rank() == 0:
        # Every pair and group has a connection of its own to the store while it is created, and
        # each is an open file of this process.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    port = platform.from_rank_zero(store and store.port)  # only rank 0 has chosen one
    return store or dist.TCPStore(host, port, is_master=False), [host, port]
