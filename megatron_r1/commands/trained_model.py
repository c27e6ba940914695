"""The model of a run, or of a folder, and the recipe that trained it."""

from pathlib import Path

from megatron_r1 import config as configuration
from megatron_r1.config import Config
from megatron_r1.errors import UserError
from megatron_r1.training.checkpoints.finding import STATE_FILE, complete_checkpoints


def find_exported(path: str, name: str) -> Path:
    """Return the Hugging Face folder that `path` is, or that a run's folder has as `hf/`. name: of
    the argument, for errors. Raises UserError where there is none, with the command for one."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    checkpoints = complete_checkpoints(folder / "checkpoints")
    if (folder / "hf" / "config.json").is_file():
        return folder / "hf"
    if (folder / STATE_FILE).is_file() or checkpoints:
        run = folder.parents[1] if (folder / STATE_FILE).is_file() else folder
        raise UserError(
            f"{name} {path} has checkpoints and no hf/ yet: python tools/convert to-hf {path} "
            f"{run}/hf exports one; a run that ends does so by itself"
        )
    if (folder / "config.yaml").is_file():
        raise UserError(
            f"{name} {path}: this run has no checkpoint yet; it writes one every checkpoint.every "
            "steps, and hf/ at its end"
        )
    what = "neither a Hugging Face folder (no config.json) nor a run's folder (no hf/)"
    raise UserError(f"{name} {path}: {what if folder.is_dir() else 'no such folder'}")


def recipe_of(model: Path) -> Config | None:
    """Return the settings of the run whose `hf/` a model folder is, or None for any other."""
    recipe = model.parent / "config.yaml"
    return configuration.load(recipe) if model.name == "hf" and recipe.is_file() else None
