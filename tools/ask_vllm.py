"""Asks the installed vLLM, CPU build or not, what its passes allocate on a GPU.

`python tools/ask_vllm.py [MODEL …]` writes the plan's table for experts of the examples'
models by up to 8 tensor ranks and of MODEL by up to 128; others of the same version stay."""

import json
import sys
from math import gcd
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
Shape = tuple[int, int, int]
"""Hidden size, an expert's intermediate size on a GPU, experts of a token."""
FAMILIES = {9: 79, 10: 178}
"""Hopper and Blackwell, by the first number of their compute capability → GiB of a GPU."""
BACKENDS = ("TRITON", "VLLM_CUTLASS", "DEEPGEMM", "FLASHINFER_CUTLASS")
DEEP_GEMM_ROWS = 128
"""Rows to which DeepGEMM aligns an expert's tokens on Hopper; it answers only on a GPU."""
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
QUERY_TOKENS = (1, 2, 3, 4, 5)


class Gpu:
    """The platform of a family, for functions of vLLM that ask for it."""

    def __init__(self, family: int) -> None:
        self.family = family

    def __getattr__(self, name: str) -> Any:
        memory = FAMILIES[self.family] << 30
        told = {"is_cuda": True, "get_device_total_memory": memory, "get_device_name": ""}
        return lambda *given: given[0] == 10 * self.family if given else told.get(name, False)


def workspace_bytes(backend: str, shape: Shape, tokens: int, experts: int) -> int:
    """Return the bytes of vLLM's shared workspace for a pass through routed experts.

    Args:
        backend: a name of `BACKENDS`.
        shape: the experts'.
        tokens: those of all data ranks, which a GPU gathers.
        experts: the GPU's routed experts."""
    import torch
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts import (
        cutlass_moe,
        deep_gemm_moe,
        flashinfer_cutlass_moe,
        triton_moe,
    )

    classes = {
        "TRITON": triton_moe.TritonExperts,
        "VLLM_CUTLASS": cutlass_moe.CutlassExpertsFp8,
        "DEEPGEMM": deep_gemm_moe.DeepGemmExperts,
        "FLASHINFER_CUTLASS": flashinfer_cutlass_moe.FlashInferExperts,
    }
    kernel = object.__new__(classes[backend])
    kernel.moe_config = SimpleNamespace(in_dtype=torch.bfloat16)
    kernel.quant_config = SimpleNamespace(block_shape=[128, 128], quant_dtype=None)
    kernel.out_dtype = torch.bfloat16
    sizes: list[int] = []

    def allocate(*parts: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        tensors = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in parts]
        sizes.extend(tensor.nbytes for tensor in tensors)
        return tensors

    manager = SimpleNamespace(get_simultaneous=allocate)
    no_output = SimpleNamespace(allocate_fused_expert_output=lambda *_: None)
    hidden, intermediate, top_k = shape
    alignment = mock.patch.object(
        deep_gemm_moe, "get_mk_alignment_for_contiguous_layout", return_value=[DEEP_GEMM_ROWS]
    )
    told: Any = {"current_workspace_manager": lambda: manager, "current_platform": Gpu(9)}
    with alignment, mock.patch.multiple(modular_kernel, **told):
        modular_kernel.FusedMoEKernelModularImpl._allocate_buffers(
            SimpleNamespace(fused_experts=kernel, prepare_finalize=no_output),
            out_dtype=torch.bfloat16,
            device=torch.device("meta"),
            M_chunk=tokens,
            M_full=tokens,
            N=2 * intermediate,
            K=hidden,
            top_k=top_k,
            global_num_experts=experts,
            local_num_experts=experts,
            expert_tokens_meta=None,
            activation=MoEActivation.SILU,
        )
    return sum(sizes)


