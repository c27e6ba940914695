"""The models of a run beside its policy: a critic, a teacher, a reward model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_r1.config.section import Resumable, Section
from megatron_r1.rewards.remote.response_text import Part, check_template


class CriticConfig(Section):
    """PPO's critic, a second model that predicts the return at every token."""

    path: str | None = Field(
        None,
        description="Hugging Face folder it starts from, of a language or a reward model with the "
        "policy's tokenizer; default: the policy's first weights",
    )
    learning_rate: float = Field(1e-5, gt=0, description="the policy's decay holds for it too")
    value_clip: float | None = Field(
        0.2,
        gt=0,
        description="how far a value may move from the rollout's before it is no longer pushed "
        "(arXiv 2005.12729, section 3); null: not limited",
    )
    warmup_steps: int = Field(
        0, ge=0, description="rollouts at the start from which the critic alone learns"
    )


class TeacherConfig(Section):
    """The teacher of on-policy distillation, whose engines score the student's samples."""

    path: str = Field(
        "",
        description="Hugging Face folder of any model vLLM serves, with the student's tokenizer; "
        "what rl.algorithm: on_policy_distillation learns from",
    )
    url: Resumable[list[str]] = Field(
        [],
        description="of vLLM servers that already serve path's model, started with "
        "--enable-scale-out; default: engines of this run",
    )
    engines: Resumable[int] = Field(1, ge=1, description="vLLM servers on the controller's host")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    tensor: Resumable[int] = Field(1, ge=1, description="ranks of an engine that share every layer")
    pipeline: Resumable[int] = Field(1, ge=1, description="stages of layers in an engine")
    data: Resumable[int] = Field(
        1, ge=1, description="copies of tensor x pipeline ranks of an engine"
    )
    expert_parallel: Resumable[bool] = Field(
        False,
        description="spread routed experts whole over tensor x data ranks; else each is split",
    )
    gpu_memory: Resumable[float | None] = Field(
        None, gt=0, le=1, description="share of its GPU's memory that an engine takes"
    )
    max_num_seqs: Resumable[int] = Field(64, gt=0, description="samples an engine scores at once")
    tokens_at_once: Resumable[int] = Field(
        2048, gt=0, description="of one pass; the logits of all of them exist together, in fp32"
    )
    kv_cache_gib: int = Field(1, gt=0, description="KV cache on a CPU, GiB")
    threads: Resumable[int | None] = Field(
        None, ge=1, description="CPU threads per engine; default: 2, and 1 on a machine of 2 cores"
    )
    start_timeout_seconds: float = Field(600.0, gt=0, description="also to wait for a url")
    request_timeout_seconds: float = Field(3600.0, gt=0)
    max_restarts: Resumable[int] = Field(10, ge=0, description="as rollout.max_restarts")
    unresponsive_seconds: Resumable[float] = Field(
        120.0, gt=0, description="an engine that has not answered for so long counts as dead"
    )

    @model_validator(mode="after")
    def _fits_together(self):
        if self.url and not self.path:
            raise ValueError(
                f"teacher.url: {', '.join(self.url)} serves a model whose tokenizer must be the "
                "student's; set teacher.path to its folder, for the check"
            )
        for url in self.url:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"teacher.url: {url} is no address; write http://host:port")
        if self.tokens_at_once < self.max_num_seqs:
            raise ValueError(
                f"teacher.tokens_at_once: {self.tokens_at_once} is less than teacher.max_num_seqs: "
                f"{self.max_num_seqs}, and every sample has a token; raise it or lower the other"
            )
        return self


class RewardModelConfig(Section):
    """The training of a reward model: its data, loss and the part of a response that it scores.

    The defaults are DeepSeek-R1's (arXiv 2501.12948 v2, section 3.1 and supplement B.3).
    """

    data: str = Field(
        "",
        description="JSONL or Parquet of {question, chosen, rejected} or of {question, response, "
        "label}; required by reward-model. See docs/reward_models.md",
    )
    kind: Literal["pairwise", "pointwise"] = Field(
        "pairwise", description="the loss: Bradley-Terry on pairs, or cross entropy on labels"
    )
    part: Part | None = Field(
        None,
        description="of a response that is scored; default: summary for pairwise (R1's helpful), "
        "response for pointwise (its safety)",
    )
    template: str | None = Field(
        None,
        description="text with {question} and {response}, special tokens included; the score is "
        "read at its last token; default: the tokenizer's chat template",
    )
    max_chars: int = Field(
        20_000, ge=100, description="a longer response is shown without its middle, as in serving"
    )
    max_tokens: int | None = Field(
        None, gt=0, description="longer texts are left out; default: the model's own limit"
    )
    epochs: float | None = Field(
        None, gt=0, description="instead of run.steps: passes over the training rows (the paper: 1)"
    )
    batch_size: int = Field(256, gt=0, description="pairs, or labelled responses, per step")
    heldout_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of the questions that is held out, by their text"
    )

    @field_validator("template")
    @classmethod
    def _has_its_places(cls, template: str | None) -> str | None:
        return check_template(template)

    @property
    def shown(self) -> Part:
        """The part of a response that is scored."""
        return self.part or ("summary" if self.kind == "pairwise" else "response")
