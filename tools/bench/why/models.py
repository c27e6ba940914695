"""The models and data of the bench of `why`: small enough for a step of half a second.

Answers have all forms that readers of mathematics know, some right, some wrong and some cut off."""

import json
import random
from pathlib import Path
from typing import Any

from tools.bench import host

SYSTEM = "add"
SPECIAL = ("<think>", "</think>", "<answer>", "</answer>", "<system>", "<user>", "<assistant>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DENSE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
# vLLM's MLA kernel for the CPU wants kv_lora_rank 512 and qk_rope_head_dim 64.
MOE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "q_lora_rank": 48,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_interleave": True,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}
MODELS = {
    "dense": DENSE,
    "moe": MOE,
    "mtp": MOE | {"num_nextn_predict_layers": 1},
    # Tokens next to each other choose different experts.
    "routed": MOE | {"num_hidden_layers": 3, "n_routed_experts": 8, "n_group": 1, "topk_group": 1},
    # Sizes at which FP8's blocks of 128 are within heads, fused projections and experts.
    "blocks": DENSE | {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2},
    "blocks_moe": MOE
    | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "q_lora_rank": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
}
SFT_STEPS = 300
BIAS = 0.2


def write_data(folder: Path) -> None:
    """Write examples of sft and questions of rl."""
    draw = random.Random(0)
    pairs = [(a, b) for a in range(10) for b in range(10)]
    examples = []
    for a, b in pairs:
        prompt = f"<bos><system>{SYSTEM}<user>{a}+{b}=<assistant>"
        for form in ("<think></think><answer>{}</answer>", "#### {}", "\\boxed{{{}}}"):
            stated_sum = a + b if draw.random() < 0.7 else draw.randrange(19)
            examples.append({"prompt": prompt, "response": form.format(stated_sum)})
        long_response = f"<think>I take {a} and then {b} more</think><answer>{a + b}</answer>"
        examples.append({"prompt": prompt, "response": long_response})
    draw.shuffle(examples)
    questions = [
        {"question": f"{a}+{b}=", "system": SYSTEM, "truth": str(a + b), "kind": "math"}
        for a, b in pairs
    ]
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, examples)))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json and a byte-level tokenizer with a chat template; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    hf_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    hf_tokenizer.chat_template = TEMPLATE
    hf_tokenizer.save_pretrained(folder)
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "torch_dtype": "float32"}
    (folder / "config.json").write_text(
        json.dumps(config | tokens | {"vocab_size": len(hf_tokenizer)})
    )


def base_model(folder: Path, name: str) -> Path:
    """Return the folder of a base model, which a few steps of sft make where it is not there."""
    model_folder = folder / name / "sft" / "hf"
    if (model_folder / "config.json").is_file():
        return model_folder
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    write_model(folder / name / "begin", MODELS[name])
    recipe = folder / name / "sft.yaml"
    settings: dict[str, dict[str, Any]] = {
        "run": {"folder": str(folder / name / "sft"), "steps": SFT_STEPS},
        "model": {
            "path": str(folder / name / "begin"),
            "init": "random",
            "init_std": 0.05,
            "dtype": "float32",
        },
        "data": {"template": "{question}"},
        "sft": {"data": str(folder / "sft.jsonl"), "batch_size": 32},
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0},
    }
    if name == "mtp":
        settings["model"]["mtp"] = "train"
    recipe.write_text(json.dumps(settings))
    host.run_to_end(host.megatron_r1("sft", recipe))
    if MODELS[name].get("n_group", 1) > 1:
        for path in model_folder.glob("*.safetensors"):
            _give_biases(path)
    return model_folder


def _give_biases(path: Path) -> None:
    """Give routers a correction bias that is not 0, as a run that balances its experts makes."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            half = len(tensor) // 2  # groups of experts, of which one is chosen
            tensor[:half] += BIAS
            tensor[half:] -= BIAS
    save_file(tensors, path, metadata={"format": "pt"})
