"""vLLM's experts by DeepGEMM on the null GPU, and the same by torch in fp32: prints their relative
distance."""

import torch
from vllm.model_executor.layers.fused_moe import deep_gemm_utils
from vllm.model_executor.layers.quantization.utils import fp8_utils
from vllm.utils import deep_gemm

TOKENS, SIZE, WIDTH, EXPERTS, CHOSEN = 20, 256, 256, 4, 2
"""WIDTH: of an expert's hidden layer."""


def codes_and_scales(*shape: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randn(*shape).to(torch.float8_e4m3fn)
    return codes, 0.1 + torch.rand(*shape[:-2], shape[-2] // rows, shape[-1] // 128)


def numbers(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows, columns = (codes.shape[dim] // scales.shape[dim] for dim in (-2, -1))
    return codes.float() * scales.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def computed(x, first, second, chosen, weights) -> torch.Tensor:
    """What `DeepGemmExperts.apply` does, with its functions."""
    (codes, scales), on_gpu = ([part.cuda() for part in x], chosen.cuda())
    rows, row_scales, ends, places, alignment = deep_gemm_utils.deepgemm_moe_permute(
        codes, scales, on_gpu, EXPERTS, None, None, use_psum_layout=True
    )
    by_expert = {"use_psum_layout": True}
    with deep_gemm.mk_alignment_scope(alignment):
        hidden = torch.empty(len(rows), 2 * WIDTH, dtype=torch.bfloat16, device="cuda")
        matrices = [part.cuda() for part in first]
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (rows, row_scales), matrices, hidden, ends, **by_expert
        )
        active = fp8_utils.silu_mul_per_token_group_quant_fp8_colmajor(
            hidden, use_ue8m0=False, expert_ends=ends, expert_alignment=alignment
        )
        out = torch.empty(len(rows), SIZE, dtype=torch.bfloat16, device="cuda")
        matrices = [part.cuda() for part in second]
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(active, matrices, out, ends, **by_expert)
    result = torch.empty(TOKENS, SIZE, dtype=torch.bfloat16, device="cuda")
    deep_gemm_utils.deepgemm_unpermute_and_reduce(out, on_gpu, weights.cuda(), places, None, result)
    return result.float().cpu()


def expected(x, first, second, chosen, weights) -> torch.Tensor:
    tokens, first, second = (numbers(*one) for one in (x, first, second))
    result = torch.zeros(TOKENS, SIZE)
    for token in range(TOKENS):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up = (first[expert] @ tokens[token]).chunk(2)
            active = torch.nn.functional.silu(gate) * up
            result[token] += weight * (second[expert] @ active)
    return result


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        operands = (
            codes_and_scales(TOKENS, SIZE, rows=1),
            codes_and_scales(EXPERTS, 2 * WIDTH, SIZE, rows=128),
            codes_and_scales(EXPERTS, SIZE, WIDTH, rows=128),
            torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(TOKENS)]).int(),
            torch.rand(TOKENS, CHOSEN),
        )
        reference = expected(*operands)
        print(float((computed(*operands) - reference).norm() / reference.norm()))
