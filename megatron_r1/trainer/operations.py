"""The operations that the controller may call on the trainer ranks, with arguments and results:
four protocols, what each operation needs of the model, and how its result is decoded.

The controller names a method of the protocols, `trainer.call(ModelOperations.update, …)`
(`controller.trainer_calls.client`), its name and arguments travel as a `RankCall`
(`trainer.rank_messages`), and each rank runs the method of that name (`trainer.rank_server`).
Where weights or the optimizer's state are offloaded between phases, the ranks bring back what an
operation uses (`trainer.offload`), and the controller refuses one that uses weights while engines
compute in their memory. Imports neither torch nor Megatron, because the controller imports it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypedDict, TypeVar, cast, get_type_hints

import msgspec

from megatron_r1.base.errors import TrainerError
from megatron_r1.config.engine_mask import EngineMaskSettings
from megatron_r1.config.loss_settings import LossSettings, TokenAdvantageSettings
from megatron_r1.push.control_messages import ConnectedSets, OpenedPush, SentWeights
from megatron_r1.push.matching.layouts import EngineLayout
from megatron_r1.trainer.rank_messages import LOAD, STOP
from megatron_r1.trainer.training_sample import Sample

R = TypeVar("R")
SUPERVISED = "megatron_r1.trainer.losses:supervised_loss"
"""The loss of sft in `Trainer.update`."""
MetricValues = dict[str, float]


class SampleScores(TypedDict):
    """scores[i][m]: those of the samples of micro-batch m of mini-batch i."""

    scores: list[list[list[float]]]


class CheckpointProgress(TypedDict):
    """State of the latest save.

    Attributes:
        is_done: whether the save has ended, also by an error.
        error: why it failed, as a sentence, the same on every rank; None where it did not.
        seconds: the time from the call to the renaming.
    """

    is_done: bool
    error: str | None
    seconds: float


class CheckpointFaults(TypedDict):
    """What is wrong with a checkpoint.

    Attributes:
        faults: a line for each fault."""

    faults: list[str]


class LoadedCheckpoint(TypedDict):
    """What a loaded checkpoint restored.

    Attributes:
        is_same_layout: whether the random streams were restored too."""

    is_same_layout: bool


class ModelOperations(Protocol):
    """Passes over the loaded samples: methods of `trainer.Trainer`. `Trainer.load`, which sends the
    samples, is another, and `TrainerClient.load` calls it."""

    def refresh_reference(self) -> None:
        """Make the current policy the reference, in place of the one before."""

    def compute_logprobs(
        self, *, temperature: float, with_reference: bool, with_first_minibatch: bool
    ) -> MetricValues:
        """Compute the log-probabilities of all loaded tokens under the policy ("old") and, if
        `with_reference`, under the reference; they stay with the ranks.

        Args:
            temperature: the logits are divided by it.
            with_reference: whether the reference's are computed too; `refresh_reference` comes
                first.
            with_first_minibatch: whether those of mini-batch 0 under the policy are computed; if
                not, its update computes them.

        Returns:
            With routing replay routing/agreement, the share of equal choices (0 to 1), and
            logprob_diff/without_replay, of the first micro-batches the mean absolute difference
            from the engines' log-probabilities in nats; else nothing."""

    def measure_logprob_diff(self) -> MetricValues:
        """On all ranks, compare the policy's log-probabilities of the loaded response tokens with
        the engines'; `compute_logprobs` comes first.

        Returns:
            logprob_diff/mean and logprob_diff/max, absolute differences in nats, and with a teacher
            teacher/kl, the estimated KL(π_old ‖ teacher) per token; empty on ranks before the last
            stage."""

    def compute_values(self) -> None:
        """Compute the critic's value of each loaded response token; they stay with the ranks."""

    def compute_token_advantages(self, *, function: str, settings: TokenAdvantageSettings) -> None:
        """On all ranks, replace the advantages of the loaded samples by one of each token;
        `compute_logprobs` comes first.

        Args:
            function: "module:function" of a `TokenAdvantages`.
            settings: the settings that it reads."""

    def mask_advantages(self, *, function: str, settings: EngineMaskSettings) -> MetricValues:
        """On all ranks, set advantages of the loaded samples to 0; `compute_logprobs` comes first,
        of all mini-batches, and `compute_token_advantages` where the algorithm has it.

        Args:
            function: "module:function" of an `EngineMaskFunction`.
            settings: the method and its bounds.

        Returns:
            engine_mask/tokens and engine_mask/responses, the shares (0 to 1) of masked response
            tokens and of samples that have one; empty on ranks before the last stage."""

    def update(
        self,
        *,
        minibatch_index: int,
        loss: str,
        settings: LossSettings | None,
        learning_rate: float,
        temperature: float,
    ) -> MetricValues:
        """Make one optimizer step on a mini-batch.

        Args:
            minibatch_index: number of the loaded mini-batch, from 0.
            loss: "module:function" of the loss.
            settings: the settings of a policy loss; None for the others.
            learning_rate: the learning rate of this update.
            temperature: the logits are divided by it, as when they were sampled.

        Returns:
            The loss's metrics over the whole mini-batch, grad_norm (before clipping) and step_taken
            (0 or 1)."""

    def update_critic(self, *, minibatch_index: int, learning_rate: float) -> MetricValues:
        """Make one optimizer step of the critic on a mini-batch; `compute_values` and
        `compute_token_advantages`, which computes the returns, come first.

        Args:
            minibatch_index: number of the loaded mini-batch, from 0.
            learning_rate: the learning rate of this update.

        Returns:
            Metrics value/… over the whole mini-batch, as `Critic.update`."""

    def free_memory(self, *, free_parameters: bool) -> None:
        """Free what engines on the same GPUs need: gradients, the loaded samples and, with
        `parallel.offload_between_phases`, the optimizer's state, which the next operation that uses
        it takes back.

        Args:
            free_parameters: with that setting, whether the parameters are freed too.

        Raises:
            UserError: host memory or disk have no room for what is to be moved there."""


