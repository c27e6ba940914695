"""The controller's client of the trainer ranks: sends each its samples and calls operations."""

import asyncio
import contextlib
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar, cast

import msgspec
import zmq

from megatron_r1.base.errors import TrainerError, TrainerLost, UserError
from megatron_r1.base.processes import timeline
from megatron_r1.base.processes.authentication import RANKS_TOKEN_VARIABLE
from megatron_r1.base.processes.open_files import allow_open_files
from megatron_r1.config import Config
from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.controller.trainer_calls.packing import Packing, pack_by_prompt, pack_samples
from megatron_r1.controller.trainer_calls.rank_processes import RankProcesses
from megatron_r1.controller.trainer_calls.rank_socket import RankSocket
from megatron_r1.models import read_hf_config
from megatron_r1.models.compute_cost import sample_cost
from megatron_r1.trainer.operations import (
    EvaluationOperations,
    ModelOperations,
    decode_result,
    needs_parameters,
)
from megatron_r1.trainer.rank_messages import LOAD, STOP, RankCall, RankDescription, RankReply
from megatron_r1.trainer.sample_encoding import ReplicaSamples, encode_samples
from megatron_r1.trainer.training_sample import Buffer, Sample

P = ParamSpec("P")
R = TypeVar("R")
POLL_SECONDS = 0.5
CONNECTIONS_PER_RANK, OTHER_OPEN_FILES = 2, 600
"""Open files: connections of each rank, for calls and for its monitor; and those of the run, mostly
requests to engines, one a group."""
CALLS_PER_YIELD = 128
"""Calls between which the event loop may do other things: one to every rank takes milliseconds."""


def _require_finite(metrics: dict[str, float], names: tuple[str, ...], rate: str) -> None:
    # A loss of the user's own may have other metrics than "loss"; its gradient has a norm.
    for name in filter(metrics.__contains__, names):
        if not math.isfinite(metrics[name]):
            raise TrainerError(
                f"{name} is {metrics[name]}: the run stops before it is saved in a checkpoint. "
                f"The newest checkpoint is good; lower {rate} in a new run"
            )


@dataclass
class PendingCall:
    """A call in progress.

    Attributes:
        operation: the name of the operation that the ranks were asked for.
        since: time.monotonic() when the call was sent.
        missing: ranks that have not replied.
    """

    operation: str
    since: float
    missing: set[int]


