"""Write score models with transformers' own scores, losses and gradients: `score_oracle.py FOLDER`.

Of every model of SCORED a folder: config.json, weights, gradients of both losses, scores and losses
in answers.pt; next to them texts.pt, pairs of token ids whose first is the better one. The losses
are written out here from their formulae, in fp64 of transformers' fp32 scores.
"""

import json
import sys
from pathlib import Path

import torch
from oracle import checkpoint_names, randomize, save
from scored_models import LABELS, LENGTHS, SCORED
from small_models import MODELS
from transformers import AutoConfig, AutoModelForSequenceClassification


def configuration(name: str) -> dict:
    """The score model's config.json; written by hand, not by what is tested."""
    hf_config = MODELS[name]
    kind = hf_config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    return {**hf_config, "architectures": [kind], "num_labels": 1, "num_nextn_predict_layers": 0}


def pairwise(scores):
    margins = scores[0::2] - scores[1::2]
    return torch.log1p(torch.exp(-margins)).mean()


def pointwise(scores):
    labels = torch.tensor(LABELS, dtype=torch.float64)
    p = 1 / (1 + torch.exp(-scores))
    return -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()


def write_model(folder: Path, hf_config: dict, texts) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    randomize(model)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(hf_config))
    scores = torch.cat([model(ids).logits[0] for ids in texts])
    answers = {"scores": scores.detach()}
    for loss in (pairwise, pointwise):
        model.zero_grad()
        value = loss(scores.double())
        value.backward(retain_graph=True)
        answers[loss.__name__] = value.item()
        own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        (folder / loss.__name__).mkdir()
        save(dict(checkpoint_names(own)), folder / loss.__name__ / "gradients.safetensors")
    torch.save(answers, folder / "answers.pt")


def main(root: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 67, (1, n), generator=generator) for n in LENGTHS]
    torch.save(texts, root / "texts.pt")
    for name in SCORED:
        torch.manual_seed(0)
        write_model(root / name, configuration(name), texts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