class EvaluationOperations(Protocol):
    """Passes that train nothing: methods of `evaluation_passes.EvaluationPasses`."""

    def sample_scores(self) -> SampleScores:
        """Compute a score model's scores of all loaded samples.

        Returns:
            A score per sample, by mini-batch and micro-batch; no micro-batches on ranks before the
            last stage."""

    def probe(self, *, samples: list[Sample]) -> MetricValues:
        """Compare the trainer's log-probabilities with an engine's, at temperature 1; loaded
        samples stay.

        Args:
            samples: samples with an engine's log-probabilities, the same on every rank.

        Returns:
            probe/mean and probe/max, absolute differences in nats; empty on ranks before the last
            stage.

        Raises:
            UserError: a token outside the model's vocabulary."""

    def compare_probe(self, *, samples: list[Sample]) -> MetricValues:
        """Compare the log-probabilities that `prepare_probe` kept with an engine's, without the
        weights.

        Args:
            samples: the samples of `prepare_probe`, with an engine's log-probabilities.

        Returns:
            The metrics of `probe`.

        Raises:
            UserError: a token outside the model's vocabulary."""

    def prepare_probe(self, *, samples: list[Sample]) -> None:
        """Compute, and keep for `compare_probe`, the log-probabilities of samples at temperature 1.

        Args:
            samples: samples that an engine computes later, the same on every rank.

        Raises:
            UserError: a token outside the model's vocabulary."""


class CheckpointOperations(Protocol):
    """Checkpoints and exports: methods of `checkpoint_manager.CheckpointManager`."""

    def export(self, *, folder: str) -> None:
        """Write a complete Hugging Face folder: weights (adapters merged), config and tokenizer.

        Args:
            folder: the new folder; an existing one is replaced.

        Raises:
            UserError: something cannot be written; on every rank."""

    def export_adapter(self, *, folder: str) -> None:
        """Write the adapters alone, in PEFT's format.

        Args:
            folder: the new folder; an existing one is replaced.

        Raises:
            UserError: something cannot be written; on every rank."""

    def save_checkpoint(self, *, folder: str, state: dict[str, Any]) -> None:
        """Begin to write a checkpoint, after the save before; returns when the tensors are copied,
        and `checkpoint_progress` returns the outcome.

        Args:
            folder: the checkpoint's folder.
            state: the controller's part of it, JSON.

        Raises:
            UserError: the folder cannot be made, or the save before has failed; on every rank."""

    def checkpoint_progress(self, *, wait: bool) -> CheckpointProgress:
        """Return the state of the latest save; `save_checkpoint` comes first.

        Args:
            wait: whether to return only once the save is done."""

    def verify_checkpoint(self, *, folder: str) -> CheckpointFaults:
        """Look for faults in a checkpoint's files, as thoroughly as `checkpoint.verify` says.

        Args:
            folder: the checkpoint's folder.

        Returns:
            The faults, none for a whole checkpoint."""

    def load_checkpoint(self, *, folder: str, with_reference: bool) -> LoadedCheckpoint:
        """Verify a checkpoint, unless `verify_checkpoint` has just found it whole, and continue
        from it.

        Args:
            folder: the checkpoint's folder.
            with_reference: whether it holds a reference policy, which is then loaded too.

        Returns:
            Whether the random streams were restored too.

        Raises:
            UserError: the checkpoint is damaged, or of another model."""


