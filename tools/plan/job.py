"""What is planned: a model, a recipe's settings, a layout, hardware. Everything else follows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module

from megatron_r1.config import Config, ParallelConfig
from megatron_r1.models.hf_config import architecture
from megatron_r1.rollout.parallelism import check_engines
from megatron_r1.weights.layout import Shard, stage_shards, table
from megatron_r1.weights.rules import Table
from tools.plan.hardware import Assumptions, Hardware

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Job:
    """One run on `world_size` trainer ranks, a GPU each.

    rollout_gpus: GPUs the engines have to themselves; 0: the trainer's, in turn. response_tokens:
    mean length of a response.
    """

    hf: dict
    config: Config
    world_size: int
    hardware: Hardware
    assumptions: Assumptions = field(default_factory=Assumptions)
    rollout_gpus: int = 0
    response_tokens: int = 8192
    shared: dict = field(default_factory=dict, repr=False, compare=False)
    """What does not change between the layouts of one job and takes a while to count."""

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel

    def with_parallel(self, **changes) -> Job:
        """The same job in another layout."""
        parallel = self.parallel.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"parallel": parallel}))

    @property
    def rules(self) -> Table:
        if "rules" not in self.shared:
            self.shared["rules"] = table(self.hf)
        return self.shared["rules"]

    @property
    def sparse(self) -> list[bool]:
        """Of each decoder layer: whether it has routed experts."""
        if "sparse" not in self.shared:
            kinds = {id(layer): any(r.expert for r in layer) for layer in self.rules.layers}
            self.shared["sparse"] = [kinds[id(layer)] for layer in self.rules.layers]
        return self.shared["sparse"]

    def layers(self, pipeline_rank: int) -> tuple[int, int]:
        """(dense, sparse) decoder layers of all chunks of a pipeline rank."""
        held = [self.sparse[n] for chunk in self.stages[pipeline_rank] for n in chunk.layers]
        return len(held) - sum(held), sum(held)

    @cached_property
    def stages(self) -> list[list[Shard]]:
        """[pipeline rank][virtual stage]; ValueError for a layout that cannot be."""
        return stage_shards(
            self.hf,
            self.parallel.pipeline,
            self.parallel.virtual_pipeline,
            pipeline_layout=self.parallel.pipeline_layout,
            with_mtp=self.with_mtp,
        )

    @property
    def virtual(self) -> int:
        """Model chunks of a pipeline rank."""
        return len(self.stages[0])

    @property
    def fp8(self) -> bool:
        return self.config.fp8.recipe != "none"

    @property
    def data(self) -> int:
        """Data-parallel size: ranks that see different samples."""
        parallel = self.parallel
        return self.world_size // (parallel.tensor * parallel.pipeline * parallel.context)

    @property
    def dense_replicas(self) -> int:
        """Ranks that hold the same attention weights, and share their optimizer state."""
        return self.world_size // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts, and share their optimizer state."""
        parallel = self.parallel
        return self.world_size // (parallel.expert_tensor * parallel.expert * parallel.pipeline)

    @property
    def with_mtp(self) -> bool:
        return self.config.model.mtp != "none" and bool(self.rules.mtp)

    @property
    def has_experts(self) -> bool:
        return bool(self.rules.num_experts)

    @property
    def latent_attention(self) -> bool:
        return bool(self.hf.get("kv_lora_rank"))

    @property
    def parameter_bytes(self) -> int:
        """Of one of the trainer's parameters."""
        return BYTES[self.config.model.dtype]

    @property
    def outputs(self) -> int:
        """Samples of one rollout."""
        return self.config.rl.questions_per_rollout * self.config.rl.group_size

    @property
    def sample_tokens(self) -> int:
        """Mean length of a sample, prompt and response."""
        return self.assumptions.prompt_tokens + self.response_tokens

    @property
    def longest_sample(self) -> int:
        return self.assumptions.prompt_tokens + self.config.rollout.max_response_tokens

    @property
    def microbatch_tokens(self) -> int:
        """Of the largest micro-batch: a sample longer than the limit has one of its own."""
        return max(self.parallel.tokens_per_microbatch, self.longest_sample)

    @property
    def num_microbatches(self) -> int:
        """Of one optimizer step, on each data-parallel rank."""
        tokens = self.outputs / self.config.rl.minibatches * self.sample_tokens
        limit = max(self.parallel.tokens_per_microbatch, self.sample_tokens)
        return max(1, -(-int(tokens) // (self.data * limit)))

    @property
    def slots(self) -> int:
        """Places for micro-batches in the schedule: virtual stages work in rounds of one for each
        pipeline rank, the last filled up with empty ones."""
        if self.virtual == 1:
            return self.num_microbatches
        return -(-self.num_microbatches // self.parallel.pipeline) * self.parallel.pipeline

    @property
    def engine_gpus(self) -> int:
        """GPUs of one engine."""
        return max(1, (self.rollout_gpus or self.world_size) // self.config.rollout.engines)

    def check(self) -> None:
        """Raise ValueError for sizes that do not divide, by name."""
        self.parallel.check_sizes(self.world_size)
        sizes = {
            "tensor_parallel": self.parallel.tensor,
            "expert_parallel": self.parallel.expert,
            "expert_tensor_parallel": self.parallel.expert_tensor,
            "context_parallel": self.parallel.context,
        }
        model = import_module(f"megatron_r1.models.{architecture(self.hf)}")
        for name, size, setting in model.divisions(self.hf, True):
            if size % sizes[setting]:
                key = f"parallel.{setting.removesuffix('_parallel')}"
                raise ValueError(
                    f"{key}={sizes[setting]} does not divide {name}={size}; "
                    f"choose a divisor of {size}"
                )
        if not self.has_experts and self.parallel.expert * self.parallel.expert_tensor > 1:
            raise ValueError(
                f"parallel.expert={self.parallel.expert}: the model has no experts; use 1"
            )
        gpus = self.rollout_gpus or self.world_size
        if gpus % self.config.rollout.engines:
            raise ValueError(
                f"rollout.engines={self.config.rollout.engines} does not divide {gpus} GPUs; "
                "choose a divisor"
            )
        self._check_engines()
        per_step = self.outputs // self.config.rl.minibatches
        if per_step < self.data:
            raise ValueError(
                f"{per_step} samples of an optimizer step cannot be spread over {self.data} "
                "data-parallel ranks; raise parallel.context, .tensor or .pipeline, or lower "
                "rl.minibatches"
            )
        assert self.stages, "building them checks the layout"

    def _check_engines(self) -> None:
        check_engines(self.config, self.hf)
        rollout = self.config.rollout
        if rollout.pipeline > 1:
            raise ValueError(
                f"rollout.pipeline={rollout.pipeline}: engines with stages are not planned for; "
                "use 1"
            )
        ranks = rollout.tensor * rollout.data
        if ranks not in (1, self.engine_gpus):
            raise ValueError(
                f"rollout.tensor={rollout.tensor} x rollout.data={rollout.data} = {ranks}, but an "
                f"engine has {self.engine_gpus} GPUs; change them or rollout.engines"
            )
