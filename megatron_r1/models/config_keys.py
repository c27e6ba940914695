"""Every key of `config.json` is read, is known to change nothing, or is refused by name. No torch.

A key that no code reads may change what a model computes: a window, a bias, a scale. So a
configuration is checked by reading it with `Recorded`."""

from typing import Any

from megatron_r1.base.errors import Cause, UserError


class Recorded(dict):
    """A configuration that records which of its keys were read."""

    def __init__(self, hf: dict):
        super().__init__(hf)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)


# What a model is called, which software wrote it, and how text is generated.
_NAMES = """architectures model_type auto_map transformers_version
    unsloth_fixed unsloth_version is_llama_config transformers.js_config tokenizer_class
    finetuning_task task_specific_params prefix problem_type id2label label2id num_labels"""
_GENERATION = """use_cache max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    cache_implementation max_sequence_length"""
# How weights are stored, what the forward pass returns, and how the
# authors trained: auxiliary losses, parallel sizes. Training here has settings of its own.
_OUTPUT = """torch_dtype dtype return_dict output_hidden_states
    output_attentions output_router_logits torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward pruned_heads tie_encoder_decoder is_encoder_decoder is_decoder
    add_cross_attention cross_attention_hidden_size attn_implementation"""
_TRAINING = """initializer_range router_aux_loss_coef aux_loss_alpha seq_aux ep_size pretraining_tp
    classifier_dropout hidden_dropout_prob"""
INERT = frozenset(" ".join((_NAMES, _GENERATION, _OUTPUT, _TRAINING)).split())
"""Keys without an influence on a model's logits."""


def _is_inert(key: str) -> bool:
    # A leading underscore marks transformers' own notes, such as _name_or_path.
    return key in INERT or key.startswith("_") or key.endswith("_token_id")


def refuse_unread(hf: Recorded) -> None:
    """Raise UserError naming the keys with a value that were not read and are not inert."""
    unknown = {
        key: value
        for key, value in hf.items()
        if value is not None and key not in hf.keys_read and not _is_inert(key)
    }
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
        raise UserError(
            f"config.json of {' '.join(hf.get('architectures') or [])}: {listed} is not supported "
            "and could change what the model computes; remove it from config.json if you know that "
            "it does not",
            key=min(unknown),
            cause=Cause.UNSUPPORTED,
        )
