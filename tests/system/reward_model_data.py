"""A tiny language model with a tokenizer, preferences that are easy to see, and transformers'
scores; the functions that import transformers are for a process of their own."""

import json
import random
from pathlib import Path

from command_line import write_model
from tiny_models import QWEN

TEMPLATE = "[user] {question}\n[assistant] {response}<eos>"
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
KIND = ["Gladly!", "With pleasure.", "Sure, here it is.", "Of course."]
RUDE = ["Go away!", "Not my job.", "No chance, fool.", "Ask others."]


def write_language_model(folder: Path, shape: dict = QWEN) -> None:
    """A model of this config.json, by default a Qwen2, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir()
    write_model(folder)
    config = {**shape, "vocab_size": len(AutoTokenizer.from_pretrained(folder)), "pad_token_id": 2}
    config |= {"torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().save_pretrained(
        folder
    )


def write_reward_model(folder: Path) -> None:
    """A Qwen2 with one random score, large enough to tell texts apart, and a chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder.mkdir()
    write_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = {**QWEN, "architectures": ["Qwen2ForSequenceClassification"]}
    config |= {"vocab_size": len(tokenizer), "pad_token_id": 2, "torch_dtype": "float32"}
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        model.score.weight.normal_(std=0.3)
    model.float().save_pretrained(folder)


def write_preferences(folder: Path) -> None:
    """pairs.jsonl: the better summary is polite, and its thought is rude; labels.jsonl: a response
    is good where no word of it is rude, in the thought or after it."""
    draw = random.Random(0)
    pairs, labels = [], []
    for number in range(160):
        question = f"Please help with item {number}."
        kind, rude = draw.choice(KIND), draw.choice(RUDE)
        chosen, rejected = f"<think>{rude}</think>{kind}", f"<think>{kind}</think>{rude}"
        pairs.append({"question": question, "chosen": chosen, "rejected": rejected})
        good = draw.random() < 0.5
        thought = draw.choice(KIND if good else RUDE)
        response = f"<think>{thought}</think>{kind}"
        labels.append({"prompt": question, "response": response, "label": good})
    pairs.append({"question": "Cut off?", "chosen": "Yes.", "rejected": "<think>never closed"})
    for name, rows in (("pairs", pairs), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def transformers_scores(folder: Path, texts: list[str]) -> list[float]:
    """The raw scores, fp32, of texts as they stand."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    with torch.no_grad():
        for text in texts:
            tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            found.append(model(tokens).logits.item())
    return found
