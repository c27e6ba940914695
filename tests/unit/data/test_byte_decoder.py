"""The table's text equals the tokenizer's own."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_r1.data.byte_decoder import ByteDecoder
from megatron_r1.data.prompt_tokenizer import PromptTokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte, words, parts of letters, special tokens outside the alphabet, and a hole."""
    words = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "Ġthe",
        "ĠâĪĳ",
        "âĪ",
        "ðŁĺ",
        "Ċ",
        "Ġ.",
        "n't",
    ]
    backend = Tokenizer(models.BPE({word: i + 3 * (i > 99) for i, word in enumerate(words)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<｜end▁of▁sentence｜>"), AddedToken("<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_any_ids_have_the_tokenizers_text():
    tokenizer = byte_level()
    decoder = ByteDecoder.from_tokenizer(tokenizer)
    draw = np.random.default_rng(0)
    for length in (0, 1, 2, 3, 1000):
        for _ in range(50):
            ids = draw.integers(0, len(tokenizer) + 10, length).astype(np.int32)
            assert decoder.decode(ids) == tokenizer.decode(ids.tolist()), ids.tolist()
    assert decoder.decode(np.array([2**31 - 1, -1], np.int32)) == ""


def test_other_tokenizers_decode_themselves():
    class CleansUp:
        backend_tokenizer = byte_level().backend_tokenizer

        def decode(self, ids, **options):
            return self.backend_tokenizer.decode(ids, **options).replace(" .", ".")

    assert ByteDecoder.from_tokenizer(CleansUp()) is None
    spaces = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    assert ByteDecoder.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=spaces)) is None


@pytest.mark.parametrize("ends", [True, False])
def test_the_laptop_model_decodes_by_the_table(ends):
    tokenizer = PromptTokenizer("examples/laptop/model", "r1_zero")
    assert tokenizer._byte_decoder is not None
    ids = tokenizer.encode_response("<think>½ + ½</think>\n<answer>1</answer>")
    assert tokenizer.decode(ids if ends else ids[:-1]) == "<think>½ + ½</think>\n<answer>1</answer>"