class PushOperations(Protocol):
    """A rank's part of a push: methods of `push.rank_push.RankPush`."""

    def open_push(self) -> OpenedPush:
        """Create this rank's sender, before the first engine is connected.

        Returns:
            The address of the store in which trainer and engine ranks meet."""

    def connect_sets(
        self,
        *,
        sets: list[tuple[str, int]],
        layout: EngineLayout,
        transport: str,
        timeout_seconds: float,
        push_timeout_seconds: float,
        closed_sets: list[str],
    ) -> ConnectedSets:
        """Agree with all ranks of these sets of engines on what this rank sends them, and connect.

        Args:
            sets: name, unique to every call, and number of engines of each set.
            layout: that of one engine.
            transport: a name in `TRANSPORTS`.
            timeout_seconds: limit for connecting.
            push_timeout_seconds: limit for a push.
            closed_sets: names of the sets to disconnect first.

        Returns:
            Why sets cannot be connected, and the links and bytes per push to the others."""

    def send_weights(
        self, *, push_number: int, sets: list[str], closed_sets: list[str]
    ) -> SentWeights:
        """Send the present weights to connected sets; a set that fails does not stop the others.

        Args:
            push_number: the number of the push.
            sets: names of the sets to send to.
            closed_sets: names of the sets to disconnect first.

        Returns:
            The failures, by the name of the set."""


def operation_names(protocol: type) -> set[str]:
    """Return the names of the operations of one of these protocols."""
    return {name for name in vars(protocol) if not name.startswith("_")}


# The two sets have names instead of methods, because they are searched for `RankCall.operation`, a
# name, and because LOAD and STOP are messages without a method in the protocols.
OPTIMIZER_OPERATIONS = {"update", "update_critic", "save_checkpoint", "load_checkpoint"}
"""Operations that use the optimizer's state."""
WEIGHTLESS_OPERATIONS = {
    LOAD,
    STOP,
    "free_memory",
    "measure_logprob_diff",
    "compute_token_advantages",
    "mask_advantages",
    "compare_probe",
    "checkpoint_progress",
    "verify_checkpoint",
}
"""Operations that use no weights: they may be called while the weights are offloaded
(`parallel.offload_between_phases`)."""


def needs_parameters(operation: str) -> bool:
    """Return whether an operation uses the model's weights; all do that are not known to go
    without."""
    return operation not in WEIGHTLESS_OPERATIONS


def needs_optimizer(operation: str) -> bool:
    """Return whether an operation uses the optimizer's state."""
    return operation in OPTIMIZER_OPERATIONS


def decode_result(operation: Callable[..., R], rank: int, result: dict[str, Any]) -> R:
    """Return the result of an operation with the class that the operation returns; one that returns
    a dict is not checked.

    Args:
        operation: a method of the protocols.
        rank: the rank that replied.
        result: `RankReply.result`.

    Raises:
        TrainerError: a field is missing or of another type."""
    kind = _returned_type(operation)
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return cast(R, result)
    try:
        return cast(R, msgspec.convert(result, kind))
    except msgspec.ValidationError as error:
        raise TrainerError(
            f"trainer rank {rank}: its reply to {operation.__name__} is no {kind.__name__}: {error}"
        ) from error


@cache
def _returned_type(operation: Callable[..., Any]) -> Any:
    return get_type_hints(operation)["return"]
