"""The job to plan: a model, a recipe's settings, a layout and hardware."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_r1.config import Config, ParallelConfig, Verb
from megatron_r1.config.algorithms import find_rules
from megatron_r1.models.hf_config import HFConfig, sparse_layers
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.memory import BYTES
from megatron_r1.models.weights.adapter_table import adapter_table
from megatron_r1.models.weights.layout import Shard, recipe_stages
from megatron_r1.models.weights.table import WeightTable, weight_table
from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.plan.hardware import Hardware


def text_limit(config: Config, hf_config: HFConfig) -> int:
    """Return the most tokens of a reward model's training text."""
    return config.reward_model.max_tokens or hf_config["max_position_embeddings"]


@dataclass(frozen=True)
class Calibration:
    """The numbers that --calibrate replaced.

    Attributes:
        file: what it names; None: nothing is replaced.
        names: the replaced numbers of `Hardware` and `Assumptions`.
        num_gpus: how many GPUs measured them."""

    file: Path | None = None
    names: frozenset[str] = frozenset()
    num_gpus: int = 1


@dataclass(frozen=True)
class PlannedJob:
    """One run on `world_size` trainer ranks, one GPU each.

    Attributes:
        hf_config: the model's config.json.
        config: the recipe.
        world_size: trainer ranks, one GPU each.
        hardware: rates and memory of a GPU and its share of a node.
        assumptions: numbers of the estimate that no table gives.
        rollout_gpus: the engines' own GPUs; 0: they take turns on the trainer's.
        response_tokens: mean length of a response, or of an example without its prompt.
        verb: rl and sample have engines, all but sample have a trainer.
        keeps_reference: whether any part of `rl.schedule` has a KL penalty: the reference is then
            kept in all.
        calibration: the numbers of `hardware` and `assumptions` that --calibrate replaced.
        plain_megatron: whether a published run's trainer is plain Megatron-Core, whose host waits
            for the device where this project's does not.
        count_cache: cache of counts that are slow to compute and equal for all layouts of one job.
    """

    hf_config: HFConfig
    config: Config
    world_size: int
    hardware: Hardware
    assumptions: Assumptions = field(default_factory=Assumptions)
    rollout_gpus: int = 0
    response_tokens: int = 8192
    verb: Verb = "rl"
    keeps_reference: bool = False
    calibration: Calibration = field(default_factory=Calibration, compare=False)
    plain_megatron: bool = False
    count_cache: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def parallel(self) -> ParallelConfig:
        """The recipe's layout of the trainer."""
        return self.config.parallel

    def with_parallel(self, **changes: Any) -> PlannedJob:
        """Return the same job in another layout."""
        return replace(self, config=self.config.with_changes(parallel=changes))

    @property
    def num_gpus(self) -> int:
        """The GPUs of trainer and engines."""
        return self.world_size + self.rollout_gpus

    def with_gpus(self, world_size: int) -> PlannedJob:
        """Return the same job on `world_size` GPUs; the number of multi-GPU engines is adapted."""
        rollout = self.config.rollout
        ranks = rollout.tensor_parallel * rollout.data_parallel
        if self.rollout_gpus or ranks == 1:
            return replace(self, world_size=world_size)
        config = self.config.with_changes(rollout={"engines": world_size // ranks})
        return replace(self, world_size=world_size, config=config)

    @property
    def weight_table(self) -> WeightTable:
        """The weight table of the model (`models.weights.table`)."""
        if "weight_table" not in self.count_cache:
            self.count_cache["weight_table"] = weight_table(self.hf_config)
        return self.count_cache["weight_table"]

    @property
    def adapters(self) -> WeightTable | None:
        """The weight table of the adapters, if they are trained instead of the model's weights."""
        if (lora := self.config.model.lora) is None:
            return None
        if "adapters" not in self.count_cache:
            self.count_cache["adapters"] = adapter_table(self.hf_config, lora)
        return self.count_cache["adapters"]

    @cached_property
    def is_sparse_layer(self) -> list[bool]:
        """Whether each decoder layer has routed experts."""
        return sparse_layers(self.hf_config)

    def num_layers_of_kinds(self, pipeline_rank: int) -> tuple[int, int]:
        """Return the numbers of (dense, sparse) decoder layers on a pipeline rank."""
        sparsity = [
            self.is_sparse_layer[n]
            for chunk in self.pipeline_stages[pipeline_rank]
            for n in chunk.layers
        ]
        return len(sparsity) - sum(sparsity), sum(sparsity)

    @cached_property
    def pipeline_stages(self) -> list[list[Shard]]:
        """The layers by [pipeline rank][virtual stage].

        Raises:
            ValueError: an impossible layout.
        """
        return recipe_stages(self.config, self.hf_config)

    @property
    def num_model_chunks(self) -> int:
        """Number of model chunks of a pipeline rank."""
        return len(self.pipeline_stages[0])

    @property
    def data_parallel_size(self) -> int:
        """Data-parallel size: the number of ranks with different samples."""
        return self.parallel.data_parallel_size(self.world_size)

    @property
    def data_context_parallel_size(self) -> int:
        """Number of ranks with the same attention weights, which share their optimizer state."""
        return self.world_size // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def expert_data_parallel_size(self) -> int:
        """Number of ranks with the same experts, which share their optimizer state."""
        parallel = self.parallel
        return self.world_size // (parallel.expert_tensor * parallel.expert * parallel.pipeline)

    @property
    def optimizer_shards(self) -> tuple[int, int]:
        """Ranks that hold the same dense, and the same expert, parameters."""
        return self.data_context_parallel_size, self.expert_data_parallel_size

    @property
    def with_mtp(self) -> bool:
        """Whether MTP layers are loaded."""
        return self.config.model.mtp != "none" and bool(self.weight_table.mtp)

    @property
    def has_experts(self) -> bool:
        """Whether the model has routed experts."""
        return bool(self.weight_table.num_experts)

    @property
    def splits_sequences(self) -> bool:
        """Whether tensor ranks share the tokens between matrices."""
        return self.parallel.splits_sequences(self.has_experts)

    def tokens_per_tensor_rank(self, tokens: float) -> float:
        """Return the tokens of a rank where tensor ranks share the sequence between matrices."""
        return tokens / self.parallel.tensor if self.splits_sequences else tokens

    @property
    def latent_attention(self) -> bool:
        """Whether keys and values are compressed, as DeepSeek-V3's are."""
        return bool(self.hf_config.get("kv_lora_rank"))

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one of the trainer's parameters."""
        return BYTES[self.config.model.dtype]

    @property
    def trains(self) -> bool:
        """Whether the verb trains a model."""
        return self.verb != "sample"

    @property
    def generates(self) -> bool:
        """Whether the verb samples responses."""
        return self.verb in ("rl", "sample")

    @property
    def computes_ref_logprobs(self) -> bool:
        """Whether a step of `config` computes log-probabilities under the reference."""
        return self.verb == "rl" and self.config.rl.kl_beta > 0 and not self.is_critic

    @property
    def is_critic(self) -> bool:
        """Whether this is the plan of an RL run's critic."""
        return self.verb == "rl" and self.config.model.head == "score"

    @cached_property
    def critic(self) -> PlannedJob | None:
        """PPO's critic on the same ranks, as a job that values and trains on this one's samples;
        None for algorithms without a critic."""
        if self.verb != "rl" or self.is_critic or not find_rules(self.config.rl.algorithm).critic:
            return None
        config = self.config.critic_run_config()
        hf_config = read_hf_config(config.model.path, "score", "critic.path")
        return replace(self, hf_config=hf_config, config=config, count_cache={})

    @property
    def num_responses(self) -> int:
        """Samples of one rollout (rl), of one batch (sft, reward-model), or of the run (sample)."""
        config = self.config
        if self.verb == "sft":
            return config.sft.batch_size
        if self.verb == "reward-model":
            pairwise = config.reward_model.kind == "pairwise"
            return config.reward_model.batch_size * (2 if pairwise else 1)
        if self.verb == "sample":
            return (config.data.num_train or self.assumptions.questions) * config.sample.samples
        return config.rl.prompts_per_rollout * config.rl.group_size

    @property
    def num_steps(self) -> int | None:
        """Steps of the run; None if epochs of the data decide (sft.epochs, reward_model.epochs)."""
        config = self.config
        epochs = {"sft": config.sft.epochs, "reward-model": config.reward_model.epochs}
        return config.run.steps if epochs.get(self.verb) is None else None

    @property
    def num_minibatches(self) -> int:
        """Optimizer steps on one rollout or batch."""
        return self.config.rl.minibatches if self.verb == "rl" else 1

    @property
    def mean_sample_tokens(self) -> int:
        """Mean length of a sample: prompt and response."""
        return self.assumptions.prompt_tokens + self.response_tokens

    @property
    def max_sample_tokens(self) -> int:
        """Tokens of the longest sample, prompt included."""
        return self.assumptions.prompt_tokens + self.max_response_tokens

    @property
    def max_response_tokens(self) -> int:
        """Tokens of the longest response, or text to score."""
        if self.verb == "reward-model":
            return max(1, text_limit(self.config, self.hf_config) - self.assumptions.prompt_tokens)
        return self.config.rollout.max_response_tokens

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of the largest micro-batch: a sample longer than the limit has one of its own."""
        return max(self.parallel.microbatch_tokens, self.max_sample_tokens)

    @property
    def update_samples(self) -> float:
        """Samples of one optimizer step, all replicas together: the responses of a rollout by
        mini-batches."""
        return self.num_responses / self.num_minibatches

    @property
    def mean_microbatch_tokens(self) -> float:
        """Tokens of a mean micro-batch on a rank: context parallelism divides them."""
        tokens = self.update_samples / self.data_parallel_size * self.mean_sample_tokens
        return tokens / self.num_microbatches / self.parallel.context

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one optimizer step on each data-parallel rank."""
        tokens = self.update_samples * self.mean_sample_tokens
        limit = max(self.parallel.microbatch_tokens, self.mean_sample_tokens)
        return max(1, -(-int(tokens) // (self.data_parallel_size * limit)))

    @property
    def schedule_slots(self) -> int:
        """Micro-batch slots of the schedule: virtual stages work in rounds of one micro-batch per
        pipeline rank, and the last round is filled with empty ones."""
        if self.num_model_chunks == 1:
            return self.num_microbatches
        return -(-self.num_microbatches // self.parallel.pipeline) * self.parallel.pipeline

    @property
    def engine_gpus(self) -> int:
        """GPUs of one engine: an equal share of the engines' own, or of the trainer's where they
        take turns."""
        return max(1, (self.rollout_gpus or self.world_size) // self.config.rollout.engines)
