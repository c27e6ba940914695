"""Check a rehearsal's export: `python -m megatron_r1.rehearse.check_export EXPORT MODEL MTP`.

Every tensor of config.json is there and finite, frozen MTP layers are as in MODEL, trained ones and
other weights have changed, and transformers loads the folder and computes finite logits with it."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.transformers_model import load_with_transformers
from megatron_r1.models.weights.formats.published_layout import published_tensors


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder of safetensors files."""
    files = (load_file(path) for path in folder.glob("*.safetensors"))
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


def main(export: str, model: str, mtp: str) -> str:
    """Return what was found; SystemExit with the first mistake.

    Args:
        export: the folder that was exported.
        model: the folder that the run began with.
        mtp: `model.mtp`."""
    hf_config = read_hf_config(export, None)
    tensors, before = _read_tensors(Path(export)), _read_tensors(Path(model))
    expected = published_tensors(hf_config)
    if missing := expected.keys() ^ tensors.keys():
        sys.exit(f"the export and its config.json differ in {sorted(missing)[:3]}")
    wrong = [
        name
        for name, (shape, _) in expected.items()
        if tuple(tensors[name].shape) != shape or not tensors[name].isfinite().all()
    ]
    if wrong:
        sys.exit(f"tensors of another shape, or not finite: {wrong[:3]}")
    first_mtp = f"model.layers.{hf_config['num_hidden_layers']}."
    own_mtp = [name for name in tensors if name.startswith(first_mtp)]
    changed = [
        name
        for name, tensor in tensors.items()
        if name in before and not tensor.equal(before[name].to(tensor.dtype))
    ]
    if not changed:
        sys.exit("training has changed no tensor")
    if mtp == "frozen" and (
        mtp_changes := set(own_mtp) & set(changed) - set(_shared_mtp_names(first_mtp))
    ):
        sys.exit(f"model.mtp: frozen, but {sorted(mtp_changes)[:3]} changed")
    if (
        mtp == "train"
        and own_mtp
        and not set(own_mtp) & set(changed) - set(_shared_mtp_names(first_mtp))
    ):
        sys.exit("model.mtp: train, but no tensor of its layers changed")
    loaded, report = load_with_transformers(
        export, hf_config, torch.float32, output_loading_info=True
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        sys.exit(f"transformers: {json.dumps({k: sorted(map(str, v)) for k, v in report.items()})}")
    with torch.no_grad():
        logits = loaded(torch.arange(3, 35)[None]).logits
    if not logits.isfinite().all():
        sys.exit("transformers computes logits that are not finite")
    return (
        f"{len(tensors)} tensors ({len(own_mtp)} of MTP layers), {len(changed)} changed by "
        "training; transformers loads them and computes finite logits"
    )


def _shared_mtp_names(first_mtp: str) -> list[str]:
    """Return the MTP layer's copies of the embedding and the head, which do change."""
    return [f"{first_mtp}embed_tokens.weight", f"{first_mtp}shared_head.head.weight"]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
