"""Building this rank's part of a model."""

from __future__ import annotations

import copy
from importlib import import_module

from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_r1.models.hf_config import architecture
from megatron_r1.models.layers import block_specs
from megatron_r1.models.policy_model import PolicyModel


def build_model(
    hf: dict,
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
    with_mtp: bool = True,
) -> PolicyModel:
    """This rank's pipeline stage (of virtual stage `vp_stage`) with Megatron's random weights.

    Megatron's process groups must exist and agree with `config`. The vocabulary is padded to a multiple of the
    tensor-parallel size (see `vocab_shard`). with_mtp=False leaves the multi-token-prediction layers out; the
    model then carries its own copy of `config` that says so, and exports no MTP weights.
    Raises ValueError for full recomputation together with MTP.
    """
    if config.mtp_num_layers and not with_mtp:
        config = copy.copy(config)
        config.mtp_num_layers = None
    if config.mtp_num_layers and config.recompute_granularity == "full":
        raise ValueError(
            "recompute='full' with multi-token-prediction layers does not work on packed batches in "
            "Megatron-Core 0.16.1; use recompute='selective' or leave MTP out (model.mtp: false)"
        )
    model = import_module(f"megatron_r1.models.{architecture(hf)}")
    block, mtp = block_specs(config, vp_stage=vp_stage)
    tensor_parallel = config.tensor_model_parallel_size
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    built = PolicyModel(
        config=config,
        transformer_layer_spec=block,
        mtp_block_spec=mtp,
        vocab_size=-(-hf["vocab_size"] // tensor_parallel) * tensor_parallel,
        max_sequence_length=hf["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        parallel_output=True,
        vp_stage=vp_stage,
        **model.model_arguments(hf),
    )
    built.num_tokens = hf["vocab_size"]
    scaling = None if model.LATENT_ATTENTION else model.rope_scaling(hf)
    if scaling:
        rotary = built.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **scaling)
    return built


def freeze_mtp(model: PolicyModel) -> None:
    """Exclude the MTP layers from training; call before wrapping in DistributedDataParallel.

    For RL, which gives no labels: parameters without gradients would still be shrunk by weight decay.
    """
    model = unwrap_model(model)
    if getattr(model, "mtp", None) is not None:
        model.mtp.requires_grad_(False)
