"""Patches of vLLM 0.32's CPU build. Paths are below vllm/; behind each patch is the file of
tests/system that fails without it, where there is one.

Bugs that give wrong log-probabilities without an error:

    1. `fix_strided_rotary`          strided queries are rotated wrongly (test_engine.py)
    2. `reset_moe_kernel`            experts of the version before stay (test_engine.py)
    3. `repack_output_head`          a tied head of the first version stays (test_engine.py)
    4. `expand_temperatures`         drafted tokens have no temperature (test_speculative.py)

Bugs that end the engine:

    5. `seed_whole_prompts_only`     a seed with a prompt computed in parts (test_engine.py)
    6. `use_reference_attention`     latent attention in float32 with AMX (test_engine.py)
    7. `request_amx`                 AMX without permission
    8. `_allow_cpus_without_amx`     FP8 without AMX (test_push_fp8_engine.py)
    9. `_pass_bias_as_float32`       an FP8 product with a bias (test_push_fp8_engine.py)

What makes starts and pushes slow:

    10. `is_lookup_only`             every push packs the embedding
    11. `_keep_matrices_plain`       every push packs all matrices
    12. `allocate_cache_lazily`      every start fills the cache with zeros

test_engine.py compares with transformers; test_speculative.py also fails without the CPU's
`--no-async-scheduling` in `engines/server/settings.py`. `patch_cpu_engine` makes the patches that
are made once per process."""

import mmap
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from megatron_r1.engines.plugin.loader_copies import CheckpointParameter

PLAIN_MATRICES = "plain_matrices"
"""Key of vLLM's --additional-config (`EngineSettings.plain_matrices`)."""


def patch_cpu_engine() -> None:
    """Apply the patches below that need no model. On CPU, once."""
    fix_strided_rotary()
    seed_whole_prompts_only()
    _keep_matrices_plain()
    allocate_cache_lazily()
    use_reference_attention()
    request_amx()
    _allow_cpus_without_amx()
    _pass_bias_as_float32()
    expand_temperatures()


def _heads_are_adjacent(x: torch.Tensor | None, head_size: int) -> bool:
    """Return whether a token's heads are contiguous.

    Args:
        x: [num_tokens, heads * head_size] or [num_tokens, heads, head_size], possibly strided.
        head_size: the numbers of a head."""
    if x is None:
        return True
    if x.dim() == 3 and x.shape[1] > 1 and x.stride(1) != head_size:
        return False
    return x.stride(-1) == 1


def fix_strided_rotary() -> None:
    """Rotate strided queries, as MLA's q_pe, with the PyTorch version of plain rope.

    Upstream: model_executor/layers/rotary_embedding/base.py: `RotaryEmbedding.forward_cpu`.
    Without it: the C++ operator assumes that a token's heads are head_size apart, but MLA passes
    the view q[..., nope:], whose heads are nope + rope apart, and log-probabilities are wrong.
    (YaRN has its own class, which never takes this path.) Goes when: the operator reads strides."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    upstream = RotaryEmbedding.forward_cpu

    def forward_cpu(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        are_adjacent = all(_heads_are_adjacent(x, self.head_size) for x in (query, key))
        return (upstream if are_adjacent else type(self).forward_native)(
            self, positions, query, key
        )

    RotaryEmbedding.forward_cpu = forward_cpu


def reset_moe_kernel(method: Any) -> None:
    """Make a layer's next post-processing repack its experts' weights. Call before it.

    Upstream: model_executor/layers/fused_moe/unquantized_fused_moe_method.py:
    `UnquantizedFusedMoEMethod._setup_kernel`. Without it: once `moe_kernel` is set,
    `fused_experts.process_weights_after_loading`, which packs w13 and w2 on CPU, is skipped, and
    the previous version's experts stay. Goes when: it is called on every loading."""
    if current_platform.is_cpu() and getattr(method, "moe_kernel", None) is not None:
        method.moe_kernel = None


