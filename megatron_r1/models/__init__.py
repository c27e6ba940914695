"""Models on Megatron-Core, built from Hugging Face configurations.

- `families`: the table of architectures, where one made of known parts is a new entry.
- `hf_config`, `support_checks`, `attention_fields`, `rotary_fields`, `experts`, `routing_shape`:
  what `config.json` says; `hf_config_file`, `hf_config_names`: how it is read.
- `parallel_checks`, `exchange_overlap_checks`: which settings of `parallel` a model refuses.
- `megatron_config`, `build`: Megatron's configuration, and a rank's part of a model of it, which is
  a `policy_model` or a `score_model`; `pipeline_stages`: the layers of each part.
- `memory`, `compute_cost`: a model's bytes, and the compute of a sample.
- `layer_specs`: the modules of a layer; `layers`, `attention`, `ring_attention`, `length_buckets`,
  `prefix_attention`: what Megatron lacks on a CPU or has wrong.
- `shared_prefixes`: what sequences share; `te_prefix_attention`: attention to it on a GPU.
- `context_parallel`: the split of tokens over ranks.
- `expert_exchange_overlap`, `token_dispatcher`: the exchange of tokens between experts' ranks.
- `host_packed_seq_params`, `sampling_mask`: what comes with the tokens of a packed batch.
- `attention_choice`: which attention Transformer Engine takes on this GPU, and why.
- `platform`, `patches`, `cpu_patches`: prepare a process; `patch_type`: what a patch is made of;
  `expert_routing`, `packed_rotary`, `packed_roll`: functions in the place of Megatron's;
  `rendezvous_store`: where ranks meet.
- `gradients`, `fp8` (on CPUs `fp8_emulation`, on GPUs `fp8_checks`), `routing_replay`: the rules of
  gradients, FP8 training and routing replay.
- `loaded_libraries`: the versions of CUDA's libraries, as their files report them.
- `weights`: the table of all weights; `transformers_model`: a model for comparisons.

Everything but `read_hf_config` is imported at first use, after `models.platform.prepare_process()`;
before the first model is built, `patches.install()` is called."""

from typing import Any

from r1_grading.base import import_lazily

from megatron_r1.models.hf_config_file import read_hf_config

_MODULE_BY_NAME = {
    "transformer_config": "megatron_config",
    "build_model": "build",
    "freeze_mtp": "policy_model",
    "lm_head_weight": "policy_model",
    "compute_logits": "policy_model",
    "vocab_shard": "policy_model",
}

__all__ = ["read_hf_config", *_MODULE_BY_NAME]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULE_BY_NAME, name)
