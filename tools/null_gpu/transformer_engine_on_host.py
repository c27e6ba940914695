"""Transformer Engine's kernels as torch's operators, so that its modules compute on the null GPU.

Functions of its extension, `transformer_engine_torch`, are replaced; its Python - modules, autograd
functions, communication, optimizer - is what is installed. Attention computes by its plain
products; instead of its kernels, cuDNN's and flash-attn's, `use_our_attention` takes ours for CPUs.
Of a product and its sum only the dtype that is written is imitated, not the order of additions. Of
FP8, blocks of 128 are imitated (`Float8BlockQuantizer`): tensors are quantized into the storage
that the kernels fill, and products are of what that storage holds."""

import importlib
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from host_compute import KERNELS

ORIGINALS: dict[str, Callable[..., Any]] = {}
"""The functions of the extension, by name: of other kinds of FP8, which do nothing."""
BLOCK = 128


def install() -> None:
    """Replace them: before anything imports Megatron."""
    importlib.import_module("transformer_engine.pytorch")
    te_modules = [m for name, m in sys.modules.items() if name.startswith("transformer_engine")]
    for kernel in (
        generic_gemm,
        te_general_grouped_gemm,
        rmsnorm_fwd,
        rmsnorm_bwd,
        multi_tensor_adam,
        multi_tensor_scale,
        multi_tensor_l2norm,
        quantize,
        split_quantize,
        fp8_transpose,
        fused_multi_row_padding,
        fused_multi_row_unpadding,
    ):
        original = getattr(sys.modules["transformer_engine_torch"], kernel.__name__)
        ORIGINALS[kernel.__name__] = original
        for module in te_modules:
            if getattr(module, kernel.__name__, None) is original:
                setattr(module, kernel.__name__, kernel)


def use_our_attention() -> None:
    """Build models with `models.attention`, by operators that every device has."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    from megatron_r1.models import attention_choice
    from megatron_r1.models.attention import CoreAttention

    TESpecProvider.core_attention = lambda self: CoreAttention
    choose = attention_choice.choose_attention

    def choose_ours(parameters, setting="auto"):
        choose(parameters, setting)  # asked as on a GPU, but ours also computes what it refuses
        return attention_choice.AttentionChoice("flash", "")

    attention_choice.choose_attention = choose_ours
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def generic_gemm(
    a, is_a_transposed, b, is_b_transposed, out, quantizer, out_dtype, bias, bias_dtype, gelu,
    gelu_in, is_gradient, workspace, workspace_size, accumulate, split_accumulator, **overlap,
):  # fmt: skip
    """op(b) @ op(a), matrices in cuBLAS's order, with the bias added, or its gradient returned."""
    assert quantizer is None and not gelu and overlap.get("comm_overlap") is None
    dtype = None
    if _is_quantized(a):
        dtype = a._dtype if out_dtype is None else _torch_dtype(out_dtype)
    a, b = _dequantized_values(a, not is_a_transposed), _dequantized_values(b, is_b_transposed)
    rows = b.shape[:-1]
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    product = (b.t() if is_b_transposed else b) @ (a.t() if is_a_transposed else a)
    bias_gradient = None
    if bias is not None and is_gradient:
        bias_gradient = b.sum(0)
    elif bias is not None:
        product = product + bias
    if out is None:
        shape = product.shape if is_b_transposed else (*rows, product.shape[-1])
        out = product.view(shape).to(dtype or product.dtype)
    else:
        target = out.view(product.shape)
        target.add_(product) if accumulate else target.copy_(product)
    return [out, bias_gradient, None, overlap.get("extra_output")]


def te_general_grouped_gemm(
    a, is_a_transposed, b, is_b_transposed, out, out_dtype, sizes, bias, bias_dtype, is_one_output,
    gelu_in, is_gradient, workspaces, workspace_size, accumulate, split_accumulator, num_sms,
):  # fmt: skip
    """One product for every expert."""
    outs = out[0].split(sizes) if is_one_output else out
    for left, right, target in zip(a, b, outs, strict=True):
        common = (None, None, None, None, False, None, False, None, 0)
        generic_gemm(
            left, is_a_transposed, right, is_b_transposed, target, *common, accumulate, False
        )
    return list(bias)