def repack_output_head(model: torch.nn.Module) -> None:
    """Pack a head that shares the embedding's weights again. Call when all weights are loaded.

    Upstream: model_executor/layers/vocab_parallel_embedding.py:
    `UnquantizedEmbeddingMethod.process_weights_after_loading`. Without it: the head multiplies by a
    packed copy of its weights; a tied head is never loaded itself, and so keeps the embedding of
    the first version. Goes when: loading the embedding packs its tied head."""
    if not current_platform.is_cpu():
        return
    tables = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    for head in tables:
        if isinstance(head, ParallelLMHead) and any(
            table is not head and getattr(table, "weight", None) is head.weight for table in tables
        ):
            head.quant_method.process_weights_after_loading(head)


def is_lookup_only(layer: torch.nn.Module, model: torch.nn.Module) -> bool:
    """Return whether a layer is an embedding that is never multiplied by; post-processing then
    skips it. In a model without a head the embedding may be the head.

    Upstream: model_executor/layers/vocab_parallel_embedding.py:
    `UnquantizedEmbeddingMethod.process_weights_after_loading`. Without it: every loading packs the
    embedding for nothing. Goes when: only heads are packed."""
    return (
        current_platform.is_cpu()
        and isinstance(layer, VocabParallelEmbedding)
        and not isinstance(layer, ParallelLMHead)
        and any(isinstance(module, ParallelLMHead) for module in model.modules())
    )


def seed_whole_prompts_only() -> None:
    """Let a request with a seed use its generator only once its prompt is computed.

    Upstream: v1/worker/gpu_model_runner.py: `GPUModelRunner._bookkeeping_sync`. Without it: after a
    step that computes a part of a prompt, vLLM drops the sampled token and sets the request's
    generator back, which a CPU's cannot ("CPU Generator does not use offset"), and the engine dies.
    Goes when: it restores the generator's state instead."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    upstream = CPUModelRunner.sample_tokens

    def sample_tokens(self: Any, *args: object) -> object:
        generators = self.input_batch.generators
        is_partial = self.discard_request_mask.np[: self.input_batch.num_reqs]
        held_generators = {
            int(i): generators.pop(int(i)) for i in is_partial.nonzero()[0] if i in generators
        }
        output = upstream(self, *args)
        generators.update(held_generators)
        return output

    CPUModelRunner.sample_tokens = sample_tokens


def _keep_matrices_plain() -> None:
    """Multiply by matrices without packing them, where --additional-config has `PLAIN_MATRICES`.

    Upstream: model_executor/layers/utils.py: `dispatch_cpu_unquantized_gemm`. Without it:
    every matrix is packed for oneDNN, most of a push's time. Goes when: vLLM has such a setting."""
    from vllm import _custom_ops
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    upstream = CPUModelRunner.load_model

    def load_model(self: Any, *args: object, **kwargs: object) -> None:
        if self.vllm_config.additional_config.get(PLAIN_MATRICES):
            _custom_ops._supports_onednn = False
        upstream(self, *args, **kwargs)

    CPUModelRunner.load_model = load_model


def is_packed(parameter: CheckpointParameter, model: torch.nn.Module) -> bool:
    """Return whether post-processing packs this matrix for oneDNN, by upstream's conditions."""
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
        and not is_lookup_only(layer, model)
        and not check_cpu_sgl_kernel(*parameter.shape, parameter.dtype)
    )


