"""The rollout that a trainer rank has loaded: its packed micro-batches, and what is computed from
their tensors without the model."""

from functools import partial
from itertools import islice

from megatron_r1.base.user_code import find_function
from megatron_r1.config import Config
from megatron_r1.config.engine_mask import EngineMaskSettings
from megatron_r1.config.loss_settings import TokenAdvantageSettings
from megatron_r1.models import fp8, platform
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.routing_replay import RoutingReplay
from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.distributed import GridPosition
from megatron_r1.trainer.metrics import Maximum, Mean, logprob_diff, reduce_over_data, teacher_kl
from megatron_r1.trainer.rollout_batches import RolloutBatches
from megatron_r1.trainer.routing import RoutingScatter, RoutingShard
from megatron_r1.trainer.sample_encoding import ReplicaSamples
from megatron_r1.trainer.sequence_packing import check_token_ids, pack_batch
from megatron_r1.trainer.token_split import TokenSplit
from megatron_r1.trainer.training_sample import Sample


class LoadedRollout:
    """The samples of a replica, packed for one of its ranks.

    Attributes:
        minibatches: the micro-batches of each mini-batch; none before `load` and after `clear`.
        split: how tokens are divided between ranks.
        routing: the shard of the routing that this rank replays, if any."""

    def __init__(
        self,
        config: Config,
        grid_position: GridPosition,
        hf_config: HFConfig,
        replay: RoutingReplay,
        *,
        num_chunks: int,
        num_mtp_layers: int,
    ):
        """Make a rollout without samples.

        Args:
            config: the recipe.
            grid_position: this rank's place in the grid.
            hf_config: the model's `config.json`.
            replay: the replay in this rank's routers.
            num_chunks: the virtual pipeline stages of this rank.
            num_mtp_layers: the MTP layers that are trained."""
        self.minibatches: list[list[PackedMicrobatch]] = []
        self.split = TokenSplit(
            tensor_size=config.parallel.tensor,
            tensor_rank=grid_position.tensor_rank,
            context_size=config.parallel.context,
            context_rank=grid_position.context_rank,
            token_multiple=fp8.token_multiple(config.fp8),
        )
        self.routing = RoutingShard(replay.shape, replay.layers) if replay.shape else None
        self._config, self._grid_position, self._replay = config, grid_position, replay
        self._vocab_size = hf_config["vocab_size"]
        self._num_chunks, self._num_mtp_layers = num_chunks, num_mtp_layers

    @property
    def batches(self) -> list[PackedMicrobatch]:
        """The micro-batches of all mini-batches, one after the other."""
        return [batch for minibatch in self.minibatches for batch in minibatch]

    def load(self, minibatches: ReplicaSamples, scatter: RoutingScatter | None) -> dict[str, float]:
        """Pack this replica's samples; arguments and result are those of `Trainer.load`."""
        samples = [s for minibatch in minibatches for microbatch in minibatch for s in microbatch]
        check_token_ids(samples, self._vocab_size)
        shares_prompts = self._config.parallel.share_prompts
        pack = partial(
            pack_batch,
            split=self.split,
            device=platform.device(),
            share_prompts=shares_prompts,
            num_mtp_layers=self._num_mtp_layers,
        )
        padded_minibatches = [self._pad_to_schedule(minibatch) for minibatch in minibatches]
        microbatches = [microbatch for minibatch in padded_minibatches for microbatch in minibatch]
        routings = scatter.scatter(microbatches) if scatter else [self.routing] * len(microbatches)
        packed_batches = (
            pack(microbatch, routing=routing)
            for microbatch, routing in zip(microbatches, routings, strict=True)
        )
        self.minibatches = [
            list(islice(packed_batches, len(minibatch))) for minibatch in padded_minibatches
        ]
        batches = self.batches
        if self._replay.is_on:
            counted_routings = self._replay.exchange_counts([batch.routing for batch in batches])
            for batch, routing in zip(batches, counted_routings, strict=True):
                batch.routing = routing
        # The sum also runs over context ranks, which hold parts of the same samples.
        num_tokens = sum(len(s) for s in samples)
        num_shared = sum(batch.num_shared_tokens for batch in batches)
        num_needed = (num_tokens - num_shared) / self._config.parallel.context
        num_positions = sum(batch.input_ids.numel() for batch in batches)
        metrics = {"packing/padding": Mean(num_positions - num_needed, num_positions)}
        if shares_prompts:
            metrics["packing/shared"] = Mean(num_shared, num_tokens)
        return reduce_over_data(self._grid_position, metrics)

    def pack_probe(self, samples: list[Sample]) -> list[PackedMicrobatch]:
        """Return samples that are not loaded, as the micro-batches of one pass.

        Args:
            samples: the samples, without routing.

        Raises:
            UserError: a sample has a token outside the vocabulary."""
        check_token_ids(samples, self._vocab_size)
        padded_microbatches = self._pad_to_schedule([samples])
        return [pack_batch(s, self.split, platform.device()) for s in padded_microbatches]

    def _pad_to_schedule(self, microbatches: list[list[Sample]]) -> list[list[Sample]]:
        """Append empty micro-batches where chunks are interleaved: that schedule runs in rounds of
        as many micro-batches as there are pipeline ranks."""
        num_missing = (
            -len(microbatches) % self._config.parallel.pipeline if self._num_chunks > 1 else 0
        )
        return microbatches + [[]] * num_missing

    def first_batches(self) -> list[PackedMicrobatch]:
        """Return the first micro-batches, as few as the schedule runs."""
        return self.batches[: len(self._pad_to_schedule([[]]))]

    def is_last(self, minibatch_index: int) -> bool:
        """Return whether mini-batch `minibatch_index` is the last."""
        return minibatch_index == len(self.minibatches) - 1

    def clear(self) -> None:
        """Free the samples."""
        self.minibatches = []

    def compute_token_advantages(self, function: str, settings: TokenAdvantageSettings) -> None:
        """Call the `TokenAdvantages` at "module:function" with the whole responses, and store in
        the micro-batches what it returns; on ranks before the last stage do nothing."""
        if self._grid_position.is_last_stage:
            rollout = self._with_whole_responses()
            rollout.store_targets(find_function(function)(rollout, settings))

    def mask_advantages(self, function: str, settings: EngineMaskSettings) -> dict[str, float]:
        """Mask the tokens that the `EngineMaskFunction` at "module:function" does not find within
        bounds.

        Returns:
            The metrics over data and context parallelism; none on ranks before the last stage."""
        if not self._grid_position.is_last_stage:
            return {}
        rollout = self._with_whole_responses()
        return reduce_over_data(
            self._grid_position, rollout.mask_advantages(find_function(function)(rollout, settings))
        )

    def _with_whole_responses(self) -> RolloutBatches:
        groups = self._grid_position.groups
        return RolloutBatches(self.batches, groups.cp, groups.dp_cp)

    def measure_logprob_diff(self) -> dict[str, float]:
        """Return logprob_diff/mean and logprob_diff/max of the micro-batches' "old"
        log-probabilities, and with a teacher teacher/kl, over data and context parallelism; on
        ranks before the last stage return none."""
        if not self._grid_position.is_last_stage:
            return {}
        mean, max_diff = logprob_diff(self.batches, "old")
        metrics: dict[str, Mean | Maximum]
        metrics = {"logprob_diff/max": max_diff, "logprob_diff/mean": mean}
        if self._config.teacher.path:
            metrics["teacher/kl"] = teacher_kl(self.batches)
        return reduce_over_data(self._grid_position, metrics)
