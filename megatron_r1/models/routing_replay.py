"""Routing replay (R3, arXiv 2510.11370): Megatron's routers use the experts the engine chose, and
a recomputed layer those of its forward pass.

Only the choice is replayed: the weights of the chosen experts are the trainer's own scores,
normalized over the chosen, so gradients reach the router as usual. The expert bias and the limit on
groups affect only the choice and so have no effect on a replayed token.

A router calls the object in its `router_replay` for the top k (moe_utils.py:832, Megatron-Core
0.19.2). Megatron's own class (router_replay.py) replays all tokens or none, and a caller has to set
whether a pass is a forward pass or its recomputation, which is not possible with a schedule that
interleaves the two.

Where the choices of a pass are known before it, so are the numbers of tokens for each expert, for
which the host would else wait for the device in every layer (`models.token_dispatcher`). The engine
has chosen for every token that it was fed. For a sample's last token and for padding, whose outputs
nothing reads, any experts will do, and the trainer takes all of them in turn."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_r1.models.routing_shape import RoutingShape
from megatron_r1.models.token_dispatcher import (
    KnownCountsDispatcher,
    TokenCounts,
    exchange_token_counts,
)


class RecordedRouting(NamedTuple):
    """The engine's choices for the T tokens of a micro-batch that this rank's routers process.

    Attributes:
        experts: (T, L, topk) uint8 or int16, L MoE layers of this rank.
        is_recorded: (T,) bool, the tokens that have recorded choices. The trainer routes the
            others, unless `local_counts` is there: then `experts` has some for these too.
        local_counts: (L, experts) integers on the host, this rank's tokens to each expert; None
            where the trainer routes some.
        counts: what `token_dispatcher` has to know in each layer; None where some rank routes
            tokens itself, or before `RoutingReplay.exchange_counts`."""

    experts: Tensor
    is_recorded: Tensor
    local_counts: np.ndarray | None = None
    counts: list[TokenCounts] | None = None


@dataclass
class LayerPass:
    """A forward pass of one layer over a micro-batch, and its recomputation.

    Attributes:
        recorded: the engine's choices, if they are replayed.
        chosen: (T, topk) int16, what the forward pass has chosen, where it is recomputed.
        counts: the numbers of tokens for `token_dispatcher`, once the host knows them."""

    recorded: RecordedRouting | None
    chosen: Tensor | None = None
    counts: TokenCounts | None = None


class LayerReplay:
    """The `router_replay` object of a router, and the `source` of its layer's dispatcher.

    Args:
        router: Megatron's router.
        moe_index: the layer's index in `RecordedRouting.experts`; None: choices are replayed in
            recomputations only."""

    def __init__(self, router: torch.nn.Module, moe_index: int | None):
        self.router, self.moe_index = router, moe_index
        self.current: RecordedRouting | None = None
        self.waiting: deque[LayerPass] = deque()
        self.dispatcher: KnownCountsDispatcher | None = None
        self._pass = LayerPass(None)
        self.is_measured = False
        self.num_agreed: Tensor | int = 0
        self.num_compared: Tensor | int = 0

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of the chosen experts and their indices, (T, topk) each, int64 indices.

        Args:
            scores: (T, experts), what the choice is based on.
            topk: the number of experts of a token.
            num_groups: the number of groups of experts, for `default_compute_topk`.
            group_topk: the number of groups of a token, for `default_compute_topk`.
            default_compute_topk: the router's own choice."""
        self._pass = current_pass = self._current_pass()
        if current_pass.chosen is not None:
            experts = current_pass.chosen.long()
            return scores.gather(1, experts), experts
        _, experts = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        if current_pass.recorded is not None:
            experts = self._replay_experts(current_pass.recorded, experts)
        if self._is_recomputed():
            current_pass.chosen = experts.short()
        return scores.gather(1, experts), experts

    def _replay_experts(self, recorded: RecordedRouting, router_choice: Tensor) -> Tensor:
        """Return the experts (T, topk) of every token, `router_choice` where none are recorded."""
        experts = recorded.experts[:, self.moe_index].long()
        count = len(router_choice)
        assert len(experts) == count, f"{len(experts)} recorded for {count} tokens"
        is_recorded = recorded.is_recorded[:, None]
        if self.is_measured:
            is_equal = (experts[:, :, None] == router_choice[:, None, :]).any(-1) & is_recorded
            self.num_agreed = self.num_agreed + is_equal.sum()
            self.num_compared = self.num_compared + is_recorded.sum() * router_choice.shape[1]
        if recorded.local_counts is not None:
            return experts
        return torch.where(is_recorded, experts, router_choice)

    def _current_pass(self) -> LayerPass:
        """Return the pass in progress.

        A recomputed layer first runs without a graph and later again with one, in the same order of
        micro-batches; by then another micro-batch is the current one."""
        if torch.is_grad_enabled() and self.waiting:
            return self.waiting.popleft()
        layer_pass = LayerPass(self.current)
        if self.current is not None and self.current.counts is not None:
            assert self.moe_index is not None, "its choices are not replayed"
            layer_pass.counts = self.current.counts[self.moe_index]
        if self._is_recomputed():
            self.waiting.append(layer_pass)
        return layer_pass

    def _is_recomputed(self) -> bool:
        return self.router.training and not torch.is_grad_enabled()

    def known_counts(self) -> TokenCounts | None:
        """Return the counts of the pass in progress; None: the device has them."""
        return self._pass.counts

    def keep_counts(self, counts: TokenCounts) -> None:
        """Keep the counts of the pass in progress where it is recomputed."""
        if self._is_recomputed():
            self._pass.counts = counts


