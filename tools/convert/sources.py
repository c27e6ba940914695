"""What the paths on the command line are: a Hugging Face folder, a checkpoint, a run."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_r1.models.hf_config import read_hf_config
from megatron_r1.training.checkpoints import finding, manifest
from megatron_r1.weights.stored.hf_weights import HfWeights
from megatron_r1.weights.stored.megatron_weights import MegatronWeights

HF_FILES = "huggingface"
"""In a converted checkpoint: config.json, tokenizer and FP8 scales of the folder it came from."""

Weights = HfWeights | MegatronWeights


def is_hf(path: Path) -> bool:
    """Whether `path` holds a model in Hugging Face's format."""
    return (path / "config.json").is_file()


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or a run's newest undamaged one.

    Raises ValueError when it is neither.
    """
    if (path / "metadata.json").is_file():
        return path
    if is_hf(path):
        raise ValueError(f"{path} is a Hugging Face folder; a Megatron checkpoint is wanted here")
    if (path / "checkpoints").is_dir():
        newest, damaged = finding.newest(path / "checkpoints", "size")
        if newest is None:
            found = "; ".join(map(str, damaged)) or "it has none"
            raise ValueError(
                f"{path / 'checkpoints'} has no undamaged checkpoint ({found}); to convert one as "
                "it is, give its folder and --checksums none"
            )
        return newest
    what = "does not exist" if not path.exists() else "has no metadata.json and no checkpoints/"
    raise ValueError(f"{path} {what}: give a checkpoint's folder or a run's folder")


def check_manifest(checkpoint: Path, how: str) -> None:
    """Raise ValueError naming the files that are not what was written; needs a manifest."""
    if not (checkpoint / manifest.NAME).is_file():
        return
    if faults := manifest.damage(checkpoint, how):
        raise ValueError(
            f"{checkpoint} is damaged: {'; '.join(faults[:5])}; convert another checkpoint, or "
            "this one as it is with --checksums none"
        )


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
    """The weights at `path`, of any kind, with their files found whole."""
    if is_hf(path):
        weights = HfWeights(path, read_hf_config(path))
        weights.check(with_mtp=False)
        return weights
    checkpoint = find_checkpoint(path)
    return MegatronWeights(checkpoint, read_hf_config(find_hf_files(checkpoint, config)))


def fingerprint(path: Path) -> dict[str, list[int]]:
    """Names, sizes and times of the files of a model: whether it is still the same one."""
    wanted = {".safetensors", ".distcp", ".metadata"}
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(path.iterdir())
        if file.suffix in wanted or file.name in wanted or file.name == "config.json"
    }
