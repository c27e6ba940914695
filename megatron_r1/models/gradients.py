"""Over which ranks a parameter's gradient is summed, and on which its norm counts.

A rank computes the gradient of each parameter that it holds from the tokens and features that it
sees. Ranks that hold the same parameter and see other tokens or features add up their gradients;
Megatron reads from attributes of the parameter which ranks these are:

    parameter                                     summed over        attributes
    split over the tensor ranks                   data               a
    whole on each of them, which see all tokens   data               -
    whole on each, which see a part each          data, tensor       b
    norm of queries or keys of a rank's heads     data, tensor       - (Megatron knows its name)
    of routed experts                             expert data        a, c
    copy of the embedding                         data, embedding    -

    a    tensor_model_parallel: the norm of all gradients counts the parameter on every tensor rank,
         without it on the first only (tensor_parallel/layers.py:87, Megatron-Core 0.19.2)
    b    sequence_parallel
    c    allreduce is False, where experts have another grid than the other parameters

data is Megatron's group `dp_cp` (data and context parallelism), expert data `expt_dp`: the buffers
of DistributedDataParallel sum over them. tensor is `tp` and embedding `embd`: there
`finalize_model_grads` does. No parameter has `average_gradients_across_tp_domain`.

This file sets what our own layers need, and corrects what Megatron and Transformer Engine set
otherwise. Gradients of activations are no matter of attributes: the layers' own communication sums
them (`policy_model.LMHead`, `layers.LatentAttention`). An adapter's factor has its weight's
`allreduce`, and is summed over the tensor ranks, where it has to be, in its own backward pass
(`models.weights.adapter_module`)."""

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_r1.models.pipeline_stages import parse_layout


def mark_sequence_parallel(parameter: Parameter, config: TransformerConfig) -> None:
    """Mark a parameter that every tensor rank has whole, so that Megatron sums its gradient over
    these ranks: under sequence parallelism each rank computes it from its own tokens."""
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def copy_gradient_attributes(factor: Parameter, weight: Tensor, counts: bool) -> None:
    """Copy to an adapter's factor the attributes by which Megatron reduces the gradient of
    `weight`.

    Args:
        factor: the adapter's factor.
        weight: the weight that the adapter changes.
        counts: whether the norm counts the factor's gradient on this tensor rank."""
    factor.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
    factor.tensor_model_parallel = counts  # type: ignore[attr-defined]


def fp32_main_grad(weight: Tensor) -> Tensor | None:
    """Return the fp32 sum of a head's gradients over micro-batches, to which r1_kernels add theirs.

    None where autograd gets the gradient: without DistributedDataParallel's buffer, for a frozen
    weight, one that adapters change, and a buffer in 16 bits; and in a pass without gradients.

    Args:
        weight: the head's, which may be the embedding's too."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return None
    return (
        main_grad if main_grad.dtype == torch.promote_types(weight.dtype, torch.float32) else None
    )


def skip_zero_gradients(weight: Tensor) -> None:
    """Keep DistributedDataParallel from adding the zeros that stand for a head's gradient when the
    kernels have already added it to `fp32_main_grad`.

    Megatron's own layers set `grad_added_to_main_grad` for that without a check. The gradient of
    another operation on the same weight, a tied embedding or a loss of the user's, is then lost.
    Here the strides of the gradient decide: the kernels' zeros are one number in memory, and their
    sum with another gradient is not."""

    def mark(gradient: Tensor) -> None:
        weight.grad_added_to_main_grad = not any(gradient.stride())  # type: ignore[attr-defined]

    weight.register_hook(mark)


def correct_attributes(model: Module, config: TransformerConfig) -> None:
    """Correct the attributes of a model's parameters as Megatron has built it."""
    _correct_experts(model, config)
    _correct_sinks(model)
    _correct_down_projections(model)


def _correct_experts(model: Module, config: TransformerConfig) -> None:
    """Keep the bias of an expert's second layer, which Megatron marks as every row-parallel bias,
    from being summed over the tensor group once more where its ranks have different experts."""
    if config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                parameter.sequence_parallel = False  # type: ignore[attr-defined]


def _correct_sinks(model: Module) -> None:
    """Have the norm count the attention sinks of every tensor rank: they are split over the tensor
    ranks, and Megatron's attention does not mark them so."""
    for name, parameter in model.named_parameters():
        if name.endswith(".softmax_offset"):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)


def _correct_down_projections(model: Module) -> None:
    """Have the norm count the down-projections of latent attention once.

    Every tensor rank holds these weights whole, but Transformer Engine marks the weights of all its
    linear layers as split (pytorch/module/linear.py:2297, 2.20.2): with tensor_parallel 2 the norm
    was 11% too large on a small model, and gradients were clipped by as much too early."""
    for module in model.modules():
        if isinstance(module, MLASelfAttention):
            for name in ("linear_q_down_proj", "linear_kv_down_proj"):
                if hasattr(module, name):
                    getattr(module, name).weight.tensor_model_parallel = False


def embedding_ranks(pipeline_layout: str | None, pipeline: Sequence[int]) -> list[int]:
    """Return the ranks of one pipeline whose copies of the embedding are kept equal.

    They are the first, and the one with the MTP layers, which without a layout is the last. Where
    MTP layers and head are on different ranks, Megatron would otherwise treat the last rank's head
    as a copy of the embedding (Megatron-Core 0.19.2, language_module.py:81).

    Args:
        pipeline_layout: Megatron's description of the stages; None: an even spread.
        pipeline: the global ranks of one pipeline, by stage.
    """
    with_copy = pipeline[-1]
    for index, stage in enumerate(parse_layout(pipeline_layout) if pipeline_layout else []):
        if "m" in stage:
            with_copy = pipeline[index % len(pipeline)]
    return list(dict.fromkeys([pipeline[0], with_copy]))
