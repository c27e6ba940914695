"""PEFT's reading of an exported adapter: `lora_peft.py BASE ADAPTER ORACLE`; prints the largest
difference of its logits from those of transformers with merged weights. Runs in a process of its
own, as oracle.py.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(base: Path, adapter: Path, oracle: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").float()
    model = PeftModel.from_pretrained(model, adapter).eval()
    expected = torch.load(base / "logits.pt")
    sequences = torch.load(oracle / "sequences.pt")
    gaps = [
        (model(input_ids=ids).logits[0] - logits).abs().max().item()
        for ids, logits in zip(sequences, expected, strict=True)
    ]
    factors = sum(name.count(".lora_") for name, _ in model.named_parameters())
    print(f"{factors} factors: {max(gaps):.1e}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
