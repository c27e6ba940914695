"""PEFT's reading of exported adapters: `lora_peft.py ORACLE OUT NAME…`; prints for each the largest
difference of its logits from those of transformers with merged weights. Runs in a process of its
own, as oracle.py.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@torch.no_grad()
def compare(base: Path, adapter: Path, oracle: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").float()
    model = PeftModel.from_pretrained(model, adapter).eval()
    expected = torch.load(base / "logits.pt")
    sequences = torch.load(oracle / "sequences.pt")
    gaps = [
        (model(input_ids=ids).logits[0] - logits).abs().max().item()
        for ids, logits in zip(sequences, expected, strict=True)
    ]
    factors = sum(name.count(".lora_") for name, _ in model.named_parameters())
    print(f"{base.name} {factors} {max(gaps):.1e}")


if __name__ == "__main__":
    oracle, out = map(Path, sys.argv[1:3])
    for name in sys.argv[3:]:
        compare(oracle / name, out / f"adapter-{name}", oracle)
