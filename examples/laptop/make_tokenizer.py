"""Write the laptop model's tokenizer: bytes, plus one token for each phrase of the task.

A byte-level vocabulary encodes any UTF-8 text without loss. The phrases of the question template
and the tags are additional single tokens, so that a prompt takes about a dozen tokens; every digit
is one token.

    python -m examples.laptop.make_tokenizer examples/laptop/model"""

import sys
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<bos>", "<eos>", "<pad>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
QUESTION = [
    "User: ",
    "\nAssistant: ",
    "State the final answer to the following arithmetic problem: ",
]
PHRASES = [*TAGS, *QUESTION, " + ", " - ", " = ", " =", "wait", "so", " "]


def make_tokenizer(phrases: Sequence[str] = PHRASES) -> PreTrainedTokenizerFast:
    """Return a tokenizer of SPECIAL, `phrases` and the 256 bytes, with ids in this order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    phrases = [phrase for phrase in phrases if phrase not in alphabet]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *phrases, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in phrases])
    return as_transformers(tokenizer)


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer that has SPECIAL."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


if __name__ == "__main__":
    make_tokenizer().save_pretrained(sys.argv[1])
