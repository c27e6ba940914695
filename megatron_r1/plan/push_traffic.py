"""The links of a push in sets of engines: the bytes on them, and the time of set-up and push.

Both follow the plan that a run executes (`push/matching/planned_links.py`), and over NCCL its
rounds (`push/matching/rounds.py`)."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, Self

import numpy as np

from megatron_r1.base.transports import RELAY_BUCKET_BYTES
from megatron_r1.config.model import LoraConfig
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.adapter_table import adapter_table
from megatron_r1.models.weights.layout import Shard
from megatron_r1.models.weights.table import WeightTable
from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.push.matching import EngineLayout, MatchedRegions, TrainerGrid
from megatron_r1.push.matching.adapter_push import PredictedAdapterSharding
from megatron_r1.push.matching.planned_links import EngineSetPlan, engine_sets, plan_sets
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.matching.rounds import RoundSchedule
from megatron_r1.push.matching.tensors import CountBytes

PAIR_REQUESTS = 4
"""Requests to the store for a group of two: each rank sets its address and gets the other's."""
SLOT_BYTES = 90
"""Bytes of a tensor in a published table; 75 to 90 in the tables of DeepSeek-V3."""


@dataclass(frozen=True)
class SetTraffic:
    """The links of a push in sets, and the bytes on them.

    Attributes:
        sent_bytes: bytes out of each trainer rank.
        links_per_trainer_rank: the most links of a trainer rank.
        links_per_engine_rank: the most links of an engine rank.
        num_links: the number of all links.
        num_sets: the number of sets.
        num_engines: the engines of the largest set.
        entering_bytes: most bytes that enter an engine rank from trainer ranks.
        received_bytes: bytes of each rank of an engine, with those that other engines pass on."""

    sent_bytes: list[float]
    links_per_trainer_rank: int
    links_per_engine_rank: int
    num_links: int
    num_sets: int
    num_engines: int
    entering_bytes: float
    received_bytes: list[float]

    @property
    def busiest_sender(self) -> float:
        """The busiest trainer rank's bytes over the average of all trainer ranks."""
        return max(self.sent_bytes) / (sum(self.sent_bytes) / len(self.sent_bytes))

    def seconds(self, rate: float, assumptions: Assumptions) -> float:
        """Return the time of a push through adapters of `rate`: what enters from the busiest
        trainer rank, then rounds in rings."""
        relayed_bytes = max(self.received_bytes) - self.entering_bytes
        rounds = -(-relayed_bytes // (RELAY_BUCKET_BYTES * self.num_engines))
        hops = (self.num_engines - 1) * assumptions.hop_seconds
        return (
            max(max(self.sent_bytes), self.entering_bytes) / rate
            + relayed_bytes / rate
            + rounds * (assumptions.round_seconds + hops)
        )

    def requests(self, engines: EngineLayout, world_size: int, *, over_nccl: bool) -> int:
        """Return the requests to the store when all engines connect (`rendezvous`).

        An engine rank looks for its table, offers it, waits until all is ready, and reads its
        position's plan; over NCCL it reads its rounds, too, and otherwise creates its group.
        Trainer rank 0 reads every offer, and each table once; a trainer rank reports that it is
        prepared, and waits. Each position's table, and plan of a set, is written once.

        Args:
            engines: the layout of the engines.
            world_size: trainer ranks.
            over_nccl: whether one communicator has all ranks."""
        ranks, positions = engines.num_ranks, engines.ranks_per_engine
        engine_requests = ranks * (5 if over_nccl else 4 + 2 * (self.num_engines > 1)) + positions
        trainer_requests = engines.engines + ranks + positions + 2 * world_size * self.num_sets
        plans = self.num_sets * (positions + 1)
        pairs = 0 if over_nccl else PAIR_REQUESTS * self.num_links
        return engine_requests + trainer_requests + plans + pairs

    def setup_seconds(
        self,
        engines: EngineLayout,
        world_size: int,
        num_slots: int,
        assumptions: Assumptions,
        communicator: int = 0,
    ) -> float:
        """Return the time in which all ranks meet.

        Args:
            engines: the layout of the engines.
            world_size: trainer ranks.
            num_slots: tensors in the tables of an engine's ranks, which rank 0 reads and
                broadcasts.
            assumptions: the rates assumed.
            communicator: the ranks of NCCL's largest communicator, or 0 over another transport."""
        tables = num_slots * SLOT_BYTES
        creation_seconds = assumptions.group_seconds + communicator * assumptions.group_rank_seconds
        return (
            self.requests(engines, world_size, over_nccl=bool(communicator))
            / assumptions.store_requests
            + 2 * tables / assumptions.store_bytes
            + assumptions.set_plan_seconds
            + (creation_seconds if communicator else 0)
        )


def round_seconds(schedule: RoundSchedule, rate: float, assumptions: Assumptions) -> float:
    """Return the time of a push in rounds through adapters of `rate`, where each round takes as
    long as its largest bucket.

    Args:
        schedule: the rounds and their buckets.
        rate: bytes per second through an adapter.
        assumptions: the seconds that a round takes besides."""
    bucket_bytes = schedule.largest_buckets()
    return float(np.sum(bucket_bytes / rate + assumptions.round_seconds))


def traffic_of_sets(
    hf_config: HFConfig,
    grid: TrainerGrid,
    engines: EngineLayout,
    stages: list[list[Shard]],
    count: CountBytes,
    max_engines: int,
    *,
    drafts: bool = False,
    lora: LoraConfig | None = None,
) -> SetTraffic:
    """Return the links of a push.

    Args:
        hf_config: the model's config.json.
        grid: the trainer's layout.
        engines: the layout of the engines.
        stages: the shards of the pipeline's stages.
        count: gives the bytes of a tensor.
        max_engines: the most engines of a set.
        drafts: the engines have drafters.
        lora: the adapters, where these alone are pushed."""
    sets = engine_sets(engines.engines, max_engines)
    plans = set_plans(
        hf_config, grid, engines, stages, count, max_engines, drafts=drafts, lora=lora
    )
    trainer_links: Counter[int] = Counter()
    engine_links: Counter[tuple[int, int, int]] = Counter()
    entering_bytes: Counter[tuple[int, int, int]] = Counter()
    sent_bytes, received_bytes = [0.0] * grid.world_size, [0.0] * engines.ranks_per_engine
    for index, plan in enumerate(plans):
        for link in chain.from_iterable(plan):
            engine_rank = index, link.member, link.engine_rank
            trainer_links[link.trainer_rank] += 1
            sent_bytes[link.trainer_rank] += link.num_bytes
            engine_links[engine_rank] += 1
            entering_bytes[engine_rank] += link.num_bytes
            received_bytes[link.engine_rank] += link.num_bytes / len(sets)
    return SetTraffic(
        sent_bytes=sent_bytes,
        links_per_trainer_rank=max(trainer_links.values()),
        links_per_engine_rank=max(engine_links.values()),
        num_links=trainer_links.total(),
        num_sets=len(sets),
        num_engines=max(map(len, sets)),
        entering_bytes=max(entering_bytes.values()),
        received_bytes=received_bytes,
    )


def set_plans(
    hf_config: HFConfig,
    grid: TrainerGrid,
    engines: EngineLayout,
    stages: list[list[Shard]],
    count: CountBytes,
    max_engines: int,
    *,
    drafts: bool = False,
    lora: LoraConfig | None = None,
) -> list[EngineSetPlan]:
    """Return the plan of each set.

    Args:
        hf_config: the model's config.json.
        grid: the trainer's layout.
        engines: the layout of the engines.
        stages: the shards of the pipeline's stages.
        count: gives the bytes of a region of a tensor.
        max_engines: the most engines of a set.
        drafts: whether engines draft with the MTP layers.
        lora: the section `model.lora`, where adapters alone are pushed."""
    chunks = tuple(map(tuple, stages))
    weights = PushedWeights.from_config(hf_config, lora, drafts=drafts)
    return _set_plans(weights, grid, engines, chunks, count, max_engines)


class PushedWeights(NamedTuple):
    """Identifies the weights of a push, as the key of cached plans.

    Fields are the model's config.json, whether its MTP layers are among the weights, and the
    section `model.lora` of adapters that are pushed alone."""

    hf_config_json: str
    drafts: bool
    lora: str | None

    @classmethod
    def from_config(cls, hf_config: HFConfig, lora: LoraConfig | None, *, drafts: bool) -> Self:
        """Return the key of these settings, which are kept as JSON to be hashable.

        Args:
            hf_config: the model's config.json.
            lora: the section `model.lora`, where adapters alone are pushed.
            drafts: whether engines draft with the MTP layers."""
        return cls(json.dumps(hf_config), drafts, None if lora is None else lora.model_dump_json())

    @property
    def adapter_table(self) -> WeightTable | None:
        """The table of the adapters' weights; None where the whole model is pushed."""
        if self.lora is None:
            return None
        return adapter_table(
            json.loads(self.hf_config_json), LoraConfig.model_validate_json(self.lora)
        )

    def predicted_layout(self, layout: EngineLayout) -> PredictedSharding:
        """Return what the ranks of engines in this layout receive."""
        if (table := self.adapter_table) is not None:
            return PredictedAdapterSharding(json.loads(self.hf_config_json), layout, table)
        return PredictedSharding(json.loads(self.hf_config_json), layout, drafts=self.drafts)


@lru_cache(maxsize=8)
def _set_plans(
    weights: PushedWeights,
    grid: TrainerGrid,
    engines: EngineLayout,
    stages: tuple[tuple[Shard, ...], ...],
    count: CountBytes,
    max_engines: int,
) -> list[EngineSetPlan]:
    sharding = weights.predicted_layout(engines)
    matched_regions = MatchedRegions(
        json.loads(weights.hf_config_json), grid, engines, stages, sharding, weights.adapter_table
    )
    return plan_sets(matched_regions, count, engine_sets(engines.engines, max_engines))