def rmsnorm_fwd(x, weight, eps, out, quantizer, out_dtype, margin, is_zero_centered):
    """The norm of every row, no mean, and 1 / root mean square."""
    assert not is_zero_centered
    scale = (x.float().square().mean(-1) + eps).rsqrt()
    result = (x.float() * scale[:, None] * weight.float()).to(x.dtype)
    if quantizer is not None:
        return [quantize(result, quantizer, out), None, scale]
    return [result if out is None else out.copy_(result), None, scale]


def rmsnorm_bwd(gradient, x, scale, weight, margin, is_zero_centered):
    """The gradients of x and weight."""
    normalized = x.float() * scale[:, None]
    product = gradient.float() * weight.float()
    mean = (product * normalized).mean(-1, keepdim=True)
    d_x = (product - normalized * mean) * scale[:, None]
    return [d_x.to(x.dtype), (gradient.float() * normalized).sum(0).to(weight.dtype)]


def multi_tensor_adam(
    chunk, skip, lists, rate, beta1, beta2, epsilon, step, is_decoupled, corrects, decay
):
    """A step of AdamW on gradients, parameters, both moments and, where given, master weights."""
    assert is_decoupled and corrects
    for gradient, parameter, mean, square, *master in zip(*lists, strict=True):
        (target,) = master or (parameter,)
        mean.lerp_(gradient.float(), 1 - beta1)
        square.mul_(beta2).addcmul_(gradient.float(), gradient.float(), value=1 - beta2)
        root = (square / (1 - beta2**step)).sqrt() + epsilon
        change = mean / (1 - beta1**step) / root + decay * target
        target.sub_(rate * change)
        if master:
            parameter.copy_(target)


