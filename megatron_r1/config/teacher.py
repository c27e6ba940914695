"""Who scores what the student wrote: the teacher of on-policy distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_r1.config.section import Section


class TeacherConfig(Section):
    path: str = Field(
        "",
        description="Hugging Face folder of any model vLLM serves, with the student's tokenizer; "
        "what rl.algorithm: on_policy_distillation learns from",
    )
    url: list[str] = Field(
        [],
        description="of vLLM servers that already serve path's model, started with "
        "--enable-scale-out; default: engines of this run",
    )
    engines: int = Field(1, ge=1, description="vLLM servers on the controller's host")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    tensor: int = Field(1, ge=1, description="ranks of an engine that share every layer")
    pipeline: int = Field(1, ge=1, description="stages of layers in an engine")
    data: int = Field(1, ge=1, description="copies of tensor x pipeline ranks of an engine")
    expert_parallel: bool = Field(
        False,
        description="spread routed experts whole over tensor x data ranks; else each is split",
    )
    gpu_memory: float | None = Field(
        None, gt=0, le=1, description="share of its GPU's memory that an engine takes"
    )
    max_num_seqs: int = Field(64, gt=0, description="samples an engine scores at once")
    tokens_at_once: int = Field(
        2048, gt=0, description="of one pass; the logits of all of them exist together, in fp32"
    )
    kv_cache_gib: int = Field(1, gt=0, description="KV cache on a CPU, GiB")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per engine; default: 2, and 1 on a machine of 2 cores"
    )
    start_timeout_seconds: float = Field(600.0, gt=0, description="also to wait for a url")
    request_timeout_seconds: float = Field(3600.0, gt=0)
    max_restarts: int = Field(10, ge=0, description="as rollout.max_restarts")
    unresponsive_seconds: float = Field(
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
