"""vLLM's kernels as torch's operators, so that its CUDA engines compute on the null GPU.

Operators of its extensions and of flash-attention 3 that serve decoder models in bf16, fp16, fp32
and with weights in FP8 blocks are replaced (`KERNELS`), and DeepGEMM's products; its model classes,
attention backends, runners and communicators are what is installed. Its Triton kernels run in
Triton's interpreter (`triton_on_host`). An FP8 cache is not imitated. An operator that is not here
keeps its own code, whose kernels do nothing."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from host_compute import drain, on_host

BATCHED_TOKENS = 512
KERNELS: dict[str, Callable[..., Any]] = {}
"""Name of an operator → the function on CPU tensors that takes its place."""


def _register_kernel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        KERNELS[name] = function
        return function

    return add


def configure(arguments) -> None:
    """Leave out of vLLM's arguments what only a GPU has: graphs, kernels that are timed to choose
    among them, and all-reduces by a kernel that writes into peers' memory. And let the batch that
    it measures memory with be small: a host computes it for a minute."""
    arguments.enforce_eager = True
    arguments.max_num_batched_tokens = arguments.max_num_batched_tokens or BATCHED_TOKENS
    arguments.enable_flashinfer_autotune = False
    arguments.disable_custom_all_reduce = True


@_register_kernel("_C::rms_norm")
def rms_norm(result, x, weight, epsilon) -> None:
    """Write each row of x divided by its root mean square, times the weight."""
    normalized = x.float() * (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    normalized = normalized.to(x.dtype)
    result.copy_(normalized if weight is None else normalized * weight)


@_register_kernel("_C::fused_add_rms_norm")
def fused_add_rms_norm(x, residual, weight, epsilon) -> None:
    """Add x to the residual, and write the sum's norm to x."""
    residual.add_(x)
    rms_norm(x, residual, weight, epsilon)


@_register_kernel("_C::silu_and_mul")
def silu_and_mul(result, x) -> None:
    """Write SiLU of the first half of each row, times the second half."""
    gate, up = x.chunk(2, dim=-1)
    result.copy_(torch.nn.functional.silu(gate) * up)


@_register_kernel("_C::vocab_parallel_embedding")
def vocab_parallel_embedding(
    result, ids, weight, start, end, padding, added_start, added_end
) -> None:
    """Write the embeddings of the tokens that are this rank's, and zeros for the others."""
    is_own, is_added = (ids >= start) & (ids < end), (ids >= added_start) & (ids < added_end)
    rows = torch.where(is_own, ids - start, ids - added_start + end - start + padding)
    is_here = is_own | is_added
    result.copy_(weight[(rows * is_here).long()] * is_here[:, None])


@_register_kernel("_C::rotary_embedding")
def rotary_embedding(
    positions, query, key, head_size, cosines_and_sines, is_neox, offset=0, inverse=False
) -> None:
    """Rotate the heads of query and key in place.

    Args:
        positions: the position of each token.
        query: (tokens, heads x head_size), in any shape; None for none.
        key: as `query`.
        head_size: the size of a head.
        cosines_and_sines: (positions, rotated size).
        is_neox: whether a pair is a feature of either half, not two neighbors.
        offset: the first feature of a head that is rotated.
        inverse: whether to rotate back."""
    angles = cosines_and_sines[positions.flatten()].float()
    size = angles.shape[-1]
    cosine, sine = angles[:, None].chunk(2, dim=-1)
    sine = -sine if inverse else sine
    for heads in (query, key):
        if heads is None:
            continue
        one = heads.view(len(angles), -1, head_size)[..., offset : offset + size]
        if is_neox:
            first, second = one.float().chunk(2, dim=-1)
        else:
            first, second = one.float()[..., 0::2], one.float()[..., 1::2]
        rotated = first * cosine - second * sine, second * cosine + first * sine
        together = torch.cat(rotated, -1) if is_neox else torch.stack(rotated, -1).flatten(-2)
        one.copy_(together)


