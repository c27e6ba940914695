"""Low-rank adapters (LoRA) of a model's linear layers: y = W x + alpha / rank B A x.

    table.py      the adapters' rules, which follow from the model's table; no torch
    adapter.py    one layer's factors, their product, and the merged weight
    attach.py     adapters for this rank's model chunks; the fingerprint of what they belong to
    stored.py     export in PEFT's format

Every Hugging Face layer has factors of its own, as in PEFT, also where Megatron computes several
layers as one (query, key and value; gate and up). docs/lora.md has settings and limits."""
