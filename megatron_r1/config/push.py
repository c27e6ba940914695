"""Section `push`: how the policy's weights travel to the engines, and how each push is checked."""

from pydantic import Field

from megatron_r1.base.transports import TRANSPORTS, TransportName
from megatron_r1.config.section import Resumable, Section


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
    def on_one_node(self) -> bool:
        """Whether trainer ranks write into the memory of engine ranks on the same node."""
        return TRANSPORTS[self.transport].is_single_node
