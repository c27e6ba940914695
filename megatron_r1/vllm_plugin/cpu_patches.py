"""Three bugs of vLLM 0.32's CPU build that give wrong log-probabilities without any error, three
that end the engine, and habits that make starts and pushes slow.

Each mend goes when upstream is fixed; tests/system/test_engine.py compares with transformers and
fails without any one of the first five. `mend` does those that are done once per process.
"""

import mmap
import os

import torch
from torch.overrides import TorchFunctionMode
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from megatron_r1.vllm_plugin.recorder import Parameter

PLAIN_MATRICES = "MEGATRON_R1_PLAIN_MATRICES"


def mend() -> None:
    """On CPU, once."""
    mend_strided_rotary()
    seed_whole_prompts_only()
    keep_matrices_plain()
    touch_cache_when_used()
    take_reference_attention()
    ask_for_tiles()


def heads_are_adjacent(x: torch.Tensor | None, head_size: int) -> bool:
    """Whether a token's heads lie in one run.

    x: [num_tokens, heads * head_size] or [num_tokens, heads, head_size], possibly strided.
    """
    if x is None:
        return True
    if x.dim() == 3 and x.shape[1] > 1 and x.stride(1) != head_size:
        return False
    return x.stride(-1) == 1


def mend_strided_rotary() -> None:
    """Rotate MLA's q_pe correctly when rope is plain (YaRN has its own class, which never takes
    this path).

    Answers vllm/model_executor/layers/rotary_embedding/base.py:298 (`RotaryEmbedding.forward_cpu`):
    the C++ operator assumes that a token's heads lie head_size apart, but MLA passes the view
    q[..., nope:], whose heads lie nope + rope apart. Such views take the PyTorch version; every
    other model keeps the C++ operator.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    upstream = RotaryEmbedding.forward_cpu

    def forward_cpu(
        self: RotaryEmbedding,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        adjacent = all(heads_are_adjacent(x, self.head_size) for x in (query, key))
        return (upstream if adjacent else type(self).forward_native)(self, positions, query, key)

    RotaryEmbedding.forward_cpu = forward_cpu


def forget_moe_kernel(method: object) -> None:
    """Make a layer's next post-processing repack its experts' weights. Call before it.

    Answers vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py:166
    (`_setup_kernel`): once `moe_kernel` is set it skips
    `fused_experts.process_weights_after_loading`, which on CPU is what packs w13 and w2 into the
    layout of the grouped matrix product, so that a push leaves the experts of the previous version
    in place.
    """
    if current_platform.is_cpu() and getattr(method, "moe_kernel", None) is not None:
        method.moe_kernel = None


def repack_output_head(model: torch.nn.Module) -> None:
    """Give a head that shares the embedding's weights the new ones. Call when all are loaded.

    Answers vllm/model_executor/layers/vocab_parallel_embedding.py:67: on CPU the head multiplies by
    a packed copy of its weights. A tied head is never loaded itself, so that nothing packs it
    again: it would go on with the embedding of the first version.
    """
    if not current_platform.is_cpu():
        return
    tables = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    for head in tables:
        if isinstance(head, ParallelLMHead) and any(
            other is not head and getattr(other, "weight", None) is head.weight for other in tables
        ):
            head.quant_method.process_weights_after_loading(head)


def is_only_looked_up(layer: torch.nn.Module, model: torch.nn.Module) -> bool:
    """Whether a layer is an embedding that nothing multiplies by, although vLLM packs it with every
    loading. (One without a head beside it may be the head, too.)

    Answers the same lines as `repack_output_head`, which ask for no more than a CPU."""
    return (
        current_platform.is_cpu()
        and isinstance(layer, VocabParallelEmbedding)
        and not isinstance(layer, ParallelLMHead)
        and any(isinstance(other, ParallelLMHead) for other in model.modules())
    )


def seed_whole_prompts_only() -> None:
    """Let a request with a seed draw from its generator once its prompt is computed, not before.

    Answers vllm/v1/worker/gpu_model_runner.py:3500 (`_bookkeeping_sync`): where a step computes a
    part of a prompt - many have come at once - the token drawn after it is thrown away and the
    request's generator set back, which a CPU's cannot ("CPU Generator does not use offset"), and
    the engine is dead.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    upstream = CPUModelRunner.sample_tokens

    def sample_tokens(self: CPUModelRunner, *args: object) -> object:
        generators = self.input_batch.generators
        is_partial = self.discard_request_mask.np[: self.input_batch.num_reqs]
        kept = {int(i): generators.pop(int(i)) for i in is_partial.nonzero()[0] if i in generators}
        output = upstream(self, *args)
        generators.update(kept)
        return output

    CPUModelRunner.sample_tokens = sample_tokens


