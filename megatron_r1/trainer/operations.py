"""The protocol between the controller and the trainer ranks: the operations that the controller may
call, with arguments and results, and the messages that carry them (msgpack, no pickles).

The controller names a method of the protocols, `trainer.call(ModelOperations.update, index=0, …)`
(`controller.trainer_calls.client`), its name and arguments travel as a `Call`, and each rank runs
the method of that name (`trainer.worker`). Imports neither torch nor Megatron, because the
controller imports it."""

from __future__ import annotations

from typing import Any, Protocol, TypedDict

import msgspec

from megatron_r1.base.errors import Cause
from megatron_r1.config.algorithms import LossSettings, TokenSettings
from megatron_r1.push.results import ConnectedSets, OpenedPush, SentWeights
from megatron_r1.trainer.training_sample import Sample

MONITOR = b"monitor-"
SUPERVISED = "megatron_r1.trainer.losses:supervised"
"""The loss of sft in `Trainer.update`."""

LOAD, STOP = "load", "stop"
"""The calls that are no `operations`: samples follow the first, and the last ends the rank."""


def identity(rank: int) -> bytes:
    """Return the ZeroMQ identity of a rank's connection for calls and replies."""
    return str(rank).encode()


def monitor_identity(rank: int) -> bytes:
    """Return the ZeroMQ identity of the connection of a rank's `RankMonitor`."""
    return MONITOR + str(rank).encode()


class Call(msgspec.Struct, frozen=True):
    """Controller → rank: run `operation`, a method's name in `trainer.operations`, with
    `arguments`. The leader of a replica gets the parts of an encoded `ReplicaSamples` after it, and
    forwards them to the others."""

    operation: str
    arguments: dict[str, Any] = {}


class Reply(msgspec.Struct, frozen=True):
    """Rank → controller: the operation's result or error.

    Attributes:
        rank: the rank that replies.
        result: the operation's result; None after an error.
        error: the message of a `UserError`, a traceback otherwise; None without an error.
        is_mistake: whether the error is a `UserError`.
        key: the key of a `UserError`.
        cause: the cause of a `UserError`."""

    rank: int
    result: dict[str, Any] | None = None
    error: str | None = None
    is_mistake: bool = False
    key: str = ""
    cause: Cause = Cause.FAILED


class RankDescription(TypedDict):
    """The result of a rank's start (`worker.Operations.describe`): what the controller distributes
    batches by, the rank's place on the grid, and facts of its model."""

    rank: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    expert_rank: int
    data_rank: int
    data_size: int
    last_stage: bool
    leads_replica: bool
    num_parameters: int
    score_is_new: bool
    implementations: dict[str, str]
    process: int


class ThreadAt(msgspec.Struct, frozen=True):
    """The stack of a thread.

    Attributes:
        frames: "file:line in function: source", the innermost last.
        collective: the one it waits in, with its ranks and its caller; None: it is in none."""

    name: str
    frames: list[str]
    collective: str | None = None


class RankStatus(msgspec.Struct, frozen=True):
    """Rank → controller, from the monitor thread: the current operation and for how long it runs.

    Attributes:
        request: number of the request that this answers.
        threads: the main one first."""

    request: int
    operation: str
    seconds: float
    threads: list[ThreadAt]


MetricValues = dict[str, float]


class SampleScores(TypedDict):
    """scores[i][m]: those of the samples of micro-batch m of mini-batch i."""

    scores: list[list[list[float]]]


class CheckpointProgress(TypedDict):
    """State of the latest save.

    Attributes:
        error: a sentence, the same on every rank.
        seconds: the time from the call to the renaming."""

    is_done: bool
    error: str | None
    seconds: float


class Damage(TypedDict):
    """The damage of a checkpoint.

    Attributes:
        damage: a line for each fault of the checkpoint."""

    damage: list[str]


class LoadedCheckpoint(TypedDict):
    """What a loaded checkpoint restored.

    Attributes:
        is_same_layout: whether the random streams were restored too."""

    is_same_layout: bool


