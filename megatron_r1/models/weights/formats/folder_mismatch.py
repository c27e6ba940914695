"""What a message says of a Hugging Face folder whose tensors do not fit its `config.json`."""

from __future__ import annotations

from megatron_r1.models.hf_config import HFConfig

_BODY = "model."
"""The prefix that the names of all tensors have, except the head's."""


def mismatch_hint(
    missing: list[str], extra: list[str], is_unreadable: bool, hf_config: HFConfig
) -> str:
    """Return what to do about tensors that do not fit.

    Args:
        missing: names in the configuration alone.
        extra: names in the folder alone.
        is_unreadable: whether a tensor has a dtype that cannot be read.
        hf_config: the model's `config.json`."""
    mtp = str(hf_config["num_hidden_layers"])
    if is_unreadable:
        return "; load the model with transformers and save it in bfloat16 or float32"
    if missing and extra and (prefix := _differing_prefix(missing, extra)):
        difference = f"begin with {prefix}" if prefix != _BODY else f"lack {_BODY}"
        return (
            f"; the names {difference}: save the model itself (an AutoModelForCausalLM; of PEFT "
            "after merge_and_unload) by save_pretrained"
        )
    if extra and not missing:
        return (
            "; correct the key of config.json that differs, or remove these tensors if the model "
            "does not need them"
        )
    if any(name.split(".layers.")[-1].split(".")[0] == mtp for name in missing):
        return "; leave the MTP layers out (model.mtp: none) if the checkpoint has none"
    if missing == ["lm_head.weight"]:
        return "; set tie_word_embeddings to true if the embedding is the head, or fetch it again"
    return "; fetch the folder again, or correct the key of config.json that differs"


def _differing_prefix(missing: list[str], extra: list[str]) -> str:
    """Return the prefix that turns every missing name into an unexpected one, or `_BODY` if all
    unexpected names lack that prefix; "" if the names differ in another way."""
    extra_names, missing_names = set(extra), set(missing)
    if {_BODY + name for name in extra_names} <= missing_names:
        return _BODY
    ending = missing[0]
    prefix = next((name for name in extra if name.endswith(ending)), "").removesuffix(ending)
    return prefix if prefix and {prefix + name for name in missing_names} <= extra_names else ""


def shorten_names(names: list[str], limit: int = 8) -> str:
    """Return the first `limit` of the names as a list in words, and how many more there are."""
    ending = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + ending