def _attach_replay(experts: MoELayer, moe_index: int | None) -> LayerReplay:
    """Return the replay of a layer of experts, which its router and dispatcher now call."""
    replay = LayerReplay(experts.router, moe_index)
    experts.router.router_replay = replay
    if isinstance(experts.token_dispatcher, KnownCountsDispatcher):
        replay.dispatcher = experts.token_dispatcher
        replay.dispatcher.source = replay
    return replay


def _recomputes_experts(config: TransformerConfig) -> bool:
    granularity = config.recompute_granularity
    return granularity == "full" or (
        granularity == "selective" and "moe" in config.recompute_modules
    )


class RoutingReplay:
    """Replay in the routers of this rank's chunks: of the engine's choices with a shape, and of a
    forward pass's own where layers of experts are recomputed."""

    def __init__(self, chunks: Sequence[torch.nn.Module], shape: RoutingShape | None):
        self.shape, self.is_on = shape, shape is not None
        self.layers: list[int] = []
        """This rank's MoE layers, as indices into shape.moe_layers."""
        self._chunks: dict[int, list[LayerReplay]] = {}
        self._is_paused = False
        for chunk in chunks:
            model = unwrap_model(chunk)
            replays = self._chunks.setdefault(id(model), [])
            recomputes = _recomputes_experts(model.config)
            for layer in model.decoder.layers:
                if hasattr(layer.mlp, "router") and (shape is not None or recomputes):
                    moe_index = None if shape is None else len(self.layers)
                    replays.append(_attach_replay(layer.mlp, moe_index))
                    if shape is not None:
                        self.layers.append(shape.moe_layers.index(layer.layer_number - 1))
            mtp_block = getattr(model, "mtp", None)
            for mtp_layer in mtp_block.layers if mtp_block is not None and recomputes else ():
                if hasattr(mtp_layer.mtp_model_layer.mlp, "router"):
                    replays.append(_attach_replay(mtp_layer.mtp_model_layer.mlp, None))

    def begin(self, chunk: torch.nn.Module, recorded: RecordedRouting | None) -> None:
        """Prepare a forward pass of `chunk` over the tokens of `recorded`.

        Args:
            chunk: the virtual stage that the pass is of.
            recorded: the experts of each token; None: as the routers choose.
        """
        for replay in self._chunks.get(id(unwrap_model(chunk)), []):
            replay.current = None if self._is_paused or replay.moe_index is None else recorded

    def exchange_counts(
        self, recorded: Sequence[RecordedRouting | None]
    ) -> list[RecordedRouting | None]:
        """Return the choices with the counts of tokens that this rank's dispatchers need.

        Every rank calls it with as many micro-batches, and waits for the device once."""
        layers = [replay for replay in self._layer_replays() if replay.moe_index is not None]
        dispatcher = layers[0].dispatcher if layers else None
        if dispatcher is None or dispatcher.config.moe_router_padding_for_quantization:
            return list(recorded)
        local_counts = [
            routing.local_counts if routing is not None else None for routing in recorded
        ]
        counts = exchange_token_counts(dispatcher, local_counts, len(layers))
        return [
            routing._replace(counts=batch_counts) if routing is not None else None
            for routing, batch_counts in zip(recorded, counts, strict=True)
        ]

    def end(self) -> None:
        """Finish after all passes over all micro-batches."""
        for replay in self._layer_replays():
            assert not replay.waiting, f"{len(replay.waiting)} passes were never recomputed"
            replay.current = None

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Let the trainer route every token inside the block."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @contextlib.contextmanager
    def measure_agreement(self) -> Iterator[None]:
        """Count, inside the block, how many of the engine's choices the routers would make
        themselves, each given the replayed choices of the layers below."""
        for replay in self._layer_replays():
            replay.is_measured, replay.num_agreed, replay.num_compared = True, 0, 0
        try:
            yield
        finally:
            for replay in self._layer_replays():
                replay.is_measured = False

    def agreement(self, device: torch.device) -> dict[str, float]:
        """Return {"routing/agreement": the share of equal choices} of the last measurement; {} when
        nothing was replayed."""
        if not self.is_on:
            return {}
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for replay in self._layer_replays():
            if isinstance(replay.num_compared, Tensor):
                counts += torch.stack([torch.as_tensor(replay.num_agreed), replay.num_compared])
        # Over all ranks: every router of every rank has other tokens or is another layer.
        dist.all_reduce(counts)
        num_agreed, num_compared = counts.tolist()
        return {"routing/agreement": num_agreed / num_compared} if num_compared else {}

    def _layer_replays(self) -> Iterator[LayerReplay]:
        for replays in self._chunks.values():
            yield from replays


def replay_recomputations(chunks: Sequence[torch.nn.Module]) -> None:
    """Let recomputed layers of experts use the experts that their forward pass has chosen.

    Args:
        chunks: this rank's virtual stages."""
    # The routers keep its hooks, so the object itself is not needed again.
    RoutingReplay(chunks, None)
