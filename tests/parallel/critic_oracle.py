"""A critic's updates as a naive fp64 loop over transformers: `critic_oracle.py SCORED NAME…`.

One sample at a time, every token's loss from its formula, torch's Adam. Writes
SCORED/NAME/critic.pt: values before and after, metrics and the weights after each update.
"""

import sys
from pathlib import Path

import torch
from critic_samples import BETAS, CLIP, EPSILON, NORM, RATE, STEPS, rollout
from oracle import checkpoint_names
from transformers import AutoModelForSequenceClassification


def values_of(model, prompt, response):
    """The score after the token that each response token follows."""
    states = model.model(torch.tensor([prompt + response])).last_hidden_state
    return model.score(states)[0, len(prompt) - 1 : -1, 0]


def main(root: Path, name: str) -> None:
    folder = root / name
    # The default products of experts know no fp64.
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    model = model.double().eval()
    samples = rollout()
    with torch.no_grad():
        old = [values_of(model, prompt, response) for prompt, response, _ in samples]
    count = sum(len(response) for _, response, _ in samples)
    parameters = list(model.parameters())
    adam = torch.optim.AdamW(parameters, RATE, BETAS, EPSILON, weight_decay=0.0)
    metrics = []
    for _ in range(STEPS):
        model.zero_grad()
        total, clipped = 0.0, 0
        for (prompt, response, target), before in zip(samples, old, strict=True):
            now = values_of(model, prompt, response)
            for v, v_old in zip(now, before, strict=True):
                plain = (v - target) ** 2
                held = (v_old + torch.clamp(v - v_old, -CLIP, CLIP) - target) ** 2
                total = total + 0.5 * max(plain, held) / count
                clipped += bool(held > plain)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, NORM)
        adam.step()
        metrics.append(
            {
                "value/loss": total.item(),
                "value/clip_fraction": clipped / count,
                "value/grad_norm": norm.item(),
            }
        )
    returns = torch.cat(
        [torch.full_like(v, target) for v, (_, _, target) in zip(old, samples, strict=True)]
    )
    errors = returns - torch.cat(old)
    explained = 1 - errors.var(correction=0) / returns.var(correction=0)
    for line in metrics:
        line["value/explained_variance"] = explained.item()
    with torch.no_grad():
        new = [values_of(model, prompt, response) for prompt, response, _ in samples]
    weights = dict(checkpoint_names(model.state_dict()))
    torch.save(
        {"old": old, "new": new, "metrics": metrics, "weights": weights}, folder / "critic.pt"
    )


if __name__ == "__main__":
    for each in sys.argv[2:]:
        main(Path(sys.argv[1]), each)
