"""Calls attention and the loss head once before the first step, so that no step waits until their
kernels are compiled.

cuDNN compiles attention in every process, forward and backward, for each bucket of the tokens that
a rank has of a micro-batch; Triton compiles the loss head's kernels, and keeps them on disk."""

import time
from typing import Any

import torch
from r1_kernels import PolicySettings
from torch import nn

from megatron_r1 import models
from megatron_r1.config import Config
from megatron_r1.models import platform
from megatron_r1.models.attention_choice import longest_sample
from megatron_r1.models.hf_config import HFConfig, has_score_head
from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.loss_head import LossHead, TokenAveraging
from megatron_r1.trainer.sequence_packing import pack_batch
from megatron_r1.trainer.training_sample import Sample

FIRST_BUCKET, WIDEST_BUCKET = 1024, 32768
NUM_SAMPLES = 16
"""Samples of a micro-batch that is called with: up to 32, padding's among them, share a bucket
(`get_max_batch_size` next to `get_max_tokens`)."""


def token_buckets(largest: int) -> list[int]:
    """Return the buckets of up to `largest` tokens, as `get_max_tokens` of Transformer Engine
    2.20.2 has them (common/fused_attn/utils.cu), which its library does not export."""
    buckets = [FIRST_BUCKET]
    while buckets[-1] < largest:
        buckets.append(buckets[-1] + min(buckets[-1], WIDEST_BUCKET))
    return buckets


def called_tokens(config: Config, hf_config: HFConfig) -> list[int]:
    """Return the tokens of the micro-batches to call attention with: those of each bucket of a
    context rank's part, of the last bucket the largest micro-batch's."""
    context = config.parallel.context
    largest = max(config.parallel.microbatch_tokens, longest_sample(config, hf_config))
    largest_part = -(-largest // context)
    return [context * min(bucket, largest_part) for bucket in token_buckets(largest_part)]


def call_kernels(trainer: Any) -> None:
    """Call the kernels of a `Trainer` on a GPU, and print how long it took; elsewhere do nothing.
    All ranks call it together."""
    if not platform.has_gpu():
        return
    started_at, sizes = time.perf_counter(), called_tokens(trainer.config, trainer.hf_config)
    modules = [module for chunk in trainer.model_chunks for module in chunk.modules()]
    attentions = {  # windows differ by layer
        str(getattr(module.core_attention, "window_size", None)): module
        for module in reversed(modules)
        if hasattr(module, "core_attention")
    }
    for tokens in sizes if attentions else ():
        batch = _zero_batch(trainer, -(-tokens // NUM_SAMPLES), NUM_SAMPLES)
        for attention in attentions.values():
            _call_attention(attention, batch, trainer.transformer_config.params_dtype)
    if trainer.grid_position.is_last_stage and not has_score_head(trainer.hf_config):
        for num_samples in (NUM_SAMPLES, 3):  # Triton compiles for multiples of 16 rows apart
            _call_loss_head(trainer, _zero_batch(trainer, NUM_SAMPLES + 2, num_samples))
    torch.cuda.empty_cache()
    if trainer.grid_position.rank == 0:
        seconds, listed = time.perf_counter() - started_at, ", ".join(f"{n:,}" for n in sizes)
        print(f"attention called with {listed} tokens, and the loss head: {seconds:.1f} s")


def _zero_batch(trainer: Any, length: int, num_samples: int) -> PackedMicrobatch:
    """Return a micro-batch of equal samples of token 0, the first of each its prompt."""
    sample = Sample.pack([0], [0] * (length - 1), [0.0] * (length - 1))
    return pack_batch([sample] * num_samples, trainer.rollout.split, platform.device())


def _call_attention(attention: nn.Module, batch: PackedMicrobatch, dtype: torch.dtype) -> None:
    """Compute as in training, forward and backward, and as in a pass of log-probabilities."""
    core: Any = attention.core_attention
    heads, groups = core.num_attention_heads // core.tp_size, core.num_gqa_groups_per_partition
    key_size = core.hidden_size_per_attention_head_k
    shapes = (heads, key_size), (groups, key_size), (groups, core.hidden_size_per_attention_head_v)
    options: dict[str, Any] = {"dtype": dtype, "device": platform.device(), "requires_grad": True}
    operands = [torch.zeros(batch.input_ids.shape[1], *shape, **options) for shape in shapes]
    borders = batch.packed_seq_params
    for is_training in (True, False):
        core.train(is_training)
        with torch.set_grad_enabled(is_training):
            output = core(*operands, None, attention.attn_mask_type, packed_seq_params=borders)
        if is_training:
            # Of no parameter, as gpt-oss's offsets are: Megatron's hooks would count it as ready.
            torch.autograd.grad(output.sum(), operands)
    core.train()


def _call_loss_head(trainer: Any, batch: PackedMicrobatch) -> None:
    """Compute log-probabilities and the recipe's policy loss of zeros, without the gradient of the
    weight, whose product is no kernel of Triton's."""
    config, groups = trainer.config, trainer.process_groups
    weight = models.lm_head_weight(trainer.model_chunks[-1]).detach()
    loss_settings = config.rl.loss_settings(config.rollout.max_response_tokens)
    settings = PolicySettings(*(getattr(loss_settings, name) for name in PolicySettings._fields))
    if loss_settings.kl_estimator == "unbiased":  # a correction's, in PyTorch
        settings = settings._replace(kl_estimator="k3")
    hidden = weight.new_zeros((batch.input_ids.shape[1], weight.shape[1]), requires_grad=True)
    vocab_size, temperature = trainer.hf_config["vocab_size"], config.rollout.temperature
    head = LossHead(batch, hidden, weight, temperature, groups.tp, vocab_size, groups.cp)
    head.logprobs()[0].sum().backward()
    if loss_settings.kl_beta:
        batch.logprobs["ref"] = torch.zeros_like(batch.advantages)
    terms = head.policy_loss(settings, TokenAveraging(batch.is_response), config.rl.ratio_level)
    terms.loss.backward()