@_register_kernel("_C_cache_ops::reshape_and_cache_flash")
def reshape_and_cache_flash(key, value, key_cache, value_cache, slots, dtype, k_scale, v_scale):
    """Write keys and values (tokens, heads, size) to their slots of caches (blocks, block size,
    heads, size)."""
    assert not dtype.startswith("fp8")
    tokens = (slots >= 0).nonzero().flatten()
    block, place = slots[tokens] // key_cache.shape[1], slots[tokens] % key_cache.shape[1]
    key_cache[block, place] = key[tokens].to(key_cache.dtype)
    value_cache[block, place] = value[tokens].to(value_cache.dtype)


@_register_kernel("_C_cache_ops::concat_and_cache_mla")
def concat_and_cache_mla(latent, rotary_key, cache, slots, dtype, scale) -> None:
    """Write latents and rotary keys, joined, to their slots of a cache (blocks, block size,
    size)."""
    assert not dtype.startswith("fp8")
    tokens = (slots >= 0).nonzero().flatten()
    joined = torch.cat([latent[tokens], rotary_key[tokens].flatten(1)], -1)
    cache[slots[tokens] // cache.shape[1], slots[tokens] % cache.shape[1]] = joined.to(cache.dtype)


@_register_kernel("_vllm_fa3_C::get_scheduler_metadata")
def get_scheduler_metadata(num_sequences, *sizes, **settings):
    """Return what the attention here does not read."""
    return torch.zeros(num_sequences + 1, dtype=torch.int32)


@_register_kernel("_vllm_fa3_C::fwd")
def attention(
    q, k, v, k_new, v_new, q_v, out, ends_q, ends_k, ends_new, used_q, used_k, max_q, max_k, pages,
    batch, padding, cosine, sine, rotary, q_descale, k_descale, v_descale, scale, is_causal, left,
    right, softcap, is_interleaved, plan, splits, pack, margin, sinks, *context,
):  # fmt: skip
    """Attention of packed queries over packed keys, or over the pages of a cache.

    Queries and keys are (tokens, heads, size), a cache (pages, page size, heads, size). With q_v,
    latent: scores are q k + q_v v."""
    assert k_new is None and used_q is None and sinks is None and softcap == 0
    assert left < 0 and right <= 0 and padding is None and batch is None
    result = q.new_zeros(*q.shape[:-1], v.shape[-1])
    normalizers = torch.full((q.shape[1], len(q)), -math.inf)
    for number, (start, end) in enumerate(pairwise(ends_q.tolist())):
        keys, values = _keys_and_values(k, v, number, ends_k, used_k, pages)
        if start == end or not len(keys):
            continue
        groups = q.shape[1] // keys.shape[1]
        keys, values = (x.float().repeat_interleave(groups, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[start:end].float(), keys)
        if q_v is not None:
            scores += torch.einsum("qhd,khd->hqk", q_v[start:end].float(), values)
        scores *= scale
        if is_causal:
            later = torch.ones(end - start, len(keys), dtype=torch.bool)
            scores.masked_fill_(later.triu(len(keys) - (end - start) + 1), -math.inf)
        result[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
        normalizers[:, start:end] = scores.logsumexp(-1)
    if out is not None:
        out.copy_(result.view(out.shape))
        result = out
    return [result, normalizers, torch.empty(0), torch.empty(0)]


def _keys_and_values(k, v, number, ends, lengths, pages) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of one sequence."""
    if pages is None:
        start, end = ends[number : number + 2].tolist()
        return k[start:end], v[start:end]
    length, size = int(lengths[number]), k.shape[1]
    table = pages[number, : -(-length // size)].long()
    keys, values = (x[table].flatten(0, 1)[:length] for x in (k, v))
    return keys, values


@_register_kernel("_moe_C::topk_softmax")
def topk_softmax(weights, experts, rows, logits, renormalizes, bias, is_padding) -> None:
    """Write each token's most probable experts and their probabilities."""
    assert bias is None
    values, indices = logits.float().softmax(-1).topk(weights.shape[-1], dim=-1)
    weights.copy_(values / values.sum(-1, keepdim=True) if renormalizes else values)
    experts.copy_(indices)


@_register_kernel("_moe_C::grouped_topk")
def grouped_topk(scores, groups, kept_groups, topk, renormalizes, factor, bias, function):
    """Return the weights and numbers of each token's experts, of the best groups: by the sum of a
    group's two best scores with the bias.

    Args:
        scores: (tokens, experts), the router's.
        groups: the number of groups of experts.
        kept_groups: the number of groups to choose from.
        topk: the experts of a token.
        renormalizes: whether a token's weights are made to sum to 1, before `factor`.
        factor: multiplies the weights.
        bias: (experts,), added to the scores for the choice alone.
        function: 1: sigmoid of the scores first."""
    activations = scores.float().sigmoid() if function == 1 else scores.float()
    biased = activations + bias.float()
    by_group = biased.unflatten(-1, (groups, -1))
    best = by_group.topk(2, dim=-1).values.sum(-1).topk(kept_groups, dim=-1).indices
    is_kept = torch.zeros(by_group.shape[:-1], dtype=torch.bool).scatter_(-1, best, True)
    allowed = by_group.masked_fill(~is_kept[..., None], -math.inf).flatten(-2)
    experts = allowed.topk(topk, dim=-1).indices
    weights = activations.gather(-1, experts)
    if renormalizes:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * factor, experts.int()


@_register_kernel("_moe_C::moe_align_block_size")
def moe_align_block_size(
    topk_ids, num_experts, size, sorted_ids, block_experts, num_padded, expert_map, scatter=None
) -> None:
    """Sort the rows of `topk_ids` by expert, each expert's padded to whole blocks with the number
    of rows; write the expert of each block, -1 for another rank's."""
    assert scatter is None
    flat = topk_ids.flatten()
    sorted_ids.fill_(flat.numel())
    block_experts.fill_(-1 if expert_map is not None else 0)
    place = 0
    for expert in range(num_experts):
        local_expert = expert if expert_map is None else int(expert_map[expert])
        rows = (flat == expert).nonzero().flatten()
        blocks = -(-len(rows) // size)
        sorted_ids[place : place + len(rows)] = rows.to(sorted_ids.dtype)
        block_experts[place // size : place // size + blocks] = local_expert
        place += blocks * size
    num_padded.fill_(place)


@_register_kernel("_moe_C::moe_sum")
def moe_sum(x, result, topk_ids=None, expert_map=None) -> None:
    """Add the outputs (tokens, experts, size) of each token's experts, where given only of those
    that `expert_map` gives a place on this rank: nothing has written the others'."""
    summed = x.float()
    if topk_ids is not None and expert_map is not None:
        elsewhere = expert_map[topk_ids.long()] < 0
        summed = summed.masked_fill(elsewhere[..., None], 0)
    result.copy_(summed.sum(1))


@_register_kernel("_C_cache_ops::cp_gather_cache")
def cp_gather_cache(cache, result, pages, ends, num_sequences, starts=None) -> None:
    """Copy the pages of sequences, from their starts on, one after another."""
    size = cache.shape[1]
    for number in range(num_sequences):
        begin, end = ends[number : number + 2].tolist()
        first = 0 if starts is None else int(starts[number])
        positions = torch.arange(first, first + end - begin)
        result[begin:end] = cache[pages[number, positions // size].long(), positions % size]


@_register_kernel("_C_cache_ops::gather_and_maybe_dequant_cache")
def gather_and_maybe_dequant_cache(
    cache, result, pages, ends, sequences, num_tokens, dtype, scale, starts=None
) -> None:
    """Copy the pages of sequences one after another, of a cache that is not quantized."""
    assert not dtype.startswith("fp8")
    cp_gather_cache(cache, result, pages, ends, len(ends) - 1, starts)


GROUP = 128
"""Values that share a scale, along rows of inputs and both ways in weights."""


def _spread_scales(scales, *sizes: int) -> torch.Tensor:
    """Return the scales of blocks as those of values: the last dimensions get `sizes`."""
    for dim, size in enumerate(sizes, start=-len(sizes)):
        scales = scales.repeat_interleave(GROUP, dim).narrow(dim, 0, size)
    return scales


@_register_kernel("_C::per_token_group_fp8_quant")
def per_token_group_fp8_quant(
    x, codes, scales, size, epsilon, min_code, max_code, is_power_of_two, *layout
) -> None:
    """Write the codes of groups of `size` values of each row, and their scales."""
    groups = x.float().unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1).clamp(min=epsilon) / max_code
    if is_power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    codes.copy_((groups / scale[..., None]).clamp(min_code, max_code).flatten(-2).to(codes.dtype))
    scales.copy_(scale)


@_register_kernel("_C::silu_and_mul_per_block_quant")
def silu_and_mul_per_block_quant(codes, x, scales, size, bound=None, is_transposed=False) -> None:
    """Write the codes and scales of SiLU of the first half of each row, times the second half."""
    assert bound is None
    product = torch.empty(codes.shape, dtype=torch.float32)
    silu_and_mul(product, x.float())
    per_token_group_fp8_quant(product, codes, scales, size, 1e-10, -448.0, 448.0, False)


def deep_gemm_product(a, b, result, *, is_deep_gemm_e8m0_used: bool | None = None) -> None:
    """Write the product of a (rows, in), with scales of groups, and b (out, in), of blocks."""
    (left, left_scales), (right, right_scales) = a, b
    left = left.float() * _spread_scales(left_scales, left.shape[-1])
    result.copy_(left @ (right.float() * _spread_scales(right_scales, *right.shape)).T)


def deep_gemm_experts(a, b, result, ends, *, use_psum_layout: bool) -> None:
    """Write the products of each expert's rows, which begin at multiples, with its matrix."""
    from vllm.utils.deep_gemm import get_mk_alignment_for_contiguous_layout

    assert use_psum_layout
    alignment, start = get_mk_alignment_for_contiguous_layout()[0], 0
    for expert, end in enumerate(ends.tolist()):
        rows = slice(start, end)
        deep_gemm_product([x[rows] for x in a], [x[expert] for x in b], result[rows])
        start = -(-end // alignment) * alignment


def experts(
    A, B, C, A_scale, B_scale, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded,
    mul_routed_weight, top_k, config, compute_type, *kinds, B_bias=None, **quantized,
) -> None:  # fmt: skip
    """Write the products of tokens A with their experts' matrices B to C.

    A is (tokens, in), B (experts, out, in), C (tokens, experts of a token, out). It stands for
    vLLM's `invoke_fused_moe_triton_kernel`, whose interpreted kernel takes a thousand times as
    long."""
    routing = topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded
    arguments = [A, B, C, *routing, B_bias, A_scale, B_scale]
    drain({x.get_device() for x in arguments if x is not None})
    on_hosts: list[Any] = [None if x is None else on_host(x) for x in arguments]
    a, b, c, weights, sorted_ids, block_experts, num_padded, bias, a_scale, b_scale = on_hosts
    out = c.view(-1, c.shape[-1])
    with torch.utils._python_dispatch._disable_current_modes():
        if sorted_ids is None:  # each row is a block of its own
            rows_of = {row: [row] for row in range(len(block_experts))}
        else:
            size, num_rows = config["BLOCK_SIZE_M"], int(num_padded)
            starts = range(0, num_rows, size)
            rows_of = {start // size: sorted_ids[start : start + size].tolist() for start in starts}
        for block, numbers in rows_of.items():
            rows = torch.tensor([row for row in numbers if row < len(out)], dtype=torch.long)
            expert = int(block_experts[block])
            if expert < 0:  # another rank's
                out[rows] = 0
                continue
            left, right = a[rows // top_k].float(), b[expert].float()
            if b_scale is not None:
                left = left * _spread_scales(a_scale[rows // top_k], left.shape[-1])
                right = right * _spread_scales(b_scale[expert], *right.shape)
            product = left @ right.T
            if bias is not None:
                product = product + bias[expert]
            if mul_routed_weight:
                product = product * weights.flatten()[rows, None]
            out[rows] = product.to(out.dtype)
