"""One trainer rank: Megatron's model, optimizer and schedule behind the operations of a step.

An RL step calls load() (receive the rollout's micro-batches), compute_values() with a critic,
compute_logprobs() (old and reference policy), compute_token_advantages() for some algorithms and
mask_advantages() for some settings, update() and update_critic() once per mini-batch, and
measure_logprob_diff() (differences of log-probabilities). SFT and reward models call load() and
update(). `loaded_rollout` has the samples and what is computed from them alone, `output_heads` what
reads the model's output. `evaluation_passes` compares a few tokens with an engine, and evaluates a
reward model.

Every operation is called on all ranks at the same time. A rank handles samples and losses, not
prompts or graders."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_r1 import models
from megatron_r1.base.user_code import find_function
from megatron_r1.config import Config
from megatron_r1.config.engine_mask import EngineMaskSettings
from megatron_r1.config.loss_settings import LossSettings, TokenAdvantageSettings
from megatron_r1.models import platform, weights
from megatron_r1.models.attention_choice import AttentionChoice, check_attention, longest_sample
from megatron_r1.models.parallel_checks import check_shared_prompts
from megatron_r1.models.routing_replay import RoutingReplay
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.trainer import construction
from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.checkpoints.contents import Network, Networks
from megatron_r1.trainer.critic import Critic, needs_critic
from megatron_r1.trainer.distributed import GridPosition
from megatron_r1.trainer.loaded_rollout import LoadedRollout
from megatron_r1.trainer.metrics import logprob_diff, merge_reports, reduce_over_data
from megatron_r1.trainer.offload import make_offload
from megatron_r1.trainer.operations import SUPERVISED
from megatron_r1.trainer.output_heads import OutputHeads
from megatron_r1.trainer.passes import OutputFunction, free_gradients, optimizer_step, run_passes
from megatron_r1.trainer.reference_policy import ReferencePolicy
from megatron_r1.trainer.routing import RoutingScatter
from megatron_r1.trainer.sample_encoding import ReplicaSamples


class Trainer:
    """A rank's part of the model, its optimizer, the reference policy and the critic."""

    def __init__(self, config: Config, grid_position: GridPosition):
        """Build this rank's part of the model, its optimizer and what the recipe adds to them.

        Raises:
            UserError: the model or layout is not supported.
        """
        self.config, self.grid_position = config, grid_position
        self.process_groups = grid_position.groups
        self.hf_config = models.read_hf_config(config.model.path, config.model.head)
        self.transformer_config = models.transformer_config(self.hf_config, config)
        self.attention: AttentionChoice | None = None
        if self.transformer_config.transformer_impl == "transformer_engine":
            longest = longest_sample(config, self.hf_config)
            self.attention = check_attention(config, self.transformer_config, longest)
        # The same chunks, bare and in Megatron's DistributedDataParallel, which has the gradients.
        self.model_chunks, self.ddp_chunks, self.optimizer = construction.build_network(
            config, self.hf_config, self.transformer_config, self.process_groups
        )
        self.reference: ReferencePolicy | None = None
        has_plain_attention = (
            self.transformer_config.window_size is None
            and self.transformer_config.softmax_type == "vanilla"
        )
        check_shared_prompts(config, has_plain_attention)
        shape = routing_shape(self.hf_config) if config.rl.routing_replay else None
        self.replay = RoutingReplay(self.model_chunks, shape)
        self.rollout = LoadedRollout(
            config,
            grid_position,
            self.hf_config,
            self.replay,
            num_chunks=len(self.ddp_chunks),
            num_mtp_layers=self.num_mtp_layers,
        )
        self.heads = OutputHeads(self.model_chunks, self.hf_config, self.process_groups)
        self.critic = Critic(config, grid_position) if needs_critic(config) else None
        self.offload = make_offload(config, self._network_owners)

    @property
    def has_new_score_head(self) -> bool:
        """Whether the model is a score model with a randomly initialized head."""
        return construction.body_hf_config(self.config, self.hf_config) is not None

    @property
    def num_mtp_layers(self) -> int:
        """The MTP layers that are trained."""
        return (
            (self.transformer_config.mtp_num_layers or 0) if self.config.model.mtp == "train" else 0
        )

    @property
    def num_parameters(self) -> int:
        """The parameters of the whole model, counted in its weight table."""
        return weights.num_parameters(self.hf_config)

    def load(
        self, minibatches: ReplicaSamples, scatter: RoutingScatter | None = None
    ) -> dict[str, float]:
        """Pack this replica's samples.

        Args:
            minibatches: minibatches[i][m] are the samples of micro-batch m of mini-batch i.
            scatter: sends the routing from the replica's leader, whose samples alone have it; None:
                this rank's have it.

        Returns:
            "packing/padding", padding as a fraction of the tokens computed, and, where prompts are
            shared, "packing/shared", the fraction of tokens that are not computed again."""
        return self.rollout.load(minibatches, scatter)

    def refresh_reference(self) -> None:
        """Make the current policy the reference."""
        if self.reference is None:
            on_cpu = self.config.parallel.reference_offload == "host"
            self.reference = ReferencePolicy(self.model_chunks, on_cpu)
        else:
            self.reference.refresh()

    def compute_logprobs(
        self, temperature: float, with_reference: bool, with_first_minibatch: bool = True
    ) -> dict[str, float]:
        """Compute the log-probabilities of every loaded token under the current policy ("old") and,
        if `with_reference`, the reference.

        The reference always chooses its own experts: it is a model of its own, not the policy that
        made the samples.

        Args:
            temperature: the logits are divided by it.
            with_reference: whether the reference's are computed too.
            with_first_minibatch: whether those of mini-batch 0 under the current policy are
                computed; if not, they are left to its update, which starts at that policy and
                computes them anyway.

        Returns:
            With routing replay, routing/agreement and, for the first micro-batches, the difference
            from the engine's log-probabilities without replay."""
        batches = self.rollout.batches
        later_batches = (
            batches if with_first_minibatch else batches[len(self.rollout.minibatches[0]) :]
        )
        with self.replay.measure_agreement():
            self.fill_logprobs(later_batches, "old", temperature)
        with self.replay.pause():
            if with_reference:
                assert self.reference is not None, "refresh_reference() comes first"
                with self.reference.swapped_in():
                    self.fill_logprobs(batches, "ref", temperature)
            first = self.rollout.first_batches() if self.replay.is_on else []
            if first:
                self.fill_logprobs(first, "own_routing", temperature)
        metrics = self.replay.agreement(platform.device())
        if first and self.grid_position.is_last_stage:
            mean, _ = logprob_diff(first, "own_routing")
            metrics |= reduce_over_data(self.grid_position, {"logprob_diff/without_replay": mean})
        return metrics

    def compute_token_advantages(self, function: str, settings: TokenAdvantageSettings) -> None:
        """Replace the advantages of this rank's samples by those that the `TokenAdvantages` at
        "module:function" computes per token; compute_logprobs() comes first."""
        self.rollout.compute_token_advantages(function, settings)

    def mask_advantages(self, function: str, settings: EngineMaskSettings) -> dict[str, float]:
        """Set the advantages of this rank's tokens outside the bounds of the
        `EngineMaskFunction` at "module:function" to 0; compute_logprobs() comes first.

        Returns:
            The shares of tokens and samples that are masked, over all ranks; none on ranks before
            the last stage."""
        return self.rollout.mask_advantages(function, settings)

    def measure_logprob_diff(self) -> dict[str, float]:
        """Return the mean and the largest absolute difference, over the response tokens of all
        ranks, of the engine's log-probabilities and the trainer's "old" ones; compute_logprobs()
        comes first.

        With a teacher also teacher/kl, the sampled estimate of KL(π_old ‖ teacher) over the same
        tokens. Empty on ranks before the last stage."""
        return self.rollout.measure_logprob_diff()

    def update(
        self,
        minibatch_index: int,
        loss: str,
        settings: LossSettings | None,
        learning_rate: float,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """Make one optimizer step on a mini-batch with the loss at "module:function"; arguments and
        result are those of `operations.ModelOperations.update`."""
        batches = self.rollout.minibatches[minibatch_index]
        output_fn = partial(self.heads.loss, find_function(loss), settings, temperature)
        if self.config.model.mtp == "train":
            divisor = _mtp_divisor(loss, self.config.rollout.max_response_tokens)
            for chunk in self.model_chunks:
                chunk.mtp_only_divisor = divisor
        run = partial(self.run_batches, batches, output_fn, forward_only=False)
        reports, step_metrics = optimizer_step(
            self.ddp_chunks,
            self.optimizer,
            learning_rate,
            run,
            is_last=self.rollout.is_last(minibatch_index),
        )
        return reduce_over_data(self.grid_position, merge_reports(reports)) | step_metrics

    def compute_values(self) -> None:
        """Compute the critic's values of all loaded samples, into `PackedMicrobatch.values`."""
        assert self.critic is not None, "the recipe has no critic"
        self.critic.compute_values(self.rollout.batches)

    def update_critic(self, minibatch_index: int, learning_rate: float) -> dict[str, float]:
        """Make one optimizer step of the critic on a mini-batch; returns its metrics value/…
        compute_values() and the returns, from compute_token_advantages(), come first."""
        assert self.critic is not None, "the recipe has no critic"
        batches = self.rollout.minibatches[minibatch_index]
        return self.critic.update(batches, learning_rate, self.rollout.is_last(minibatch_index))

    def free_memory(self, free_parameters: bool = False) -> None:
        """Free what the trainer does not need while engines compute on the same GPUs.

        These are gradients, the loaded samples, memory that torch keeps for later activations, and
        with `parallel.offload_between_phases` the optimizer's state.

        Args:
            free_parameters: with that setting, free the parameters too: nothing is pushed from now
                on.

        Raises:
            UserError: host memory or disk have no room for what is to be moved there."""
        self.rollout.clear()
        for owner in self._network_owners():
            free_gradients(owner.ddp_chunks)
        if self.offload is not None:
            self.offload.free_memory(free_parameters=free_parameters)
        torch.cuda.empty_cache()

    def _network_owners(self) -> list[Any]:
        """Return what has `model_chunks`, `ddp_chunks` and an `optimizer`: this and the critic."""
        return [self] if self.critic is None else [self, self.critic]

    def networks(self) -> Networks:
        """Return what a checkpoint holds: policy, reference and critic."""
        critic = Network(self.critic.model_chunks, self.critic.optimizer) if self.critic else None
        return Networks(Network(self.model_chunks, self.optimizer), self.reference, critic)

    def fill_logprobs(self, batches: list[PackedMicrobatch], name: str, temperature: float) -> None:
        """Compute the log-probabilities of the tokens, into `PackedMicrobatch.logprobs[name]`.

        Args:
            batches: the micro-batches.
            name: the key in `PackedMicrobatch.logprobs`.
            temperature: the logits are divided by it."""
        if batches:
            output_fn = partial(self.heads.store_logprobs, name, temperature)
            self.run_batches(batches, output_fn, forward_only=True)

    def run_batches(
        self, batches: list[PackedMicrobatch], output_fn: OutputFunction, forward_only: bool
    ) -> list[Any]:
        """Run Megatron's schedule over `batches`, with routing replay and MTP labels; returns the
        reports of `output_fn` on the last stage.

        Args:
            batches: the micro-batches.
            output_fn: computes loss or report from the last stage's output.
            forward_only: whether gradients are left out."""
        train_mtp = self.config.model.mtp == "train" and not forward_only

        def make_model_inputs(model: nn.Module, batch: PackedMicrobatch) -> dict[str, Tensor]:
            self.replay.begin(model, batch.routing)
            # Without labels the MTP layers are not run, which saves their part of a forward pass.
            if not train_mtp:
                return {}
            return {"labels": batch.targets[None], "loss_mask": batch.is_response[None].float()}

        reports = run_passes(
            self.ddp_chunks,
            batches,
            output_fn,
            forward_only=forward_only,
            make_model_inputs=make_model_inputs,
            runs_mtp=train_mtp,
        )
        self.replay.end()
        return reports


def _mtp_divisor(loss: str, max_response_tokens: int) -> int | None:
    """Return `PolicyModel.mtp_only_divisor` next to a loss: D in the loss of K trained MTP layers.

        λ / (K D) Σ_k Σ_t -log p_k(token t + k + 1), λ Megatron's `mtp_loss_scaling_factor`

    None: D is 1, and the whole model is trained by it. It learns from examples to predict further
    tokens; from its own samples it must learn by their advantages only, so there the MTP layers
    alone are trained, with D = `max_response_tokens`.

    Args:
        loss: "module:function" of the loss.
        max_response_tokens: the most tokens of a response."""
    return None if loss == SUPERVISED else max_response_tokens
