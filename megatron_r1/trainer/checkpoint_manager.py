"""The operations of a trainer rank that write and read folders: checkpoints and exports."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models import weights
from megatron_r1.models.weights.adapters import save_adapter
from megatron_r1.trainer.checkpoints import contents
from megatron_r1.trainer.checkpoints.writer import CheckpointWriter
from megatron_r1.trainer.operations import CheckpointFaults, CheckpointProgress, LoadedCheckpoint
from megatron_r1.trainer.trainer import Trainer


class CheckpointManager:
    """Checkpoints and Hugging Face folders of one rank's `Trainer`."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        is_asynchronous = trainer.config.checkpoint.asynchronous
        straggler_timeout = timedelta(seconds=trainer.config.parallel.timeout_seconds)
        self._writer = CheckpointWriter(
            trainer.process_groups.dp_cp, is_asynchronous, straggler_timeout
        )
        self._verified: str | None = None

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write a complete Hugging Face folder: weights (adapters merged), config and tokenizer."""
        trainer = self._trainer
        weights.save_hf(
            trainer.model_chunks,
            trainer.hf_config,
            Path(trainer.config.model.path),
            Path(folder),
            dtype=getattr(torch, dtype or trainer.config.model.dtype),
        )

    def export_adapter(self, folder: str) -> None:
        """Write the adapters alone, in PEFT's format."""
        trainer, model = self._trainer, self._trainer.config.model
        assert model.lora is not None, "the recipe has no adapters"
        dtype = getattr(torch, model.dtype)
        save_adapter(
            trainer.model_chunks, trainer.hf_config, model.lora, model.path, Path(folder), dtype
        )

    def save_checkpoint(self, folder: str, state: dict[str, Any]) -> None:
        """Start to write a checkpoint, with the controller's `state` in it.

        Returns when the tensors are copied; `checkpoint_progress` returns the outcome."""
        self._writer.save(
            Path(folder), partial(contents.sharded_tree, self._trainer.networks()), state
        )
        torch.cuda.empty_cache()  # of engines on the same GPU

    def checkpoint_progress(self, wait: bool = False) -> CheckpointProgress:
        """Return is_done, error (a sentence or None) and seconds of the latest `save_checkpoint`.

        Args:
            wait: whether to wait until the save is done."""
        progress = self._writer.progress(wait)
        assert progress is not None, "save_checkpoint() comes first"
        return progress

    def verify_checkpoint(self, folder: str) -> CheckpointFaults:
        """Return {"faults": lines}, those of `folder` that `checkpoint.verify` looks for."""
        faults = contents.find_faults_on_all_ranks(
            Path(folder), self._trainer.config.checkpoint.verify
        )
        self._verified = None if faults else folder
        return {"faults": faults}

    def load_checkpoint(self, folder: str, with_reference: bool) -> LoadedCheckpoint:
        """Verify `folder` and continue from it.

        Args:
            folder: the checkpoint's folder.
            with_reference: whether it holds a reference policy.

        Returns:
            is_same_layout, whether the random streams were restored too.

        Raises:
            UserError: the checkpoint is damaged.
        """
        if folder != self._verified:
            faults = self.verify_checkpoint(folder)["faults"]
            if faults:
                raise UserError(
                    f"checkpoint {folder} is damaged: {'; '.join(faults[:5])}; run the same "
                    "command again: it continues from the newest checkpoint that is whole",
                    key="checkpoint",
                    cause=Cause.MALFORMED,
                )
        if with_reference:
            self._trainer.refresh_reference()
        return {"is_same_layout": contents.load_networks(Path(folder), self._trainer.networks())}
