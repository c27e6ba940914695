"""Section `parallel`: how the model is divided over trainer ranks."""

from typing import Literal

from pydantic import Field

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.section import Section

DEFAULT_TOKENS = 16_384
"""Tokens of a micro-batch."""


class ParallelConfig(Section):
    """How the model is divided over trainer ranks, and what is recomputed or kept on the host."""

    processes: int = Field(1, ge=1)
    """trainer ranks started on this machine; under torchrun: WORLD_SIZE"""
    tensor: int = Field(1, ge=1)
    """ranks that share every layer's matrices"""
    pipeline: int = Field(1, ge=1)
    """stages of layers, each on ranks of its own"""
    expert: int = Field(1, ge=1)
    """ranks that a layer's routed experts are spread over"""
    context: int = Field(1, ge=1)
    """ranks that share the tokens of every sample"""
    sequence: bool | None = None
    """whether tensor ranks also share the tokens of norms and residuals (sequence parallelism);
    default: with routed experts, which need it, and not without"""
    expert_tensor: int = Field(1, ge=1)
    """ranks that share every routed expert"""
    virtual_pipeline: int = Field(1, ge=1)
    """model chunks per pipeline rank, interleaved to shorten the bubble"""
    pipeline_layout: str | None = None
    """what each chunk holds, in Megatron's letters: E embedding, t decoder layer, m MTP layers, L
    head and loss, as in Et*3|(tt|)*29mL; default: evenly, longer chunks in the middle"""
    dispatcher: Literal["alltoall", "flex"] = "alltoall"
    """how tokens travel to experts on other ranks; flex: DeepEP's kernels, on GPUs"""
    overlap_expert_exchange: bool = False
    """send tokens to experts and back while another micro-batch is computed (Megatron's combined
    1F1B); needs expert > 1, bfloat16, and with pipeline ranks virtual stages. See
    docs/parallelism.md"""
    overlap_param_gather: bool = False
    """gather updated parameters over data parallelism during the next mini-batch's forward pass"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activations computed again in the backward pass; selective: those of recompute_modules"""
    recompute_modules: list[str] = ["core_attn"]
    """core_attn, layernorm, mla_up_proj, mlp, moe, moe_act, shared_experts"""
    optimizer_offload: float = Field(0.0, ge=0, le=1)
    """share of the optimizer's state and update on the host; on a CPU all is there"""
    reference_offload: Literal["host", "device"] = "host"
    """where the reference's weights wait; device: always on the GPU"""
    offload_between_phases: Literal["none", "host", "disk"] = "none"
    """where parameters and optimizer state are while colocated engines sample; host: in pinned
    memory, disk: in a file of offload_folder"""
    offload_folder: str | None = None
    """a folder of each node's local disk; default: TMPDIR"""
    tokens_per_microbatch: int | None = Field(None, gt=0)
    """upper limit; a longer sample gets a micro-batch alone. Default: 16,384; without GPUs fewer,
    so that activations take 1.5 GiB, or less where memory is short"""
    share_prompts: bool = False
    """compute a prompt once for all its responses in a micro-batch, and a turn once for all
    branches that continue it (on a GPU in all but attention); without context parallelism,
    attention windows or softmax offsets, routing replay, a router's bias that is updated and MTP
    training. Gradients are the same"""
    threads: int | None = None
    """CPU threads per rank; default: cores / ranks"""
    timeout_seconds: float = Field(7200.0, gt=0)
    """how long a rank waits for others in a collective operation, also while they load, save,
    verify or export; after that the ranks end with an error"""

    @property
    def microbatch_tokens(self) -> int:
        """The setting `tokens_per_microbatch`, or its default on GPUs."""
        return self.tokens_per_microbatch or DEFAULT_TOKENS

    def data_parallel_size(self, world_size: int) -> int:
        """Return the data-parallel size: the number of model replicas with different samples."""
        return world_size // (self.tensor * self.pipeline * self.context)

    def splits_sequences(self, has_experts: bool) -> bool:
        """Return whether tensor ranks share the tokens between matrices.

        Args:
            has_experts: whether the model has experts.

        Raises:
            UserError: for experts without it."""
        if self.tensor > 1 and has_experts and self.sequence is False:
            raise UserError(
                "parallel.sequence: false: Megatron's experts under tensor parallelism need "
                "sequence parallelism; leave it out, or set parallel.tensor: 1",
                key="parallel.sequence",
                cause=Cause.CONFLICT,
            )
        is_on = has_experts if self.sequence is None else self.sequence
        return is_on and self.tensor > 1

    def check_sizes(self, world_size: int) -> None:
        """Raise UserError where the sizes do not divide `world_size` ranks."""
        groups = {
            "tensor x pipeline x context": self.tensor * self.pipeline * self.context,
            "expert_tensor x expert x pipeline": self.expert_tensor * self.expert * self.pipeline,
        }
        for sizes, product in groups.items():
            if world_size % product:
                raise UserError(
                    f"parallel: {world_size} trainer ranks cannot be divided into groups of "
                    f"{product} ({sizes}); change parallel.processes or the sizes",
                    key="parallel",
                    cause=Cause.INDIVISIBLE,
                )
