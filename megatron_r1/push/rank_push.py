"""The operations of a push on a trainer rank, which the controller calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.config import Config
from megatron_r1.models import platform
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.adapters import adapter_pieces
from megatron_r1.models.weights.layout import recipe_stages
from megatron_r1.models.weights.loading import local_entries
from megatron_r1.models.weights.splits import Piece
from megatron_r1.push.control_messages import ConnectedSets, OpenedPush, SentWeights
from megatron_r1.push.matching.adapter_push import pushed_adapter_table
from megatron_r1.push.matching.layouts import EngineLayout, TrainerGrid
from megatron_r1.push.sender import WeightSender
from megatron_r1.push.store import open_store
from megatron_r1.push.transports.base import gpu_uuid


class RankPush:
    """The sender of a rank, created from its model by `open_push`; every method is called on all
    trainer ranks.

    Args:
        model_chunks: this rank's virtual stages.
        hf_config: the model's `config.json`.
        config: the recipe.
    """

    def __init__(
        self, model_chunks: Sequence[torch.nn.Module], hf_config: HFConfig, config: Config
    ):
        self._model_chunks, self._hf_config, self._config = model_chunks, hf_config, config
        self._sender: WeightSender | None = None

    def open_push(self) -> OpenedPush:
        """Create the sender, before the first engine is connected."""
        stages = recipe_stages(self._config, self._hf_config)
        adapters = pushed_adapter_table(self._config, self._hf_config)
        by_tensor: dict[str, list[tuple[torch.Tensor, Piece]]] = defaultdict(list)
        for parameter, pieces in self._pushed_pieces(adapters is not None):
            for piece in pieces:
                by_tensor[piece.hf_name].append((parameter, piece))
        grid = TrainerGrid.from_recipe(self._config.parallel, dist.get_world_size())
        store, address = open_store(self._config.rollout)
        rank = dist.get_rank()
        self._sender = WeightSender(
            self._hf_config,
            grid,
            by_tensor,
            store,
            platform.broadcast_from_rank_zero,
            rank=rank,
            stages=stages,
            drafts=self._config.rollout.drafts_by_mtp,
            gpus=_gpu_uuids() if TRANSPORTS[self._config.push.transport].sends_in_rounds else (),
            adapters=adapters,
        )
        return OpenedPush(address)

    def _pushed_pieces(
        self, has_adapters: bool
    ) -> Iterator[tuple[torch.Tensor, tuple[Piece, ...]]]:
        """Yield (parameter, pieces) of this rank's weights, or of its adapters' factors."""
        if has_adapters:
            for factor, pieces, _ in adapter_pieces(self._model_chunks):
                yield factor, pieces
        else:
            for parameter, entry in local_entries(self._model_chunks, self._hf_config):
                yield parameter, entry.pieces

    def connect_sets(
        self,
        sets: Sequence[tuple[str, int]],
        layout: EngineLayout,
        transport: str,
        timeout_seconds: float,
        push_timeout_seconds: float,
        closed_sets: Sequence[str] = (),
    ) -> ConnectedSets:
        """Connect this rank with sets of engines, as `WeightSender.connect` does.

        Args:
            sets: name and number of engines of each set.
            layout: that of one engine.
            transport: a key of `base.transports.TRANSPORTS`.
            timeout_seconds: limit for connecting.
            push_timeout_seconds: limit for a push.
            closed_sets: the names of sets to disconnect."""
        assert self._sender is not None, "open_push() comes first"
        return self._sender.connect(
            sets, layout, transport, timeout_seconds, push_timeout_seconds, closed_sets
        )

    def send_weights(
        self, push_number: int, sets: list[str], closed_sets: Sequence[str] = ()
    ) -> SentWeights:
        """Push to sets of engines, as `WeightSender.send` does.

        Args:
            push_number: which push of the run, from 1.
            sets: the names of the sets to send to.
            closed_sets: the names of sets to disconnect."""
        assert self._sender is not None, "open_push() comes first"
        return self._sender.send(push_number, sets, closed_sets)


def _gpu_uuids() -> list[str]:
    """Return the UUID of every rank's GPU."""
    uuids: list[Any] = [None] * dist.get_world_size()
    # Over all ranks: each plans the whole push, for which it needs to know who shares a GPU.
    dist.all_gather_object(uuids, gpu_uuid(torch.cuda.current_device()))
    return uuids