def linear_workspace(backend: str, shape: Shape) -> list[int]:
    """Return (bytes for each token, for each expert of the GPU, and besides them) of a line above
    all workspaces, by less than DeepGEMM's alignment."""

    def ask(tokens: int, experts: int) -> int:
        return workspace_bytes(backend, shape, tokens, experts)

    per_token = (ask(8192, 1) - ask(4096, 1)) // 4096
    per_expert = (ask(4096, 1 + DEEP_GEMM_ROWS) - ask(4096, 1)) // DEEP_GEMM_ROWS
    # All remainders of rows by the alignment, as 7 experts' are odd.
    tokens = range(4096, 4096 + DEEP_GEMM_ROWS // gcd(shape[2], DEEP_GEMM_ROWS))
    return [per_token, per_expert, max(ask(n, 7) - per_token * n - per_expert * 7 for n in tokens)]


def backend_order(dtype: str, family: int, spread: bool) -> list[str]:
    """Return vLLM's order of preference up to Triton, which needs no compiler.

    Args:
        dtype: "bfloat16" or "fp8" (in blocks of 128 x 128).
        family: a key of `FAMILIES`.
        spread: whether an engine's GPUs share the experts."""
    from vllm.model_executor.layers.fused_moe.oracle import fp8, unquantized

    ranks = SimpleNamespace(dp_size=1 + spread, ep_size=1 + spread, use_deepep_v2_kernels=False)
    config = SimpleNamespace(activation="silu", moe_parallel_config=ranks)
    module = fp8 if dtype == "fp8" else unquantized
    keys = (fp8.kFp8Static128BlockSym, fp8.kFp8Dynamic128Sym) if dtype == "fp8" else ()
    with mock.patch.object(module, "current_platform", Gpu(family)):
        names = [backend.name for backend in module._get_priority_backends(config, *keys)]
    return [name for name in names[: names.index("TRITON") + 1] if name != "AITER"]  # ROCm's


def num_graph_sizes(family: int, query_tokens: int, sequences: int) -> int:
    """Return how many sizes of passes vLLM captures where a pass may have any number of tokens."""
    from vllm import platforms
    from vllm.config import CUDAGraphMode, VllmConfig

    config = mock.Mock(uniform_decode_query_len=query_tokens, speculative_config=None)
    config.model_config.enforce_eager = False
    config.scheduler_config = SimpleNamespace(max_num_seqs=sequences, max_num_batched_tokens=2**20)
    compilation = config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.max_cudagraph_capture_size = compilation.cudagraph_capture_sizes = None
    with mock.patch.object(platforms, "_current_platform", Gpu(family)):
        VllmConfig._set_cudagraph_sizes(config)
    return len(compilation.cudagraph_capture_sizes)


def attention_rows() -> int:
    """Return the most tokens of which latent attention projects the cache at once."""
    from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder

    config = mock.Mock()
    config.scheduler_config.max_num_seqs, config.cache_config.block_size = 1024, 64
    config.model_config.max_model_len = 2**20
    config.parallel_config.decode_context_parallel_size = 1
    return MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size(config)


def default_tokens(family: int) -> int:
    """Return the tokens of a pass of `vllm serve`."""
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    with mock.patch.object(arg_utils, "current_platform", Gpu(family)):
        return arg_utils.EngineArgs.get_batch_defaults(1)[0][UsageContext.OPENAI_API_SERVER]


def expert_shapes(models: list[str]) -> list[Shape]:
    """Return the shapes of the examples' models and of `models`."""
    from megatron_r1.models.hf_config_file import read_hf_config

    folders = [(file.parent, 4) for file in (ROOT / "examples").rglob("config.json")]
    shapes = {
        (config["hidden_size"], size, experts)
        for folder, powers in [*folders, *((Path(model), 8) for model in models)]
        if (experts := (config := read_hf_config(folder)).get("num_experts_per_tok"))
        for power in range(powers)
        if (size := config["moe_intermediate_size"] >> power)
    }
    return sorted(shapes)


def ask_vllm(shapes: list[Shape], earlier: dict[str, Any]) -> dict[str, Any]:
    """Return the table for these shapes, and those of an earlier one of the same version."""
    import vllm

    version = vllm.__version__.partition("+")[0]
    kept_shapes = earlier["expert workspace"] if earlier.get("vllm") == version else {}
    return {
        "vllm": version,
        "tokens of a pass": {str(family): default_tokens(family) for family in FAMILIES},
        "attention rows": attention_rows(),
        "rows of DeepGEMM": DEEP_GEMM_ROWS,
        "graph sizes": {
            f"{family}, {query}": {str(n): num_graph_sizes(family, query, n) for n in SEQUENCES}
            for family in FAMILIES
            for query in QUERY_TOKENS
        },
        "expert backends": {
            f"{dtype}, {family}, {place}": backend_order(dtype, family, place == "spread")
            for dtype in ("bfloat16", "fp8")
            for family in FAMILIES
            for place in ("whole", "spread")
        },
        "expert workspace": kept_shapes
        | {
            " x ".join(map(str, shape)): {name: linear_workspace(name, shape) for name in BACKENDS}
            for shape in shapes
        },
    }


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from megatron_r1.plan.pass_memory import TABLE_FILE, vllm_table

    answer = ask_vllm(expert_shapes(sys.argv[1:]), vllm_table())
    TABLE_FILE.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