class ModelOperations(Protocol):
    """Passes over the loaded samples: methods of `trainer.Trainer`. `Trainer.load`, which sends the
    samples, is another, and `TrainerClient.load` calls it."""

    def refresh_reference(self) -> None:
        """Make the current policy the reference."""

    def compute_logprobs(
        self, *, temperature: float, reference: bool, first_minibatch: bool
    ) -> MetricValues:
        """Score all loaded tokens under the policy and, if `reference`, under the reference."""

    def measure_logprob_diff(self) -> MetricValues:
        """Return the differences from the engines' log-probabilities."""

    def compute_values(self) -> None:
        """Compute the critic's values of all loaded samples."""

    def compute_token_advantages(self, *, function: str, settings: TokenSettings) -> None:
        """Replace advantages by those that a `module:function` gives every token."""

    def update(
        self,
        *,
        index: int,
        loss: str,
        settings: LossSettings | None,
        learning_rate: float,
        temperature: float,
    ) -> MetricValues:
        """Make one optimizer step on mini-batch `index`."""

    def update_critic(self, *, index: int, learning_rate: float) -> MetricValues:
        """Make one optimizer step of the critic on mini-batch `index`."""

    def sample_scores(self) -> SampleScores:
        """Return a score model's scores of all loaded samples."""

    def probe(self, *, samples: list[Sample]) -> MetricValues:
        """Score samples and return how far an engine's log-probabilities are from these."""

    def free_memory(self, *, parameters: bool) -> None:
        """Free what engines on the same GPUs need; the next operation takes it back."""

    def compare_probe(self, *, samples: list[Sample]) -> MetricValues:
        """Return the differences that `probe` does, from what `prepare_probe` kept."""

    def prepare_probe(self, *, samples: list[Sample]) -> None:
        """Score samples that an engine scores later, and keep the result."""


class FolderOperations(Protocol):
    """Checkpoints and exports: methods of `folders.Folders`."""

    def export(self, *, folder: str) -> None:
        """Write a whole Hugging Face folder."""

    def export_adapter(self, *, folder: str) -> None:
        """Write the adapters alone, in PEFT's format."""

    def save_checkpoint(self, *, folder: str, state: dict[str, Any]) -> None:
        """Begin to write a checkpoint; returns when tensors are copied."""

    def checkpoint_progress(self, *, wait: bool) -> CheckpointProgress:
        """Return the state of the latest save; `wait`: once it is done."""

    def verify_checkpoint(self, *, folder: str) -> Damage:
        """Look for faults in a checkpoint's files."""

    def load_checkpoint(self, *, folder: str, reference: bool) -> LoadedCheckpoint:
        """Verify a checkpoint and continue from it."""


class PushOperations(Protocol):
    """A rank's part of a push: methods of `push.sender.WeightPush`."""

    def open_push(self) -> OpenedPush:
        """Create the sender, before the first engine is connected."""

    def connect_sets(
        self,
        *,
        sets: list[tuple[str, int]],
        layout: dict[str, Any],
        transport: str,
        timeout_seconds: float,
        push_seconds: float,
        gone: list[str],
    ) -> ConnectedSets:
        """Connect this rank with sets of engines."""

    def send_weights(self, *, push: int, sets: list[str], gone: list[str]) -> SentWeights:
        """Push the weights to connected sets."""


WITH_OPTIMIZER = {"update", "update_critic", "save_checkpoint", "load_checkpoint"}
"""Operations that use the optimizer's state."""
WITHOUT_PARAMETERS = {
    *(LOAD, STOP, "free_memory", "measure_logprob_diff", "compute_token_advantages"),
    *("compare_probe", "checkpoint_progress", "verify_checkpoint"),
}
"""Operations that use no weights: they may be called while the weights are offloaded
(`parallel.offload_between_phases`)."""


def needs_parameters(operation: str) -> bool:
    """Return whether an operation uses the model's weights; all do that are not known to go
    without."""
    return operation not in WITHOUT_PARAMETERS


def needs_optimizer(operation: str) -> bool:
    """Return whether an operation uses the optimizer's state."""
    return operation in WITH_OPTIMIZER


def operation_names(protocol: type) -> set[str]:
    """Return the names of the operations of one of these protocols."""
    return {name for name in vars(protocol) if not name.startswith("_")}