class _LazyZeros(TorchFunctionMode):
    """Gives `torch.zeros(num_bytes, dtype=torch.int8)` inside the block as untouched memory, which
    the kernel zeroes page by page on first use."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.zeros or kwargs.get("dtype") is not torch.int8:
            return func(*args, **kwargs)
        (num_bytes,) = args
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.int8)


def allocate_cache_lazily() -> None:
    """Let a KV cache take its memory block by block, when tokens are stored there.

    Upstream: v1/worker/utils.py: `allocate_kv_cache`. Without it: the whole cache is filled
    with zeros, two seconds per GiB of every start. Goes when: it uses torch.empty."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    upstream = CPUModelRunner.initialize_kv_cache_tensors

    def initialize_kv_cache_tensors(self: Any, *args: object, **kwargs: object) -> object:
        with _LazyZeros():
            return upstream(self, *args, **kwargs)

    CPUModelRunner.initialize_kv_cache_tensors = initialize_kv_cache_tensors


def use_reference_attention() -> None:
    """Compute latent attention the same way on all CPUs, unless a backend is set.

    Upstream: platforms/cpu.py: `CpuPlatform.get_attn_backend_cls` and
    `CpuPlatform.check_and_update_config`. Without it: CPUs with AMX take a backend for bf16 only,
    whatever the dtype, and a float32 engine does not start. Goes when: the choice depends on the
    dtype."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    upstream = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        model, attention = vllm_config.model_config, vllm_config.attention_config
        if attention.backend is None and getattr(model, "use_mla", False):
            attention.backend = AttentionBackendEnum.CPU_MLA
        upstream(cls, vllm_config)

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def request_amx() -> None:
    """Request permission to use AMX from Linux (arch_prctl), which a process needs.

    Upstream: csrc/cpu. Without it: vLLM's own kernels, of FP8 and of bf16 attention, rely on oneDNN
    having made the request; a model that uses only those ends by SIGILL. Goes when: they make it.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def _allow_cpus_without_amx() -> None:
    """Let CPUs with AVX-512 and bf16 compute FP8 models; activations stay in bf16 there.

    Upstream: model_executor/kernels/linear/scaled_mm/cpu.py:
    `CPUFp8BlockScaledMMKernel.is_supported` and model_executor/layers/fused_moe/experts/cpu_moe.py:
    `CPUExpertsFp8._supports_current_device`. Without it: both refuse CPUs without AMX, although
    their operators have a slower path with the same results. Goes when: they accept such CPUs."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8

    if torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
        is_supported = classmethod(lambda cls, capability=None: (True, None))
        CPUFp8BlockScaledMMKernel.is_supported = is_supported
        CPUExpertsFp8._supports_current_device = staticmethod(lambda: True)


def _pass_bias_as_float32() -> None:
    """Give the FP8 product a bias in fp32.

    Upstream: model_executor/kernels/linear/scaled_mm/cpu.py:
    `CPUFp8BlockScaledMMKernel.apply_weights`. Without it: it passes a bias in bf16, which the
    operator refuses. Goes when: it converts the bias."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel

    upstream = CPUFp8BlockScaledMMKernel.apply_weights

    def apply_weights(
        self: Any,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        return upstream(self, layer, x, None if bias is None else bias.float(), **kwargs)

    CPUFp8BlockScaledMMKernel.apply_weights = apply_weights


def expand_temperatures() -> None:
    """Give every drafted token the temperature and top-p of its sequence.

    Upstream: utils/cpu_triton_utils.py: `_expand_kernel_impl`, behind
    v1/sample/rejection_sampler.py: `expand_batch_to_tokens`. Without it: the kernel fills a
    copy of its output, of integers, and logits are divided by uninitialized memory: tokens from
    another distribution, log-probabilities that are not finite. Goes when: it writes to its output.
    """
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = _expand_batch_to_tokens


def _expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: Any = 0,
    replace_to: Any = 0,
) -> torch.Tensor:
    """Return the value of each sequence for all its tokens, [num_tokens].

    Args:
        x: the values, [num_seqs].
        cu_num_tokens: where each sequence's tokens end, [num_seqs].
        num_tokens: the tokens of all sequences.
        replace_from: the value to replace.
        replace_to: the value to replace it with."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    new_values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return new_values.repeat_interleave(counts, output_size=num_tokens)
