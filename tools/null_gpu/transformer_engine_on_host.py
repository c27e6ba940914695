"""Transformer Engine's kernels as torch's operators, so that its modules compute on the null GPU.

Functions of its extension, `transformer_engine_torch`, are replaced; its Python - modules, autograd
functions, communication, optimizer - is what is installed. Attention, whose kernels are cuDNN's and
flash-attn's, is ours for CPUs. Of a product and its sum only the dtype that is written is imitated,
not the order of additions; FP8 is not imitated."""

import importlib
import sys

import torch


def install() -> None:
    """Replace them: before anything imports Megatron."""
    importlib.import_module("transformer_engine.pytorch")
    theirs = [m for name, m in sys.modules.items() if name.startswith("transformer_engine")]
    for kernel in (
        *(generic_gemm, te_general_grouped_gemm, rmsnorm_fwd, rmsnorm_bwd),
        *(multi_tensor_adam, multi_tensor_scale, multi_tensor_l2norm),
    ):
        original = getattr(sys.modules["transformer_engine_torch"], kernel.__name__)
        for module in theirs:
            if getattr(module, kernel.__name__, None) is original:
                setattr(module, kernel.__name__, kernel)


def use_our_attention() -> None:
    """Build models with `models.attention`, by operators that every device has."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    from megatron_r1.models.attention import CoreAttention

    TESpecProvider.core_attention = lambda self: CoreAttention
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def generic_gemm(
    a, is_a_transposed, b, is_b_transposed, out, quantizer, out_dtype, bias, bias_dtype, gelu,
    gelu_in, is_gradient, workspace, workspace_size, accumulate, split_accumulator, **overlap,
):  # fmt: skip
    """op(b) @ op(a), matrices in cuBLAS's order, with the bias added, or its gradient returned."""
    assert quantizer is None and not gelu and overlap.get("comm_overlap") is None
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
        out = product.view(shape)
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
    assert quantizer is None and not is_zero_centered
    scale = (x.float().square().mean(-1) + eps).rsqrt()
    result = (x.float() * scale[:, None] * weight.float()).to(x.dtype)
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
