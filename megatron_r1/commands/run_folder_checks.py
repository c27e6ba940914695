"""Refuses to train in a folder that belongs to another verb."""

from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config

NOT_TRAINING = {
    "sample.json": "a sampling",
    "curation.json": "a sampling",  # up to 0.2
    "identity.json": "an evaluation or a sampling",
}
"""Files of folders that a training run cannot continue."""


def check_folder(config: Config) -> None:
    """Refuse to train in a folder that belongs to a sampling or an evaluation.

    Args:
        config: the recipe, whose `run.folder` is checked."""
    for file, owner in NOT_TRAINING.items():
        if Path(config.run.folder, file).exists():
            raise UserError(
                f"run.folder {config.run.folder} is that of {owner}: give the training a folder "
                "of its own",
                key="run.folder",
                cause=Cause.EXISTS,
            )
