"""Greedy answers of an export, against a loop over single tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from examples.laptop.check_export import answers_of_transformers

PROMPTS, LIMIT = [[5, 6, 7], [9, 8], [11, 12, 13]], 12


@pytest.mark.parametrize("num_ends", [1, 2])
def test_answers_end_with_any_end_token(tmp_path, num_ends):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=24, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config).eval()
    free = [greedy(model, prompt, set()) for prompt in PROMPTS]
    # Two answers would go on behind these tokens, which the model has made itself.
    ends = [free[0][3], free[1][5]][:num_ends]
    model.generation_config.eos_token_id = ends if num_ends > 1 else ends[0]
    model.save_pretrained(tmp_path)
    expected = [greedy(model, prompt, {*ends}) for prompt in PROMPTS]
    assert answers_of_transformers(str(tmp_path), PROMPTS, LIMIT) == expected
    assert expected[0][-1] in ends and len(expected[0]) <= 4


def greedy(model, prompt, ends):
    tokens = list(prompt)
    for _ in range(LIMIT):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]
