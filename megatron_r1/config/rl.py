"""Rollouts, their rewards, and the RL algorithm.

The defaults are DeepSeek-R1-Zero's (arXiv 2501.12948 v2, section 2 and supplement B).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_r1.config import algorithms
from megatron_r1.config.section import MayChange, Resumable, Section
from megatron_r1.rewards.combine import DEFAULT_WEIGHTS, Weight, read_weights
from megatron_r1.rewards.options import read_options


class RolloutConfig(Section):
    engines: Resumable[int] = Field(
        1, ge=1, description="vLLM servers; with placement: hosts those waited for, more may join"
    )
    placement: Resumable[Literal["local", "hosts"]] = Field(
        "local",
        description="where engines run: the controller's host, or hosts that come to it "
        "(`python -m megatron_r1.fleet.host`). See docs/slurm.md",
    )
    hosts_port: Resumable[int] = Field(
        0, ge=0, le=65_535, description="where engine hosts come to; 0: any free one"
    )
    hosts_address: Resumable[str | None] = Field(
        None, description="of the controller's host, for engine hosts; default: its name"
    )
    host_silence_seconds: Resumable[float] = Field(
        30.0, gt=0, description="a host that has not been heard from for so long has vanished"
    )
    hosts_per_engine: Resumable[int] = Field(
        1,
        ge=1,
        description="hosts that share an engine's copies (data), with placement: hosts; an engine "
        "gets all of them at once",
    )
    tensor: Resumable[int] = Field(1, ge=1, description="ranks of an engine that share every layer")
    pipeline: Resumable[int] = Field(1, ge=1, description="stages of layers in an engine")
    data: Resumable[int] = Field(
        1, ge=1, description="copies of tensor x pipeline ranks behind one engine's address"
    )
    expert_parallel: Resumable[bool] = Field(
        False,
        description="spread routed experts whole over tensor x data ranks; else each is split",
    )
    colocated: Resumable[bool] = Field(
        False,
        description="engines sleep on the trainer's own GPUs while it computes; see "
        "docs/rollout.md",
    )
    gpu_memory: Resumable[float | None] = Field(
        None,
        gt=0,
        le=1,
        description="share of its GPU's memory that an engine takes; default: vLLM's own",
    )
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_response_tokens: int = Field(32_768, gt=0)
    max_model_len: int | None = Field(
        None, description="tokens, prompt and response; default: the model's own limit"
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_num_seqs: int = Field(256, gt=0, description="sequences an engine decodes at once")
    kv_cache_gib: int = Field(1, gt=0, description="KV cache on a CPU, GiB")
    plain_matrices: bool = Field(
        False,
        description="keep matrices unpacked on a CPU: faster pushes, slower generation",
    )
    threads: Resumable[int | None] = Field(
        None, ge=1, description="CPU threads per engine; default: 2, and 1 on a machine of 2 cores"
    )
    start_timeout_seconds: float = Field(600.0, gt=0)
    request_timeout_seconds: float = Field(3600.0, gt=0)
    max_restarts: Resumable[int] = Field(
        10,
        ge=0,
        description="dead, slow or garbling engines replaced while a command runs; a death after "
        "that stops the run",
    )
    unresponsive_seconds: Resumable[float] = Field(
        120.0, gt=0, description="an engine that has not answered for so long counts as dead"
    )

    @model_validator(mode="after")
    def _spreads_over_hosts(self) -> RolloutConfig:
        hosts = self.hosts_per_engine
        if hosts > 1 and self.placement != "hosts":
            raise ValueError(
                f"rollout.hosts_per_engine: {hosts} needs engine hosts to spread an engine over; "
                "set rollout.placement: hosts, or rollout.hosts_per_engine: 1"
            )
        if self.data % hosts:
            raise ValueError(
                f"rollout.hosts_per_engine: {hosts} does not divide rollout.data: {self.data}, the "
                "copies that the hosts share out; choose a divisor"
            )
        return self


class RewardsConfig(Section):
    weights: dict[str, float | Weight] = Field(
        dict(DEFAULT_WEIGHTS),
        description="reward = sum of weight x term: a number, or {weight, from_step, to_step}",
    )
    # The addresses of served models may change, for where they run decides nothing.
    options: Annotated[
        dict[str, dict[str, Any]], MayChange(("helpful.url", "judge.url", "safety.url"))
    ] = Field(
        default_factory=dict, description="reward: its options, such as language: {target: zh}"
    )
    max_ungraded: Resumable[float] = Field(
        0.1,
        ge=0,
        le=1,
        description="share of a rollout's answers that graders may fail on, rounded up; with more "
        "the run stops",
    )
    workers: Resumable[int] = Field(2, ge=1, description="grader processes")
    timeout_seconds: float = Field(
        5.0, gt=0, description="for one answer; then its grader is killed and it gets 0"
    )
    memory_gib: float = Field(4.0, gt=0, description="address space of one grader")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 1024**3)

    @field_validator("weights", mode="before")
    @classmethod
    def _weights(cls, weights: Any) -> Any:
        return read_weights(weights) if isinstance(weights, dict) else weights

    @field_validator("options", mode="before")
    @classmethod
    def _options(cls, options: Any) -> Any:
        return read_options(options) if isinstance(options, dict) else options


class RLConfig(Section):
    preset: Literal["r1_zero", "grpo_v1"] = Field(
        "r1_zero", description="values below that a recipe leaves out"
    )
    algorithm: str = Field(
        "grpo",
        description="the policy-gradient estimator, with its own defaults for what recipe and "
        f"preset leave out: {', '.join(algorithms.NAMES)}. See docs/algorithms.md",
    )
    group_size: int = Field(
        16, ge=1, description="outputs per question, G; 2 or more where a group is the baseline"
    )
    questions_per_rollout: int = Field(
        512, gt=0, description="512 x 16 = the paper's 8,192 outputs"
    )
    minibatches: int = Field(16, gt=0, description="optimizer steps per rollout, one inner epoch")
    clip_low: float = Field(
        10.0, gt=0, description="epsilon: the ratio is clipped below 1 - clip_low"
    )
    clip_high: float = Field(
        10.0, gt=0, description="epsilon: the ratio is clipped above 1 + clip_high"
    )
    dual_clip: float | None = Field(
        None, gt=1, description="a negative advantage's ratio counts at most this; null: no limit"
    )
    ratio_level: Literal["token", "sequence"] = Field(
        "token", description="sequence: one ratio per output, the mean of its logarithm (GSPO)"
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="weigh by trainer's over engine's probability, at most this; null: do not",
    )
    kl_beta: float = Field(
        0.001,
        ge=0,
        description="weight of the estimate of KL to the reference, in the loss; of rloo, "
        "reinforce_pp and ppo in the reward",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k3", description="in loss and metrics (in a reward it is k1); k3: the paper's"
    )
    entropy_coef: float = Field(0.0, ge=0, description="weight of an entropy bonus")
    reference_refresh: int = Field(
        400, ge=0, description="optimizer steps between replacing the reference; 0: never"
    )
    staleness: int = Field(
        0,
        ge=0,
        description="versions a sampled token may be behind the policy that trains on it; 0: "
        "rollout and training take turns, 1: one step off, more: further ahead",
    )
    dynamic_sampling: bool = Field(
        False, description="replace groups whose outputs all have the same reward (DAPO)"
    )
    dynamic_sampling_rounds: int = Field(
        4, ge=1, description="times prompts are drawn for one rollout, before it is filled up"
    )
    advantage_std: Literal["group", "batch", "none"] = Field(
        "group",
        description="divide by the standard deviation of the group, of the rollout, or not",
    )
    advantage_epsilon: float = Field(1e-6, ge=0, description="added to the standard deviation")
    loss_average: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="sequence: each output weighs the same (GRPO, eq. 1); token: each token "
        "(DAPO); constant: each token, over max_response_tokens per output (Dr. GRPO)",
    )
    discount: float = Field(
        1.0,
        ge=0,
        le=1,
        description="gamma: of what follows a token (rloo, reinforce_pp, ppo, "
        "on_policy_distillation)",
    )
    gae_lambda: float = Field(
        1.0, ge=0, le=1, description="lambda of generalized advantage estimation (ppo)"
    )
    overlong_buffer: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of max_response_tokens, at its end, over which a growing punishment is "
        "taken from the reward (DAPO: 0.2); 0: none",
    )
    overlong_penalty: float = Field(
        1.0, ge=0, description="that punishment at max_response_tokens (DAPO, eq. 13: 1)"
    )

    routing_replay: bool = Field(
        False,
        description="train every token through the experts the engine chose for it; a mixture of "
        "experts only. See docs/routing_replay.md",
    )

    sample_log: Resumable[bool] = Field(
        True,
        description="write every finished group down, so that a run that is killed does not sample "
        "it again; needs the disk of the steps since the oldest checkpoint kept",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_algorithm(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("algorithm", ""), str):
            return given
        return {**algorithms.rules_of(given.get("algorithm", "grpo")).defaults, **given}

    @model_validator(mode="after")
    def _fits_the_algorithm(self) -> RLConfig:
        algorithm = algorithms.rules_of(self.algorithm)
        if self.group_size < algorithm.min_group_size:
            raise ValueError(
                f"rl.group_size: must be greater than or equal to {algorithm.min_group_size}, got "
                f"{self.group_size}: the group is {self.algorithm}'s baseline"
            )
        if self.advantage_std not in algorithm.advantage_stds:
            raise ValueError(
                f"rl.advantage_std: {self.advantage_std} is not what {self.algorithm} does; use "
                f"{' or '.join(algorithm.advantage_stds)}, or leave it out"
            )
        if self.dual_clip is not None and not algorithm.dual_clip:
            raise ValueError(
                f"rl.dual_clip: {self.dual_clip:g}: {self.algorithm} clips its weight on either "
                "side already; leave it out"
            )
        if self.dynamic_sampling and (self.group_size == 1 or algorithm.teacher):
            why = (
                "learns from its teacher, not from rewards that differ"
                if algorithm.teacher
                else "with rl.group_size: 1 has no groups whose rewards could differ"
            )
            raise ValueError(
                f"rl.dynamic_sampling: {self.algorithm} {why}, so that nearly all that is sampled "
                "would be thrown away; set it to false"
            )
        return self

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The settings of the algorithm's loss, except max_response_tokens."""
        names = (
            "clip_low",
            "clip_high",
            "dual_clip",
            "ratio_level",
            "importance_cap",
            "kl_beta",
            "kl_estimator",
            "entropy_coef",
        )
        settings = {name: getattr(self, name) for name in names}
        if algorithms.rules_of(self.algorithm).kl_in_reward:
            settings["kl_beta"] = 0.0
        return {"average": self.loss_average, **settings}

    @property
    def token_settings(self) -> dict[str, Any]:
        """The settings of the algorithm's token advantages."""
        names = ("kl_beta", "discount", "gae_lambda", "advantage_std", "advantage_epsilon")
        return {name: getattr(self, name) for name in names}


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "r1_zero": {},
    "grpo_v1": {
        "rl": {
            "group_size": 64,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "kl_beta": 0.04,
            "reference_refresh": 0,
        },
    },
}
