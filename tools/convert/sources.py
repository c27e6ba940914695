"""The source and target models: configuration, weights, and a fingerprint of their files."""

from pathlib import Path

import yaml

from megatron_r1.errors import UserError
from megatron_r1.models.hf_config import read_hf_config
from megatron_r1.models.supported import check_supported
from megatron_r1.weights.rules import SCORE
from megatron_r1.weights.stored.dcp_reading import DistributedCheckpoint
from megatron_r1.weights.stored.hf_weights import HfWeights
from megatron_r1.weights.stored.megatron_weights import MegatronWeights

HF_FILES = "huggingface"
"""Subfolder of a converted checkpoint with config.json, tokenizer and FP8 scales of its source."""

Weights = HfWeights | MegatronWeights


def is_hf(path: Path) -> bool:
    """Return whether `path` holds a model in Hugging Face's format."""
    return (path / "config.json").is_file()


def read_supported_config(folder: Path, checkpoint: Path | None = None) -> dict:
    """Return the config.json in `folder`; raise UserError if the trainer does not support it.

    checkpoint: the model's. If that is a score model, so is the configuration, even if `folder` has
    the language model it was started from."""
    hf = read_config(folder, checkpoint)
    try:
        check_supported(hf)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    return hf


def read_config(folder: Path, checkpoint: Path | None = None) -> dict:
    """Return the config.json as `read_supported_config` does, of any model."""
    scores = checkpoint is not None and SCORE in DistributedCheckpoint(checkpoint).shapes
    return read_hf_config(folder, "score" if scores else None)


def refuse_inside(out: Path, source: Path) -> None:
    """Raise UserError if `out` is inside the folder that is read."""
    if source.resolve() in (out.resolve(), *out.resolve().parents) and not out.exists():
        raise UserError(f"{out} is inside {source}, which is read: give an OUT beside it")


def find_hf_files(checkpoint: Path, given: Path | None) -> Path:
    """Return the folder with the config.json and tokenizer of a checkpoint's model.

    It is `given`, or what from-hf left in the checkpoint, or model.path of the checkpoint's run.
    Raises UserError if none of them has a config.json."""
    if given is not None:
        return given
    if is_hf(checkpoint / HF_FILES):
        return checkpoint / HF_FILES
    resolved = checkpoint.resolve()
    recipe = resolved.parents[1] / "config.yaml"
    if not recipe.is_file():
        raise UserError(
            f"{checkpoint} does not say which model it is ({HF_FILES}/config.json and {recipe} are "
            "missing); give its Hugging Face folder with --config"
        )
    model = Path(yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["path"])
    if not is_hf(model):
        raise UserError(
            f"{recipe} says model.path {model}, which has no config.json seen from here; give that "
            "folder with --config"
        )
    return model


def open_weights(path: Path, config: Path | None) -> Weights:
    """Open the weights of a Hugging Face folder or a checkpoint; raise UserError if incomplete."""
    if is_hf(path):
        weights = HfWeights(path, read_config(path))
        weights.check(with_mtp=False)
        return weights
    return MegatronWeights(path, read_config(find_hf_files(path, config), path))


def fingerprint(path: Path) -> dict[str, list[int]]:
    """Return names, sizes and times of a model's files, to detect changes."""
    kinds = {".safetensors", ".distcp", ".metadata"}
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(path.iterdir())
        if file.suffix in kinds or file.name in kinds or file.name == "config.json"
    }
