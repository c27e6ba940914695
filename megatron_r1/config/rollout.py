"""The vLLM engines of a run: those that sample from the policy, and those of a teacher; and section
`push`: how the policy's weights travel to them, and how each push is checked."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.transports import TRANSPORTS, TransportName
from megatron_r1.config.section import Resumable, Section

LAYOUT = {"tensor", "pipeline", "data", "expert_parallel"}
"""The keys that say how an engine's ranks divide the model."""


class EngineConfig(Section):
    """Settings that the engines of rollouts and of a teacher share."""

    tensor: Resumable[int] = Field(1, ge=1)
    """ranks of an engine that share every layer"""
    pipeline: Resumable[int] = Field(1, ge=1)
    """stages of layers in an engine"""
    data: Resumable[int] = Field(1, ge=1)
    """copies of tensor x pipeline ranks behind one engine's address"""
    expert_parallel: Resumable[bool] = False
    """spread routed experts whole over tensor x data ranks; else each is split"""
    gpu_memory: Resumable[float | None] = Field(None, gt=0, le=1)
    """share of its GPU's memory that an engine takes; default: vLLM's own"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of an engine's weights and products"""
    kv_cache_gib: int = Field(1, gt=0)
    """KV cache on a CPU, GiB"""
    threads: Resumable[int | None] = Field(None, ge=1)
    """CPU threads per engine; default: 2, and 1 on a machine of 2 cores"""
    start_timeout_seconds: float = Field(600.0, gt=0)
    """limit for an engine to load its weights and answer"""
    request_timeout_seconds: float = Field(3600.0, gt=0)
    """limit for one request"""
    max_restarts: Resumable[int] = Field(10, ge=0)
    """how many dead, slow or garbling engines a command replaces; a death after that stops the
    run"""
    unresponsive_seconds: Resumable[float] = Field(120.0, gt=0)
    """an engine that has not answered for so long counts as dead"""
    vllm: Resumable[dict[str, Any]] = {}
    """further arguments of `vllm serve`, by their names: {kv_cache_dtype: fp8, all2all_backend:
    deepep_low_latency, compilation_config: {cudagraph_mode: FULL}}; vLLM's parser checks them
    before anything starts. See docs/engines.md"""


class SpeculativeConfig(Section):
    """Speculative decoding: tokens are drafted, and the model verifies them in one pass. Samples
    have the model's distribution for any drafts."""

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
    """where engines run: on the controller's host, or on hosts that connect to it (`python -m
    megatron_r1.engines.fleet.host`). See docs/slurm.md"""
    hosts_port: Resumable[int] = Field(0, ge=0, le=65_535)
    """port of the controller that engine hosts connect to; 0: any free one"""
    hosts_address: Resumable[str | None] = None
    """address at which engine hosts reach the controller's host; default: its name"""
    host_silence_seconds: Resumable[float] = Field(30.0, gt=0)
    """a host that has not been heard from for so long has vanished"""
    hosts_per_engine: Resumable[int] = Field(1, ge=1)
    """hosts that one engine's copies (data) are spread over, all taken at once; needs placement:
    hosts"""
    colocated: Resumable[bool] = False
    """engines sleep on the trainer's own GPUs while it computes; see docs/engines.md"""
    temperature: float = Field(1.0, gt=0)
    """of sampling, and of the trainer's softmax"""
    top_p: float = Field(1.0, gt=0, le=1)
    """sample from this share of the probability; below 1, rl needs top_k too, and its trainer's
    softmax is over the same tokens"""
    top_k: int | None = Field(None, ge=1)
    """sample from so many of the likeliest tokens; default: from all. rl gets the ids that a cut
    keeps with each token, 4 bytes each (docs/engines.md)"""
    min_p: float = Field(0.0, ge=0, lt=1)
    """leave out tokens less likely than this share of the likeliest one's probability"""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """strings that end a response, besides the model's end tokens: ["</answer>"]. The token that
    completes one is the last, and is trained on"""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    """tokens that end a response, besides the model's end tokens; the last, and trained on"""
    max_response_tokens: int = Field(32_768, gt=0)
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
    def is_cut(self) -> bool:
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
        if self.data % hosts:
            raise UserError(
                f"rollout.hosts_per_engine: {hosts} does not divide rollout.data: {self.data}, the "
                "copies that the hosts share out; choose a divisor",
                key="rollout.hosts_per_engine",
                cause=Cause.INDIVISIBLE,
            )
        return self


class TeacherConfig(EngineConfig):
    """The teacher of on-policy distillation, whose engines score the student's samples."""

    path: str = ""
    """Hugging Face folder of the teacher, which rl.algorithm: on_policy_distillation learns from:
    any model that vLLM serves and that has the student's tokenizer"""
    url: Resumable[list[str]] = []
    """addresses of vLLM servers that already serve path's model, started with --enable-scale-out;
    default: the run starts engines of its own"""
    engines: Resumable[int] = Field(1, ge=1)
    """vLLM servers on the controller's host"""
    max_num_seqs: Resumable[int] = Field(64, gt=0)
    """sequences an engine scores at once"""
    tokens_at_once: Resumable[int] = Field(2048, gt=0)
    """tokens that an engine scores in one pass; the logits of all of them exist together, in
    fp32"""
    start_timeout_seconds: float = Field(600.0, gt=0)
    """limit for the start of an engine, and for a url to be reached"""

    @model_validator(mode="after")
    def _fits_together(self):
        if self.url and not self.path:
            raise UserError(
                f"teacher.url: {', '.join(self.url)} serves a model whose tokenizer must be the "
                "student's; set teacher.path to its folder, for the check",
                key="teacher.path",
                cause=Cause.MISSING,
            )
        for url in self.url:
            if not url.startswith(("http://", "https://")):
                raise UserError(
                    f"teacher.url: {url} is no address; write http://host:port",
                    key="teacher.url",
                    cause=Cause.MALFORMED,
                )
        if self.tokens_at_once < self.max_num_seqs:
            raise UserError(
                f"teacher.tokens_at_once: {self.tokens_at_once} is less than teacher.max_num_seqs: "
                f"{self.max_num_seqs}, and every sample has a token; raise it or lower the other",
                key="teacher.tokens_at_once",
                cause=Cause.CONFLICT,
            )
        return self


class PushConfig(Section):
    """How weights travel to the engines, and how each push is verified."""

    transport: Resumable[TransportName] = "shm"
    """shm, or cuda_ipc between GPUs, if all ranks are on one host; gloo or nccl for many hosts. See
    docs/push.md"""
    fp8: bool = False
    """quantize projections on their way, in blocks of 128 x 128: half of bf16's bytes, and engines
    compute with FP8 weights"""
    adapter_only: bool = False
    """with model.lora: push the adapters' factors instead of merged weights; vLLM's own LoRA adds
    them to the weights that it reads from model.path; see docs/lora.md"""
    timeout_seconds: Resumable[float] = Field(600.0, gt=0)
    """limit for one push"""
    probes: Resumable[int] = Field(2, ge=0)
    """prompts each engine answers after every push, to compare its log-probabilities with the
    trainer's; 0: none"""
    probe_tolerance: Resumable[float | None] = Field(None, gt=0)
    """mean difference of these log-probabilities at which the run stops; default: 0.001 where
    trainer and engine compute in float32, 0.3 in bfloat16"""

    @property
    def on_one_host(self) -> bool:
        """Whether trainer ranks write into the memory of engine ranks on the same host."""
        return TRANSPORTS[self.transport].one_host
