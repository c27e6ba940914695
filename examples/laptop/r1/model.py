"""Model folders without weights: a configuration, and a tokenizer trained on the recipe's corpus.

Byte-pair encoding whose merges may span words, for what is said again and again to become one
token; digits stay alone, since a model this small adds digit by digit. The same tokenizer for all
architectures: teachers score what students say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_r1.files import atomic_write

SPECIAL = ["<bos>", "<eos>", "<pad>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SEPARATE = Regex(r" [-+*=] |\d|\n|[A-Z][a-z]+|[-+*=()]")
"""Never merged with what is beside them: signs, digits, lines, names."""
CONFIGS = Path(__file__).parent / "models"


def write(folder: str, corpus: str, architecture: str, vocabulary: int = 1024) -> None:
    """architecture: deepseek, qwen or llama; corpus: JSONL of {prompt, response}."""
    tokenizer = train_tokenizer(corpus, vocabulary)
    tokenizer.save_pretrained(folder)
    config: dict[str, Any] = json.loads((CONFIGS / f"{architecture}.json").read_text())
    config |= {"vocab_size": len(tokenizer)}
    atomic_write(Path(folder) / "config.json", json.dumps(config, indent=2))


def train_tokenizer(corpus: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """SPECIAL, TAGS, the bytes, and merges up to `vocabulary` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SEPARATE, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tags = [AddedToken(tag, special=False, normalized=False) for tag in TAGS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = map(json.loads, Path(corpus).read_text(encoding="utf-8").splitlines())
    spoken = (without_tags(row["prompt"] + row["response"]) for row in texts)
    tokenizer.train_from_iterator((part for parts in spoken for part in parts), trainer)
    tokenizer.add_tokens(tags)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def without_tags(text: str) -> list[str]:
    parts = [text]
    for tag in TAGS:
        parts = [piece for part in parts for piece in part.split(tag)]
    return [part for part in parts if part]
