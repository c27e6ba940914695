"""Model folders without weights: a configuration, and a tokenizer trained on the recipe's corpus.

Byte-pair encoding whose merges may span words, so that frequent phrases become one token; digits
stay separate, as a model this small adds digit by digit. All architectures have the same tokenizer,
since teachers score the tokens of students."""

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.laptop.make_tokenizer import SPECIAL, TAGS, as_transformers
from megatron_r1.base.files import atomic_write

SEPARATE = Regex(r" [-+*=] |\d|\n|[A-Z][a-z]+|[-+*=()]")
"""Never merged with their neighbours: signs, digits, line ends, names."""
CONFIGS = Path(__file__).parent / "models"


def write(folder: str, corpus: str, architecture: str, vocabulary: int = 1024) -> None:
    """Write `folder`.

    Args:
        corpus: JSONL {prompt, response}.
        architecture: deepseek, qwen, llama."""
    write_folder(Path(folder), train_tokenizer(corpus, vocabulary), architecture)


def write_folder(folder: Path, tokenizer: PreTrainedTokenizerFast, architecture: str) -> None:
    tokenizer.save_pretrained(folder)
    config = json.loads((CONFIGS / f"{architecture}.json").read_text())
    config |= {"vocab_size": len(tokenizer)}
    atomic_write(folder / "config.json", json.dumps(config, indent=2))


def train_tokenizer(corpus: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of SPECIAL, TAGS, the bytes, and merges up to `vocabulary` tokens."""
    tokenizer = Tokenizer(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    separate = pre_tokenizers.Split(SEPARATE, "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([separate, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tags = [AddedToken(tag, special=False, normalized=False) for tag in TAGS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = map(json.loads, Path(corpus).read_text(encoding="utf-8").splitlines())
    texts = (row["prompt"] + row["response"] for row in rows)
    parts = (part for text in texts for part in re.split("|".join(TAGS), text) if part)
    tokenizer.train_from_iterator(parts, trainer)
    tokenizer.add_tokens(tags)
    return as_transformers(tokenizer)
