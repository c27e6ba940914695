"""transformers' answers for models with adapters: `lora_oracle.py FOLDER`.

FOLDER/NAME is the base model; adapter.safetensors has random factors in PEFT's names, merged/ the
model with them added to its weights. By the chain rule, dA = scale Bᵀ dW and dB = scale dW Aᵀ, with
transformers' gradient dW of the merged weight. Runs in a process of its own, as oracle.py.
"""

import json
import sys
from pathlib import Path

import torch
from lora_shapes import ALPHA, MODELS, RANK, adapted
from oracle import checkpoint_names, losses, randomize, save
from safetensors.torch import load_file
from small_models import LENGTHS
from transformers import AutoConfig, AutoModelForCausalLM

SCALE = ALPHA / RANK


def write(folder: Path, hf_config: dict, targets: list[str] | None, sequences) -> None:
    merged_folder = folder / "merged"
    merged_folder.mkdir(parents=True)
    for place in (folder, merged_folder):
        (place / "config.json").write_text(json.dumps(hf_config))
    config = AutoConfig.from_pretrained(folder)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    randomize(base)
    base.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(hf_config))
    weights = load_file(folder / "model.safetensors")
    factors = {}
    for name in filter(lambda name: adapted(name, targets), weights):
        height, width = weights[name].shape
        module = name.removesuffix(".weight")
        a, b = torch.randn(RANK, width) * 0.1, torch.randn(height, RANK) * 0.1
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        weights[name] = weights[name] + SCALE * b @ a
    save(factors, folder / "adapter.safetensors")
    save(weights, merged_folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(merged_folder, attn_implementation="eager").float()
    model.eval()
    logits = [model(ids).logits[0] for ids in sequences]
    total = sum(losses(x[:-1], ids[0, 1:]) for x, ids in zip(logits, sequences, strict=True))
    (total / sum(ids.shape[1] - 1 for ids in sequences)).backward()
    torch.save([x.detach() for x in logits], folder / "logits.pt")
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = dict(checkpoint_names(own))
    expected = {}
    for name in filter(lambda name: adapted(name, targets), weights):
        module, d_weight = name.removesuffix(".weight"), gradients[name]
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        expected[a] = SCALE * factors[b].T @ d_weight
        expected[b] = SCALE * d_weight @ factors[a].T
    save(expected, folder / "gradients.safetensors")


def main(root: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 67, (1, n), generator=generator) for n in LENGTHS]
    torch.save(sequences, root / "sequences.pt")
    for seed, (name, (hf_config, targets)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        write(root / name, hf_config, targets, sequences)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
