"""Routing replay (R3, arXiv 2510.11370): Megatron's routers use the experts the engine chose.

Only the choice is replayed: the weights of the chosen experts are the trainer's own scores,
normalized over the chosen, so gradients reach the router as usual. The expert bias and the limit on
groups affect only the choice and so have no effect on a replayed token.

A router calls the object in its `router_replay` for the top k (moe_utils.py:706, Megatron-Core
0.16.1). Megatron's own class (router_replay.py) replays all tokens or none, and a caller has to set
whether a pass is a forward pass or its recomputation, which is not possible with a schedule that
interleaves the two."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_r1.models.experts import RoutingShape


class RecordedRouting(NamedTuple):
    """The engine's choices for the T tokens of a micro-batch that this rank's routers process.

    Attributes:
        experts: (T, L, topk) uint8 or int16, L MoE layers of this rank.
        known: (T,) bool, the tokens that have recorded choices. The trainer routes the others."""

    experts: Tensor
    known: Tensor


class LayerReplay:
    """The `router_replay` object of a router; `slot` is the layer's index in
    `RecordedRouting.experts`."""

    def __init__(self, router: torch.nn.Module, slot: int):
        self.router, self.slot = router, slot
        self.current: RecordedRouting | None = None
        self.waiting: deque[RecordedRouting | None] = deque()
        self.measures = False
        self.agreed: Tensor | int = 0
        self.asked: Tensor | int = 0

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
        own_scores, own = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        recorded = self._of_this_pass()
        if recorded is None:
            return own_scores, own
        experts = recorded.experts[:, self.slot].long()
        assert len(experts) == len(scores), f"{len(experts)} recorded for {len(scores)} tokens"
        known = recorded.known[:, None]
        if self.measures:
            same = (experts[:, :, None] == own[:, None, :]).any(-1) & known
            self.agreed, self.asked = self.agreed + same.sum(), self.asked + known.sum() * topk
        chosen = torch.where(known, experts, own)
        return scores.gather(1, chosen), chosen

    def _of_this_pass(self) -> RecordedRouting | None:
        """Return the choices for the pass in progress.

        A recomputed layer first runs without a graph and later again with one, in the same order of
        micro-batches; by then another micro-batch is the current one."""
        if torch.is_grad_enabled():
            return self.waiting.popleft() if self.waiting else self.current
        if self.router.training:
            self.waiting.append(self.current)
        return self.current


class Replay:
    """Replay in the routers of this rank's chunks. Without a shape, routers are not changed."""

    def __init__(self, chunks: Sequence[torch.nn.Module], shape: RoutingShape | None):
        self.is_on = shape is not None
        self.layers: list[int] = []
        """This rank's MoE layers, as indices into shape.moe_layers."""
        self._chunks: dict[int, list[LayerReplay]] = {}
        self._paused = False
        if shape is None:
            return
        for chunk in chunks:
            replays = self._chunks.setdefault(id(unwrap_model(chunk)), [])
            for layer in unwrap_model(chunk).decoder.layers:
                if hasattr(layer.mlp, "router"):
                    replay = LayerReplay(layer.mlp.router, slot=len(self.layers))
                    self.layers.append(shape.moe_layers.index(layer.layer_number - 1))
                    layer.mlp.router.router_replay = replay
                    replays.append(replay)

    def begin(self, chunk: torch.nn.Module, recorded: RecordedRouting | None) -> None:
        """Prepare a forward pass of `chunk` over the tokens of `recorded`.

        Args:
            chunk: the virtual stage that the pass is of.
            recorded: the experts of each token; None: as the routers choose.
        """
        for replay in self._chunks.get(id(unwrap_model(chunk)), []):
            replay.current = None if self._paused else recorded

    def end(self) -> None:
        """Finish after all passes over all micro-batches."""
        for replay in self._all():
            assert not replay.waiting, f"{len(replay.waiting)} passes were never recomputed"
            replay.current = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let the trainer route every token inside the block."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Count, inside the block, how many of the engine's choices the routers would make
        themselves, each given the replayed choices of the layers below."""
        for replay in self._all():
            replay.measures, replay.agreed, replay.asked = True, 0, 0
        try:
            yield
        finally:
            for replay in self._all():
                replay.measures = False

    def agreement(self, device: torch.device) -> dict[str, float]:
        """Return {"routing/agreement": the share of equal choices} of the last measurement; {} when
        nothing was replayed."""
        if not self.is_on:
            return {}
        counts = [sum(int(getattr(r, name)) for r in self._all()) for name in ("agreed", "asked")]
        total = torch.tensor(counts, dtype=torch.int64, device=device)
        # Over all ranks: every router of every rank has other tokens or is another layer.
        dist.all_reduce(total)
        agreed, asked = total.tolist()
        return {"routing/agreement": agreed / asked} if asked else {}

    def _all(self) -> Iterator[LayerReplay]:
        for replays in self._chunks.values():
            yield from replays
