"""Section `rollout`: the vLLM engines that sample from the policy."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.engine import EngineConfig
from megatron_r1.config.section import Resumable, Scheduled, Section


class SpeculativeConfig(Section):
    """Speculative decoding: tokens are drafted, and the model verifies them in one pass.

    Samples have the model's distribution for any drafts."""

    method: Literal["none", "mtp", "ngram", "suffix"] = "none"
    """where drafts come from: mtp, the model's own MTP layer; ngram, the text so far where its last
    5 tokens occurred before; suffix, all responses so far (needs the package arctic-inference)"""
    tokens: int = Field(1, ge=1, le=64)
    """most tokens drafted at once; with mtp a multiple of the model's MTP layers"""


class RolloutConfig(EngineConfig):
    """The engines that sample from the policy: how many, where, and what is sampled."""

    engines: Resumable[int] = Field(1, ge=1)
    """number of vLLM servers; with placement: hosts the run waits for so many, and more may join"""
    placement: Resumable[Literal["local", "hosts"]] = "local"
    """where engines run: on the controller's node, or by engine hosts that connect to it (`python
    -m megatron_r1.engines.fleet.host`). See docs/slurm.md"""
    hosts_port: Resumable[int] = Field(0, ge=0, le=65_535)
    """port of the controller that engine hosts connect to; 0: any free one"""
    hosts_address: Resumable[str | None] = None
    """address at which engine hosts reach the controller's node; default: its name"""
    host_silence_seconds: Resumable[float] = Field(30.0, gt=0)
    """an engine host that has not been heard from for so long has vanished"""
    hosts_per_engine: Resumable[int] = Field(1, ge=1)
    """engine hosts that one engine's copies (data_parallel) are spread over, all taken at once;
    needs placement: hosts"""
    colocated: Resumable[bool] = False
    """engines sleep on the trainer's own GPUs while it computes; see docs/engines.md"""
    temperature: Scheduled[float] = Field(1.0, gt=0)
    """of sampling, and of the trainer's softmax"""
    top_p: Scheduled[float] = Field(1.0, gt=0, le=1)
    """sample from this share of the probability; below 1, rl needs top_k too, and its trainer's
    softmax is over the same tokens"""
    top_k: Scheduled[int | None] = Field(None, ge=1)
    """sample from so many of the likeliest tokens; default: from all. rl gets the ids that a cut
    keeps with each token, 4 bytes each (docs/engines.md)"""
    min_p: Scheduled[float] = Field(0.0, ge=0, lt=1)
    """leave out tokens less likely than this share of the likeliest one's probability; in rl with
    top_k"""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """strings that end a response, besides the model's end tokens: ["</answer>"]. The token that
    completes one is the last, and is trained on"""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    """tokens that end a response, besides the model's end tokens; the last, and trained on"""
    max_response_tokens: Scheduled[int] = Field(32_768, gt=0)
    """a longer response is cut off here"""
    max_model_len: int | None = None
    """most tokens of prompt and response together; default: the model's own limit"""
    max_num_seqs: int = Field(256, gt=0)
    """sequences an engine decodes at once"""
    redundant_experts: Resumable[int] = Field(0, ge=0)
    """copies of routed experts that an engine has besides the model's own, and places where they
    are most used (vLLM's balancer; arXiv 2501.12948 v2, supplement B.1); needs expert_parallel"""
    kv_block_tokens: Resumable[int | None] = Field(None, ge=32, multiple_of=32)
    """tokens of a block of the KV cache; a group shares the whole blocks of its prompt.
    Default: vLLM's; its 128 on a CPU are too long for most prompts to be shared"""
    speculative: Resumable[SpeculativeConfig] = SpeculativeConfig()
    """speculative decoding; by default none"""
    plain_matrices: bool = False
    """keep matrices unpacked on a CPU: faster pushes, slower generation"""

    @property
    def uses_sampling_mask(self) -> bool:
        """Whether samples are drawn from a part of the vocabulary."""
        return self.top_p < 1 or self.top_k is not None or self.min_p > 0

    @property
    def drafts_by_mtp(self) -> bool:
        """Whether the model's own MTP layer makes the drafts."""
        return self.speculative.method == "mtp"

    @model_validator(mode="after")
    def _spreads_over_hosts(self) -> Self:
        hosts = self.hosts_per_engine
        if hosts > 1 and self.placement != "hosts":
            raise UserError(
                f"rollout.hosts_per_engine: {hosts} needs engine hosts to spread an engine over; "
                "set rollout.placement: hosts, or rollout.hosts_per_engine: 1",
                key="rollout.hosts_per_engine",
                cause=Cause.CONFLICT,
            )
        if self.data_parallel % hosts:
            raise UserError(
                f"rollout.hosts_per_engine: {hosts} does not divide rollout.data_parallel: "
                f"{self.data_parallel}, the "
                "copies that the hosts share out; choose a divisor",
                key="rollout.hosts_per_engine",
                cause=Cause.INDIVISIBLE,
            )
        return self