def keep_matrices_plain() -> None:
    """Multiply by matrices as they lie in memory, where the environment says so.

    Answers vllm/model_executor/layers/utils.py (`dispatch_cpu_unquantized_gemm`), which on CPU
    packs every matrix for oneDNN: most of a push's time.
    """
    if os.environ.get(PLAIN_MATRICES):
        from vllm import _custom_ops

        _custom_ops._supports_onednn = False


def is_packed(parameter: Parameter, model: torch.nn.Module) -> bool:
    """Whether its layer's post-processing packs a matrix for oneDNN, by the same function."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel

    layer = parameter.layer
    method = getattr(layer, "quant_method", None)
    return (
        current_platform.is_cpu()
        and not current_platform.is_zen_cpu()  # AMD's library has a form of its own
        and _custom_ops._supports_onednn
        and parameter.name == "weight"
        and isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)
        and not getattr(layer, "_cpu_skip_gemm_dispatch", False)  # as MLA's kv_b_proj
        and not is_only_looked_up(layer, model)
        and not check_cpu_sgl_kernel(*parameter.shape, parameter.dtype)
    )


class _ZerosOfTheKernel(TorchFunctionMode):
    """Within the block `torch.zeros(num_bytes, dtype=torch.int8)` is memory that is zero because
    nobody has touched it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.zeros or kwargs.get("dtype") is not torch.int8:
            return func(*args, **kwargs)
        (num_bytes,) = args
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.int8)


def touch_cache_when_used() -> None:
    """Let a KV cache take its memory block by block, when tokens come to lie there.

    Answers vllm/v1/worker/utils.py:596 (`allocate_kv_cache`), which fills the whole cache with
    zeros: two seconds per GiB of every start.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    upstream = CPUModelRunner.initialize_kv_cache_tensors

    def initialize_kv_cache_tensors(
        self: CPUModelRunner, *args: object, **kwargs: object
    ) -> object:
        with _ZerosOfTheKernel():
            return upstream(self, *args, **kwargs)

    CPUModelRunner.initialize_kv_cache_tensors = initialize_kv_cache_tensors


def take_reference_attention() -> None:
    """Let latent attention be computed the same way on all CPUs, unless a backend is asked for.

    Answers vllm/platforms/cpu.py:156 and 260 (`CpuPlatform`): on CPUs with AMX it takes one that
    has bf16 only, whatever the dtype, and with float32 the engine does not start.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    upstream = CpuPlatform.check_and_update_config.__func__

    @classmethod
    def check_and_update_config(cls: type[CpuPlatform], vllm_config: object) -> None:
        model, attention = vllm_config.model_config, vllm_config.attention_config
        if attention.backend is None and getattr(model, "use_mla", False):
            attention.backend = AttentionBackendEnum.CPU_MLA
        upstream(cls, vllm_config)

    CpuPlatform.check_and_update_config = check_and_update_config


def ask_for_tiles() -> None:
    """Let this process use AMX, for which Linux wants to be asked.

    Answers csrc/cpu: its own kernels, of FP8 and of attention in bf16, rely on oneDNN having asked
    before them. Where all of a model's products are theirs, the engine ends by SIGILL.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
