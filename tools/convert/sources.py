"""The models on both sides: their configuration, their weights, whether they are still the same."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_r1.models.hf_config import check_supported, read_hf_config
from megatron_r1.weights.rules import SCORE
from megatron_r1.weights.stored.dcp_reading import DistributedCheckpoint
from megatron_r1.weights.stored.hf_weights import HfWeights
from megatron_r1.weights.stored.megatron_weights import MegatronWeights

HF_FILES = "huggingface"
"""In a converted checkpoint: config.json, tokenizer and FP8 scales of the folder it came from."""

Weights = HfWeights | MegatronWeights


def is_hf(path: Path) -> bool:
    """Whether `path` holds a model in Hugging Face's format."""
    return (path / "config.json").is_file()


def read_supported_config(folder: Path, checkpoint: Path | None = None) -> dict:
    """The config.json in `folder`; ValueError for a model that could not be trained here.

    checkpoint: holds the model; where that is a score model, so is the configuration, also of a
    `folder` with the language model it was started from. A converted model that the trainer
    refuses, or routes otherwise than vLLM does, helps nobody.
    """
    hf = read_config(folder, checkpoint)
    try:
        check_supported(hf)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return hf


def read_config(folder: Path, checkpoint: Path | None = None) -> dict:
    """As `read_supported_config`, of any model."""
    scores = checkpoint is not None and SCORE in DistributedCheckpoint(checkpoint).shapes
    return read_hf_config(folder, "score" if scores else None)


def refuse_inside(out: Path, source: Path) -> None:
    """Raise ValueError where `out` would change the folder that is being read."""
    if source.resolve() in (out.resolve(), *out.resolve().parents) and not out.exists():
        raise ValueError(f"{out} is inside {source}, which is read: give an OUT beside it")


def find_hf_files(checkpoint: Path, given: Path | None) -> Path:
    """The folder with the config.json and tokenizer of a checkpoint's model.

    `given`; else what from-hf left inside; else the model.path of the run it is in. Raises
    ValueError when none of them has a config.json.
    """
    if given is not None:
        return given
    if is_hf(checkpoint / HF_FILES):
        return checkpoint / HF_FILES
    resolved = checkpoint.resolve()
    recipe = resolved.parents[1] / "config.yaml"
    if not recipe.is_file():
        raise ValueError(
            f"{checkpoint} does not say which model it is ({HF_FILES}/config.json and {recipe} are "
            "missing); give its Hugging Face folder with --config"
        )
    model = Path(yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["path"])
    if not is_hf(model):
        raise ValueError(
            f"{recipe} says model.path {model}, which has no config.json seen from here; give that "
            "folder with --config"
        )
    return model


def open_weights(path: Path, config: Path | None) -> Weights:
    """The weights in a Hugging Face folder or a checkpoint, with their files found whole."""
    if is_hf(path):
        weights = HfWeights(path, read_config(path))
        weights.check(with_mtp=False)
        return weights
    return MegatronWeights(path, read_config(find_hf_files(path, config), path))


def fingerprint(path: Path) -> dict[str, list[int]]:
    """Names, sizes and times of the files of a model: whether it is still the same one."""
    wanted = {".safetensors", ".distcp", ".metadata"}
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(path.iterdir())
        if file.suffix in wanted or file.name in wanted or file.name == "config.json"
    }
