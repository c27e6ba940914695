"""transformers' answers for a model whose experts are chosen from outside: `routing_reference.py
MODEL OUT`.

OUT/samples.json: token ids, where responses begin, and the routing of each sample, which for some
lacks the prompt and for one is missing; the log-probabilities of the responses under that routing;
agreement: the share of it that the model would have chosen itself. OUT/weights.safetensors: after
one step of Adam with epsilon 1 and learning rate 0.1 on the mean -log p, that is w - 0.1 g/(|g|+1).
"""

import json
import random
import sys
from pathlib import Path

import torch
from oracle import checkpoint_names, save
from transformers import AutoModelForCausalLM


def force(gate, layer: int, forced: dict, counts: list) -> None:
    """Let `gate` choose forced["experts"][:, layer] where forced["known"]; scores stay its own."""
    choose = gate.forward

    def forward(hidden):
        logits, _, own = choose(hidden)
        experts, known = forced["experts"][:, layer], forced["known"][:, None]
        chosen = torch.where(known, experts, own)
        same = (experts[:, :, None] == own[:, None]).any(-1)
        counts[0], counts[1] = counts[0] + (same & known).sum(), counts[1] + known.sum() * 4
        weights = logits.sigmoid().gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * gate.routed_scaling_factor
        return logits, weights, chosen

    gate.forward = forward


def draw_sample(draw: random.Random, index: int, num_layers: int) -> dict:
    prompt, response = draw.randrange(1, 6), draw.randrange(2, 30)
    rows = prompt + response - 1
    recorded = [rows, rows, response - 1, rows][index % 4] if index != 3 else 0
    return {
        "ids": [draw.randrange(67) for _ in range(prompt + response)],
        "prompt_length": prompt,
        "routing": [[draw.sample(range(8), 4) for _ in range(num_layers)] for _ in range(recorded)],
    }


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    moe = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    forced, counts = {}, [0, 0]
    for layer, gate in enumerate(moe):
        force(gate, layer, forced, counts)
    draw = random.Random(5)
    samples = [draw_sample(draw, index, len(moe)) for index in range(12)]
    total, num_targets = 0.0, 0
    for sample in samples:
        length, routing = len(sample["ids"]), sample["routing"]
        forced["known"] = torch.zeros(length, dtype=torch.bool)
        forced["experts"] = torch.zeros(length, len(moe), 4, dtype=torch.int64)
        if routing:
            forced["known"][length - 1 - len(routing) : -1] = True
            forced["experts"][forced["known"]] = torch.tensor(routing)
        ids = torch.tensor([sample["ids"]])
        table = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        logprobs = table.gather(1, ids[0, 1:, None])[sample["prompt_length"] - 1 :, 0]
        sample["logprobs"] = logprobs.tolist()
        total, num_targets = total - logprobs.sum(), num_targets + len(logprobs)
    (total / num_targets).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad / (parameter.grad.abs() + 1)
    save(dict(checkpoint_names(model.state_dict())), out / "weights.safetensors")
    answer = {"samples": samples, "agreement": int(counts[0]) / int(counts[1])}
    (out / "samples.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