class TrainerClient:
    """All trainer ranks as one: an operation runs on every rank, and its result is the result of
    the last pipeline stage."""

    def __init__(
        self,
        config: Config,
        log_folder: Path,
        bind: str = "tcp://127.0.0.1:*",
        world_size: int | None = None,
    ):
        """Prepare the ranks of a trainer.

        Args:
            config: the run's settings.
            log_folder: the folder of the ranks' logs.
            bind: the ZeroMQ address that ranks connect to.
            world_size: the number of ranks, where torchrun starts them."""
        self.world_size = world_size or config.parallel.processes
        self.config = config
        self._bind = bind
        files = OTHER_OPEN_FILES + CONNECTIONS_PER_RANK * self.world_size
        allow_open_files(files, f"connections of {self.world_size:,} trainer ranks")
        self._token = os.environ.get(RANKS_TOKEN_VARIABLE) or secrets.token_hex(32)
        self.socket = RankSocket(bind, self._token)
        self.processes = RankProcesses(Path(log_folder))
        self.ranks: list[RankDescription] = []
        """The description of each rank, once it has built its model."""
        self._call_lock = asyncio.Lock()
        self.is_usable = True
        """False during a call and after one that failed: the ranks' state is then unknown."""
        self.pending_call: PendingCall | None = None
        self.num_replies = 0
        self.num_restarts = 0
        self._is_offloaded: Callable[[], bool] = lambda: False
        self._cost = sample_cost(read_hf_config(config.model.path, config.model.head))
        self._packings: list[Packing] = []

    def protect_offloaded_weights(self, is_offloaded: Callable[[], bool]) -> None:
        """Assert before each operation that needs the ranks' weights that they are there.

        Args:
            is_offloaded: whether the weights are offloaded, and engines may have their memory."""
        self._is_offloaded = is_offloaded

    @property
    def can_restart(self) -> bool:
        """Whether this process started the ranks; it cannot restart ranks that torchrun started."""
        return self.processes.started_here

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return self.ranks[0]["num_parameters"]

    @property
    def implementations(self) -> dict[str, str]:
        """The implementation of each part of a step, over all ranks, because the stages of a
        pipeline have different parts."""
        kinds_by_part: dict[str, dict[str, None]] = {}
        for rank in self.ranks:
            for part, kind in rank["implementations"].items():
                kinds_by_part.setdefault(part, {})[kind] = None
        return {part: "; ".join(kinds) for part, kinds in kinds_by_part.items()}

    @property
    def data_parallel_size(self) -> int:
        """Data-parallel size: the model replicas among which the samples are divided."""
        return self.ranks[0]["data_parallel_size"]

    def launch(self) -> None:
        """Start `parallel.processes` ranks on this machine."""
        self.processes.start(self.config, self.socket.address, self._token)

    async def connect(self) -> None:
        """Wait until every rank has built its model.

        Raises:
            UserError: the first rank that fails does so by a user's mistake.
            TrainerError: it fails for another reason.
        """
        descriptions = await self._gather_replies("start", self.world_size)
        self.ranks = cast(list[RankDescription], descriptions)

    async def load(
        self, minibatches: list[list[Sample]], samples_per_unit: int = 1
    ) -> dict[str, float]:
        """Send each model replica its share of every mini-batch, packed into micro-batches.

        Args:
            minibatches: the samples of each update.
            samples_per_unit: number of consecutive samples that stay in one micro-batch, in their
                order.

        Returns:
            `packing/waste` and `packing/fill` (`packing.Packing`), `packing/microbatches` per rank
            and update, and `packing/padding`, the share of padding tokens."""
        packings, shares = await asyncio.to_thread(
            self._packed_shares, minibatches, samples_per_unit
        )
        load_result = (await self._call_ranks(LOAD, shares=shares))[self._last_stage_rank]
        self._packings = packings
        return {
            "packing/waste": fmean(p.waste_fraction for p in packings),
            "packing/fill": fmean(p.fill_fraction for p in packings),
            "packing/microbatches": fmean(len(p.shares[0]) for p in packings),
            **load_result,
        }

    def _packed_shares(
        self, minibatches: list[list[Sample]], samples_per_unit: int
    ) -> tuple[list[Packing], list[list[Buffer]]]:
        """Return the packing of every mini-batch, and each replica's encoded share of all."""
        with timeline.span("controller/pack"):
            limit = self.config.parallel.microbatch_tokens
            shares: list[ReplicaSamples] = [[] for _ in range(self.data_parallel_size)]
            packings = [
                pack_by_prompt(samples, self.data_parallel_size, limit, self._cost)
                if self.config.parallel.share_prompts and samples_per_unit == 1
                else pack_samples(
                    [len(s) for s in samples],
                    self.data_parallel_size,
                    limit,
                    cost=self._cost,
                    samples_per_unit=samples_per_unit,
                )
                for samples in minibatches
            ]
            for samples, packing in zip(minibatches, packings, strict=True):
                for replica, share in enumerate(packing.shares):
                    shares[replica].append([[samples[i] for i in m] for m in share])
            return packings, [encode_samples(share) for share in shares]

    async def update(
        self,
        minibatch_index: int,
        loss: str,
        settings: LossSettings | None,
        learning_rate: float,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """Make one optimizer step on a mini-batch; arguments and result are those of
        `ModelOperations.update`.

        Raises:
            TrainerError: loss or gradient is not finite: the weights are then lost, and the newest
                checkpoint is from before this update."""
        metrics = await self.call(
            ModelOperations.update,
            minibatch_index=minibatch_index,
            loss=loss,
            settings=settings,
            learning_rate=learning_rate,
            temperature=temperature,
        )
        _require_finite(metrics, ("loss", "grad_norm"), "optimizer.learning_rate")
        return metrics

    async def update_critic(self, minibatch_index: int, learning_rate: float) -> dict[str, float]:
        """Make one optimizer step of the critic on a mini-batch; return its metrics. Errors
        as `update`. The operations `compute_values` and `compute_token_advantages` come first."""
        metrics = await self.call(
            ModelOperations.update_critic,
            minibatch_index=minibatch_index,
            learning_rate=learning_rate,
        )
        _require_finite(metrics, ("value/loss", "value/grad_norm"), "critic.learning_rate")
        return metrics

    async def sample_scores(self) -> list[list[float]]:
        """Return a score model's scores of the loaded samples, in the order given to `load`:
        result[mini-batch][sample]."""
        replies = await self.call_all(EvaluationOperations.sample_scores)
        result = [[math.nan] * sum(map(len, chain(*p.shares))) for p in self._packings]
        for rank, reply in zip(self.ranks, replies, strict=True):
            for scores, packing, by_microbatch in zip(
                result, self._packings, reply["scores"], strict=True
            ):
                members = packing.shares[rank["data_rank"]]
                for i, score in zip(chain(*members), chain(*by_microbatch), strict=False):
                    scores[i] = score
        return result

    async def call(
        self, operation: Callable[Concatenate[Any, P], R], *_: P.args, **arguments: P.kwargs
    ) -> R:
        """Run `operation`, a method of a protocol in `trainer.operations`, on every rank; return
        the result of the last pipeline stage.

        Args:
            operation: the method of the ranks' operations.
            **arguments: the operation's arguments."""
        results = await self._call_ranks(operation.__name__, arguments)
        rank = self._last_stage_rank
        return decode_result(operation, rank, results[rank])

    async def call_all(
        self,
        operation: Callable[Concatenate[Any, P], R],
        on_start: Callable[[], object] | None = None,
        *_: P.args,
        **arguments: P.kwargs,
    ) -> list[R]:
        """Run `operation` on every rank; return all results, by rank.

        Args:
            operation: the method of the ranks' operations.
            on_start: called when earlier calls are done and this one starts.
            **arguments: the operation's arguments."""
        results = await self._call_ranks(operation.__name__, arguments, on_start=on_start)
        return [decode_result(operation, rank, result) for rank, result in enumerate(results)]

    async def probe(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int], Sequence[float]]]
    ) -> float:
        """Return the mean absolute difference between the engine's and the trainer's
        log-probabilities of the sampled tokens.

        Args:
            sequences: (prompt_ids, response_ids, logprobs) of each."""
        samples = [Sample.pack(*sequence) for sequence in sequences]
        return (await self.call(EvaluationOperations.probe, samples=samples))["probe/mean"]

    async def prepare_probe(self, token_sequences: Sequence[Sequence[int]]) -> None:
        """Have the trainer compute the log-probabilities of every token but the first of each
        sequence, for `compare_probe`."""
        samples = [Sample.pack(ids[:1], ids[1:]) for ids in token_sequences]
        await self.call(EvaluationOperations.prepare_probe, samples=samples)

    async def compare_probe(
        self, token_sequences: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]
    ) -> float:
        """Return the mean absolute difference between an engine's log-probabilities and those of
        `prepare_probe`, which had the same sequences. The trainer needs no weights for it."""
        pairs = zip(token_sequences, logprobs, strict=True)
        samples = [Sample.pack(ids[:1], ids[1:], values) for ids, values in pairs]
        return (await self.call(EvaluationOperations.compare_probe, samples=samples))["probe/mean"]

    async def restart(self) -> None:
        """Kill the remaining ranks and start all again, with their initial weights; return when
        they have built their model.

        Raises:
            UserError: the first rank that fails does so by a user's mistake.
            TrainerError: it fails for another reason.
        """
        assert self.can_restart, "torchrun started the ranks"
        self.num_restarts += 1
        await asyncio.to_thread(self.kill)
        self.socket.close()
        self.socket = RankSocket(self._bind, self._token)
        self.processes.clear()
        self.ranks = []
        self.launch()
        await self.connect()
        self.is_usable = True

    async def close(self) -> None:
        """Ask the ranks to end, wait up to ten seconds, then kill those that are left."""
        if self.ranks and self.processes.are_alive and self.is_usable:
            with contextlib.suppress(TimeoutError, TrainerError):
                await asyncio.wait_for(self._call_ranks(STOP), timeout=10)
            self.processes.stop()
        self.kill()
        self.socket.close()

    def kill(self) -> None:
        """Kill all ranks at once, also stopped or stuck ones."""
        self.processes.kill()

    async def _call_ranks(
        self,
        operation: str,
        arguments: dict[str, Any] | None = None,
        shares: list[list[Buffer]] | None = None,
        on_start: Callable[[], object] | None = None,
    ) -> list[dict[str, Any]]:
        await self._call_lock.acquire()
        try:
            if on_start is not None:
                on_start()
        except BaseException:  # no exchange that would release the lock has begun
            self._call_lock.release()
            raise
        # The caller may be cancelled from here on. The exchange goes on all the same: its replies
        # would otherwise be taken for those to the next call.
        exchange = asyncio.create_task(self._exchange_messages(operation, arguments, shares))
        exchange.add_done_callback(self._end_exchange)
        return await asyncio.shield(exchange)

    def _end_exchange(self, exchange: asyncio.Task[Any]) -> None:
        self._call_lock.release()
        if not exchange.cancelled():
            exchange.exception()  # mark as retrieved, also where the caller was cancelled

    async def _exchange_messages(
        self,
        operation: str,
        arguments: dict[str, Any] | None,
        shares: list[list[Buffer]] | None,
    ) -> list[dict[str, Any]]:
        if needs_parameters(operation):
            assert not self._is_offloaded(), f"{operation}: engines compute in the weights' memory"
        if not self.ranks:
            raise TrainerLost(f"the ranks are starting again, and cannot be asked for {operation}")
        call = msgspec.msgpack.encode(RankCall(operation, arguments or {}))
        for rank, description in enumerate(self.ranks):
            if rank % CALLS_PER_YIELD == 0:
                await asyncio.sleep(0)
            share: list[Buffer] = []
            if shares and description["is_replica_leader"]:
                share = shares[description["data_rank"]]
            try:
                await self.socket.send(rank, call, share)
            except zmq.ZMQError:
                self.is_usable = False
                raise TrainerLost(self.processes.cause_of_death(rank, operation)) from None
        self.is_usable = False
        replies = await self._gather_replies(operation, len(self.ranks))
        self.is_usable = True
        return replies

    @property
    def _last_stage_rank(self) -> int:
        return next(r["rank"] for r in self.ranks if r["is_last_stage"])

    async def _gather_replies(self, operation: str, count: int) -> list[dict[str, Any]]:
        """Return the results by rank.

        Raises:
            Exception: the error of the first rank that fails.
        """
        replies: dict[int, dict[str, Any]] = {}
        self.pending_call = PendingCall(operation, time.monotonic(), set(range(count)))
        try:
            while self.pending_call.missing:
                reply = await self.socket.reply(POLL_SECONDS)
                if reply is None:
                    lost_rank = self.processes.first_ended(set(replies))
                    # The last reply of a rank that died may have arrived since.
                    reply = await self.socket.reply(POLL_SECONDS) if lost_rank is not None else None
                    if reply is None and lost_rank is not None:
                        raise TrainerLost(self.processes.cause_of_death(lost_rank, operation))
                if reply is not None:
                    if reply.error is not None:
                        await self._raise_rank_error(reply, operation)
                    replies[reply.rank] = reply.result or {}
                    self.pending_call.missing.discard(reply.rank)
                    self.num_replies += 1
        finally:
            self.pending_call = None
        return [replies[rank] for rank in range(count)]

    async def _raise_rank_error(self, reply: RankReply, operation: str) -> NoReturn:
        """Raise the error of `reply` to a call of `operation`, or, if another rank was killed, that
        cause of the error."""
        assert reply.error is not None
        if reply.is_user_error:
            raise UserError(reply.error, key=reply.key, cause=reply.cause)
        await asyncio.sleep(POLL_SECONDS)
        killed_rank = self.processes.first_killed()
        cause = (
            reply.error
            if killed_rank is None
            else self.processes.cause_of_death(killed_rank, operation)
        )
        raise TrainerLost(cause)
