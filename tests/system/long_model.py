"""A tiny DeepSeek-V3 with the real vocabulary and latents; its prompts decide how long it answers.

Weights are random but for one coordinate of embedding and head, a mark: words of even number have
it positive in both, words of odd number and the end token negative. After an even word nearly all
probability is spread over even words and the end token has less than 1e-12; after an odd word it is
spread over odd words and the end token has about 1/40. So a prompt that ends in an even word is
answered up to the limit, and one that ends in an odd word in some tens of tokens."""

import json
from pathlib import Path

from tiny_models import DEEPSEEK, write_model

VOCABULARY = 129_280
POSITIONS = 67_584
END = 1
MODEL = DEEPSEEK | {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,  # with experts
    "first_k_dense_replace": 0,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 512,  # with the 64 below: what vLLM's kernel for latents takes
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "rope_parameters": DEEPSEEK["rope_parameters"]
    | {"original_max_position_embeddings": 4096, "factor": POSITIONS / 4096},
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}
MARK, EVEN, ODD_END = 8.0, 2.1, 3.43
"""Of the embedding; of the head for words and, in size, for the end token. The mark is most of the
normalized hidden state, about 32 ** 0.5, so the logits are ±12 and ±19.5."""


def write(folder: Path) -> None:
    """Write config, weights and a tokenizer whose word "w5" is token 5."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_model(folder, MODEL, seed=0)
    weights = load_file(folder / "model.safetensors")
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[:, 0] = MARK
    embedding[1::2, 0] = -MARK
    head[:, 0] = EVEN
    head[1::2, 0] = -EVEN
    head[END, 0] = -ODD_END
    weights["model.norm.weight"][0] = 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = {f"w{number}": number for number in range(VOCABULARY)}
    special = {"<bos>": 0, "<eos>": END, "<pad>": 2}
    for word, number in special.items():
        del words[f"w{number}"]
        words[word] = number
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    whole.save_pretrained(folder)


RECIPE = """
run: {{folder: {folder}/rl, steps: 2}}
model: {{path: {folder}/model, dtype: float32}}
data: {{path: {folder}/questions.jsonl, num_heldout: 0, template: "{{question}}"}}
rollout: {{max_response_tokens: 65536, dtype: float32, max_num_seqs: 8}}
parallel: {{processes: 2, context: 2, tokens_per_microbatch: 67584, threads: 1}}
rl:
  algorithm: reinforce_pp  # of one response to a question, as one of 65,536 tokens is enough
  group_size: 1
  prompts_per_rollout: 8
  minibatches: 1
  kl_beta: 0.0
  schedule: [{{from_step: 2, rollout.max_response_tokens: 64}}]
optimizer: {{learning_rate: 1.0e-4}}
rewards:
  weights: {{accuracy: 1.0, format: 0.1, conciseness: 0.5}}
  options: {{conciseness: {{free_length: 0, max_length: 65536}}}}
"""


def write_recipe(folder: Path) -> Path:
    """Write model, questions and recipe: one question ends in an even word, seven in odd ones."""
    write(folder / "model")
    endings = [100, *range(101, 115, 2)]
    questions = [{"question": f"w{n + 20} w{n}", "truth": 1} for n in endings]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    recipe = folder / "rl.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    return recipe


if __name__ == "__main__":
    import sys

    Path(sys.argv[1]).mkdir(parents=True)
    print(write_recipe(Path(sys.argv[1])))
