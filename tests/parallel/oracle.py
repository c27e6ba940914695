"""Write models with transformers' own logits and gradients: `oracle.py FOLDER [SET]`, a set of
`random_models.models_in`.

Runs in a process of its own: transformers must not see the CUDA stand-ins that Megatron needs on a
CPU.
"""

import json
import sys
from pathlib import Path

import torch
from random_models import models_in
from safetensors.torch import load_file, save_file
from small_models import LENGTHS, MTP_SCALE
from transformers import AutoConfig, AutoModelForCausalLM


def randomize(module: torch.nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dim() == 1 and not name.endswith("inv_freq"):
            tensor.data.add_(0.2 * torch.randn_like(tensor))
        elif tensor.dim() > 1:
            tensor.data.normal_(0.0, 0.15)


def mtp_layer(model, config):
    """An MTP layer (DeepSeek-V3 report, section 2.2) put together from transformers' parts."""
    layer = type(model.model.layers[-1])(config, config.num_hidden_layers - 1)
    kind = type(model.model.norm)
    layer.enorm, layer.hnorm, norm = (
        kind(config.hidden_size, config.rms_norm_eps) for _ in range(3)
    )
    layer.eh_proj = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
    layer.shared_head = torch.nn.ModuleDict({"norm": norm})
    randomize(layer)
    return layer.eval()


def mtp_logits(model, layer, ids):
    """Logits (1, n - 1, vocab): position i has seen tokens 0 … i + 1 and predicts token i + 2."""
    hidden = model.model(ids).last_hidden_state[:, :-1]
    following = layer.enorm(model.model.embed_tokens(ids[:, 1:]))
    states = layer.eh_proj(torch.cat([following, layer.hnorm(hidden)], -1))
    n = states.shape[1]
    positions = torch.arange(n)[None]
    states = layer(
        states,
        attention_mask=torch.full((n, n), float("-inf")).triu(1)[None, None],
        position_ids=positions,
        position_embeddings=model.model.rotary_emb(states, positions),
    )
    states = states[0] if isinstance(states, tuple) else states
    return model.lm_head(layer.shared_head["norm"](states))


def checkpoint_names(tensors):
    """Tensors under the names checkpoints use: experts one by one, gate and up apart, but for
    gpt-oss, whose experts have biases."""
    if any(name.endswith("gate_up_proj_bias") for name in tensors):
        yield from tensors.items()
        return
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                prefix = f"{name.removesuffix('gate_up_proj')}{expert}."
                yield prefix + "gate_proj.weight", gate
                yield prefix + "up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                yield f"{name.removesuffix('down_proj')}{expert}.down_proj.weight", down
        else:
            yield name, tensor


def save(tensors, file):
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def losses(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def write_model(folder: Path, hf_config: dict, sequences) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomize(model)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(hf_config))

    logits = [model(ids).logits[0] for ids in sequences]
    total = sum(losses(x[:-1], ids[0, 1:]) for x, ids in zip(logits, sequences, strict=True))
    num_targets = sum(ids.shape[1] - 1 for ids in sequences)
    answers = {"logits": [x.detach() for x in logits], "loss": total.item() / num_targets}
    parts = {"": model}
    if hf_config.get("num_nextn_predict_layers"):
        layer = mtp_layer(model, config)
        parts[f"model.layers.{config.num_hidden_layers}."] = layer
        long = [ids for ids in sequences if ids.shape[1] > 2]
        mtp = sum(losses(mtp_logits(model, layer, ids)[0, :-1], ids[0, 2:]) for ids in long)
        answers["mtp_loss"] = mtp.item() / sum(ids.shape[1] - 2 for ids in long)
        total = total + MTP_SCALE * mtp
        tensors = load_file(folder / "model.safetensors")
        for prefix, part in list(parts.items())[1:]:
            tensors |= {prefix + n: t for n, t in checkpoint_names(part.state_dict())}
            tensors[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
            tensors[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"]
        save(tensors, folder / "model.safetensors")
    (total / num_targets).backward()
    grads = {}
    for prefix, part in parts.items():
        own = {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
        grads |= {prefix + name: grad for name, grad in checkpoint_names(own)}
    save(grads, folder / "gradients.safetensors")
    torch.save(answers, folder / "answers.pt")


def main(root: Path, models: dict[str, dict]) -> None:
    generator = torch.Generator().manual_seed(1)
    vocab = min(hf_config["vocab_size"] for hf_config in models.values())
    sequences = [torch.randint(0, vocab, (1, n), generator=generator) for n in LENGTHS]
    torch.save(sequences, root / "sequences.pt")
    for name, hf_config in models.items():
        torch.manual_seed(0)
        write_model(root / name, hf_config, sequences)


if __name__ == "__main__":
    main(Path(sys.argv[1]), models_in(sys.argv[2] if len(sys.argv) > 2 else "small"))
