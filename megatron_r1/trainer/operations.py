"""The operations of the trainer ranks: what the controller may call, with arguments and results.

The controller names a method of these protocols, `trainer.call(ModelOperations.update, index=0, …)`
(`controller.trainer_calls.client`), its name and arguments travel as a `wire.Call`, and each rank
runs the method of that name (`trainer.worker`). Imports neither torch nor Megatron."""

from __future__ import annotations

from typing import Any, Protocol, TypedDict

from megatron_r1.config.losses import LossSettings, TokenSettings
from megatron_r1.push.results import ConnectedSets, OpenedPush, SentWeights
from megatron_r1.trainer.sample import Sample

Metrics = dict[str, float]


class SampleScores(TypedDict):
    """scores[i][m]: those of the samples of micro-batch m of mini-batch i."""

    scores: list[list[list[float]]]


class CheckpointProgress(TypedDict):
    """State of the latest save. error: a sentence, the same on every rank. seconds: from the call
    to the renaming."""

    is_done: bool
    error: str | None
    seconds: float


class Damage(TypedDict):
    """damage: a line for each fault of a checkpoint."""

    damage: list[str]


class LoadedCheckpoint(TypedDict):
    """is_same_layout: whether the random streams were restored too."""

    is_same_layout: bool


class ModelOperations(Protocol):
    """Passes over the loaded samples: methods of `trainer.Trainer`. `Trainer.load`, which sends the
    samples, is another, and `TrainerClient.load` calls it."""

    def keep_reference(self) -> None: ...

    def compute_logprobs(
        self, *, temperature: float, reference: bool, first_minibatch: bool
    ) -> Metrics: ...

    def compare_with_engines(self) -> Metrics: ...

    def compute_values(self) -> None: ...

    def compute_token_advantages(self, *, function: str, settings: TokenSettings) -> None: ...

    def update(
        self,
        *,
        index: int,
        loss: str,
        settings: LossSettings | None,
        learning_rate: float,
        temperature: float,
    ) -> Metrics: ...

    def update_critic(self, *, index: int, learning_rate: float) -> Metrics: ...

    def sample_scores(self) -> SampleScores: ...

    def probe(self, *, samples: list[Sample]) -> Metrics: ...

    def yield_memory(self) -> None: ...


class FolderOperations(Protocol):
    """Checkpoints and exports: methods of `folders.Folders`."""

    def export(self, *, folder: str) -> None: ...

    def export_adapter(self, *, folder: str) -> None: ...

    def save_checkpoint(self, *, folder: str, state: dict[str, Any]) -> None: ...

    def checkpoint_progress(self, *, wait: bool) -> CheckpointProgress: ...

    def verify_checkpoint(self, *, folder: str) -> Damage: ...

    def load_checkpoint(self, *, folder: str, reference: bool) -> LoadedCheckpoint: ...


class PushOperations(Protocol):
    """A rank's part of a push: methods of `push.sender.WeightPush`."""

    def open_push(self) -> OpenedPush: ...

    def connect_sets(
        self,
        *,
        sets: list[tuple[str, int]],
        layout: dict[str, Any],
        transport: str,
        timeout_seconds: float,
        push_seconds: float,
        gone: list[str],
    ) -> ConnectedSets: ...

    def send_weights(self, *, push: int, sets: list[str], gone: list[str]) -> SentWeights: ...


def names(protocol: type) -> set[str]:
    """Return the names of the operations of one of these protocols."""
    return {name for name in vars(protocol) if not name.startswith("_")}