def multi_tensor_scale(chunk, overflow, lists, scale):
    """Write the multiples of tensors."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(chunk, overflow, lists, per_tensor):
    """The norm of all tensors together."""
    assert not per_tensor
    squares = torch.stack([tensor.float().square().sum() for tensor in lists[0]])
    return squares.sum().sqrt()[None], None


def quantize(tensor, quantizer, output=None, noop=None):
    """Write a tensor's FP8 blocks, along rows and along columns as the quantizer says, to `output`
    or a new one; nothing where `noop` is true."""
    if type(quantizer).__name__ != "Float8BlockQuantizer":
        return ORIGINALS["quantize"](tensor, quantizer, output, noop)
    if output is None:
        output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if tensor.numel() and (noop is None or not noop.item()):
        x = tensor.detach().flatten(0, -2).float()
        is_square = quantizer.block_scaling_dim == 2
        if output._rowwise_data is not None:
            codes, scales = _quantize_blocks(x, (BLOCK if is_square else 1, BLOCK), quantizer)
            _fill_beginning(output._rowwise_data, codes)
            _fill_beginning(output._rowwise_scale_inv, scales if is_square else scales.t())
        if output._columnwise_data is not None:
            codes, scales = _quantize_blocks(x, (BLOCK, BLOCK if is_square else 1), quantizer)
            _fill_beginning(output._columnwise_data, codes.t())
            _fill_beginning(output._columnwise_scale_inv, scales.t() if is_square else scales)
    return output


def split_quantize(tensor, sizes, quantizers, **options):
    """Quantize parts of rows, each by its own quantizer."""
    if type(quantizers[0]).__name__ != "Float8BlockQuantizer":
        return ORIGINALS["split_quantize"](tensor, sizes, quantizers, **options)
    rows = tensor.flatten(0, -2).split(list(sizes))
    return [quantize(part, quantizer) for part, quantizer in zip(rows, quantizers, strict=True)]


def fp8_transpose(data, dtype, *, out=None):
    """The codes with the last dimension first."""
    turned = data.movedim(-1, 0).contiguous()
    return turned if out is None else out.copy_(turned)


def fused_multi_row_padding(x, out, rows, padded_rows):
    """Write the rows of every expert to `out`, each followed by zeros up to its padded number."""
    for part, place, number in zip(
        x.split(rows), out.view(-1, x.shape[-1]).split(padded_rows), rows, strict=True
    ):
        place[:number].copy_(part)
        place[number:].zero_()


def fused_multi_row_unpadding(x, out, padded_rows, rows):
    """Write the rows of every expert to `out`, without those that follow."""
    for part, place, number in zip(
        x.split(padded_rows), out.view(-1, x.shape[-1]).split(rows), rows, strict=True
    ):
        place.copy_(part[:number])


def _quantize_blocks(x, block, quantizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the FP8 numbers of x (rows, columns) as bytes, and the scales of its blocks."""
    dtype = _torch_dtype(quantizer.dtype)
    rows, columns = block
    down, across = -(-x.shape[0] // rows), -(-x.shape[1] // columns)
    padded = x.new_zeros(down * rows, across * columns)
    padded[: x.shape[0], : x.shape[1]] = x
    tiles = padded.view(down, rows, across, columns)
    amax = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp(min=quantizer.amax_epsilon)
    # A number divided by a tensor would be multiplied by its rounded reciprocal.
    largest = amax.new_tensor(torch.finfo(dtype).max)
    scale = (largest / amax).clamp(max=torch.finfo(torch.float32).max)
    if quantizer.force_pow_2_scales:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    codes = (tiles * scale).to(dtype).view(torch.uint8).view(padded.shape)
    return codes[: x.shape[0], : x.shape[1]], (1 / scale).view(down, across)


def _fill_beginning(target, values) -> None:
    """Write values into the beginning of a target that is padded, or has more dimensions."""
    flat = target if target.dim() == values.dim() == 2 else target.view(values.shape)
    flat[: values.shape[0], : values.shape[1]].copy_(values)


def _is_quantized(x) -> bool:
    return hasattr(x, "_rowwise_data")


def _dequantized_values(x, is_columnwise: bool) -> torch.Tensor:
    """Return x; of one in FP8 blocks, what those along its rows or its columns hold, in fp32."""
    if not _is_quantized(x):
        return x
    parts = x.get_metadata()
    other_direction = "rowwise" if is_columnwise else "columnwise"
    direction = "columnwise" if is_columnwise else "rowwise"
    if parts[f"{direction}_data"] is None:
        assert parts["is_2D_scaled"], f"no blocks along the {direction} direction"
    else:
        parts |= {f"{other_direction}_data": None, f"{other_direction}_scale_inv": None}
    storage = sys.modules[
        "transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage"
    ].Float8BlockwiseQTensorStorage
    return storage(**parts).dequantize(dtype=torch.float32)


def _torch_dtype(dtype) -> torch.dtype:
    constants = importlib.import_module("transformer_engine.pytorch.constants")
    return constants.TE_DType_To_Torch[constants.DType.cast(dtype)]


def convert_thd_to_bshd(packed, cu_seqlens, batch, longest):
    """Packed sequences as rows of a batch, with zeros behind each."""
    rows = packed.new_zeros(batch, longest, *packed.shape[1:])
    for row, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        rows[row, : end - start] = packed[start:end]
    return rows


def convert_bshd_to_thd(rows, cu_seqlens, num_tokens):
    """The reverse."""
    packed = rows.new_zeros(num_tokens, *rows.shape[2:])
    for row, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        packed[start:end] = rows[row, : end - start]
    return packed


# Operators whose Python makes their tensors contiguous, which torch does not compute within them.
KERNELS["te_attention::convert_thd_to_bshd"] = convert_thd_to_bshd
KERNELS["te_attention::convert_bshd_to_thd"] = convert_bshd_to_thd
