"""A Qwen2-shaped model whose answers have the lengths of reasoning: most short, a few very long.

Weights are random but for two features of the residual stream that no layer writes to: a constant,
and the kind of the token that was read last, plain or dwelling. The head reads these two, so that
the chance to end is about `Tail.end` after a plain token and `Tail.end_dwelling` after a dwelling
one, and that to begin to dwell `Tail.dwell`. Lengths are then those of a two-state chain, the same
for every system that samples from the folder.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}
SPECIAL_TOKENS = 3  # never sampled, but for the end
END = CONFIG["eos_token_id"]
NEVER = -40.0  # a logit
# Of both, beside features of standard deviation 1: so large that the norm, by which all are
# divided, hardly depends on the others.
FEATURE = 30.0
WORD_STD = 0.5  # of the other tokens' logits, about


@dataclass(frozen=True)
class Tail:
    """Chances per token. dwell: of going from plain to dwelling; there is no way back."""

    end: float = 1 / 20
    end_dwelling: float = 1 / 150
    dwell: float = 1 / 200

    def mean_length(self, limit: int) -> float:
        """Of answers cut at `limit` tokens, the end token included, from a plain prompt on."""
        plain, dwelling, mean = 1.0, 0.0, 0.0
        for _ in range(limit):
            mean += plain + dwelling
            goes_on = 1 - self.end_dwelling
            moved = plain * (1 - self.end) * self.dwell
            plain, dwelling = plain * (1 - self.end) - moved, dwelling * goes_on + moved
        return mean


def write_model(folder: Path, tokenizer: Path, tail: Tail, seed: int = 0) -> Path:
    """A Hugging Face folder with such weights and the tokenizer of the folder `tokenizer`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    config = json.dumps({**CONFIG, "vocab_size": vocabulary}, indent=1)
    (folder / "config.json").write_text(config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, weight.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[:2] = 0.0
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.normal_()
        embedding[:, 0], embedding[:, 1] = FEATURE, FEATURE * _kinds(vocabulary)
        text = torch.randint(SPECIAL_TOKENS, vocabulary, (8, 64))
        constant = model.model(text).last_hidden_state[..., 0].mean()
        _write_chances(head, tail, float(constant))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(config)  # as it was, not as transformers completes it
    return folder


def _kinds(vocabulary: int):
    """-1 for plain tokens, 1 for dwelling ones (vocabulary,): the later half. ASCII is plain."""
    import torch

    return torch.where(torch.arange(vocabulary) < vocabulary // 2, -1.0, 1.0)


def _write_chances(head, tail: Tail, constant: float) -> None:
    """Let `head` (vocabulary, hidden) give each next token its chance. constant: the first feature
    after the last norm, which is also the size of the second."""
    import torch

    kinds = _kinds(len(head))
    kinds[:SPECIAL_TOKENS] = 0
    plain, dwelling = (kinds == -1).sum(), (kinds == 1).sum()
    after_plain = torch.full((len(head),), NEVER)
    after_dwelling = after_plain.clone()
    after_plain[kinds == -1] = torch.log((1 - tail.end) * (1 - tail.dwell) / plain)
    after_plain[kinds == 1] = torch.log((1 - tail.end) * tail.dwell / dwelling)
    after_dwelling[kinds == 1] = torch.log((1 - tail.end_dwelling) / dwelling)
    after_plain[END], after_dwelling[END] = math.log(tail.end), math.log(tail.end_dwelling)
    head.normal_(0.0, WORD_STD * head.shape[1] ** -0.5)
    head[:, 0] = (after_dwelling + after_plain) / 2 / constant
    head[:, 1] = (after_dwelling - after_plain) / 2 / constant
