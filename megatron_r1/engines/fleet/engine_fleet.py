"""All engines that serve one model in a run: one policy version, groups to the least loaded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

from megatron_r1.engines.fleet.dispatch import Affinity, DispatchedRequest, Dispatcher
from megatron_r1.engines.fleet.engine import Engine, MakeServer
from megatron_r1.engines.fleet.engine_replacer import EngineReplacer
from megatron_r1.engines.fleet.fleet_state import FleetState, Notify
from megatron_r1.engines.fleet.request_retries import RequestRetries
from megatron_r1.engines.fleet.response_length_estimates import ExpectedLength, LengthEstimator
from megatron_r1.engines.fleet.weight_swaps import EngineCall, weight_update_calls
from megatron_r1.engines.server.client import EngineClient
from megatron_r1.engines.server.errors import EngineDied, EngineError, EngineLacksPush
from megatron_r1.engines.server.gpu import with_gpu_share
from megatron_r1.engines.server.model_config import vocab_size
from megatron_r1.engines.server.responses import Response
from megatron_r1.engines.server.server import EngineServer
from megatron_r1.push.control_messages import PushUpdateInfo

SendWeights = Callable[[Engine], contextlib.AbstractAsyncContextManager[object]]
"""A context: on entry the engine gets the fleet's weights. Yields False if it got none and sleeps.
No push begins until the block has ended."""


class EngineFleet:
    """Engines that hold the same weights.

    Use as `async with EngineFleet(...) as fleet`, or call `close`. An engine that ends, hangs,
    crawls or gives unusable replies is replaced while the others go on; the replacement gets the
    current weights, and lost requests are repeated. Engines may join and leave at any time. A push
    that a living engine refuses makes the fleet refuse every call: it never serves a mixture of
    versions.

    Args:
        num_engines: the number of engines at the start; engines may join later.
        log_folder: the folder of the engines' logs, `ROLE-0.log`, `ROLE-1.log`, …
        max_restarts: the number of engines that may be replaced in all; the next death fails the
            fleet's calls.
        start_timeout_seconds: limit for the start of an engine.
        request_timeout_seconds: limit for a call.
        unresponsive_seconds: an engine that has not answered for this time counts as dead.
        role: what the engines are for, in logs and errors.
        section: the key of their settings in the recipe.
        make_server: makes an engine's server, `EngineServer` for one on this host.
        notify: called with a line when an engine is replaced, joins or leaves.
        max_num_seqs: sequences that each data-parallel copy of an engine decodes together.
        data_parallel: data-parallel copies behind an engine's address.
        **server_settings: further fields of `EngineSettings`, the same for all engines.

    Raises:
        ValueError: for num_engines < 1.
    """

    def __init__(
        self,
        num_engines: int,
        log_folder: str | os.PathLike[str],
        *,
        max_restarts: int = 0,
        start_timeout_seconds: float = 300.0,
        request_timeout_seconds: float = 1800.0,
        unresponsive_seconds: float = 120.0,
        role: str = "engine",
        section: str = "rollout",
        make_server: MakeServer = EngineServer,
        notify: Notify = lambda message: None,
        max_num_seqs: int = 256,
        data_parallel: int = 1,
        **server_settings: Any,
    ) -> None:
        if num_engines < 1:
            raise ValueError(f"num_engines is {num_engines}; it must be at least 1")
        self.num_engines, self.log_folder = num_engines, Path(log_folder)
        self.start_timeout_seconds = start_timeout_seconds
        self.request_timeout_seconds = request_timeout_seconds
        self.role, self.section, self.make_server = role, section, make_server
        sizes = {"max_num_seqs": max_num_seqs, "data_parallel": data_parallel}
        self.server_settings = server_settings | sizes
        self.policy_version = -1
        self._send_weights: SendWeights = contextlib.nullcontext
        self.awake = asyncio.Event()
        """Cleared while the trainer uses the engines' memory."""
        self.awake.set()
        self._max_request_responses = max_num_seqs
        self.state = FleetState(Dispatcher(max_num_seqs * data_parallel), notify)
        self.replacer = EngineReplacer(
            self.state,
            lambda dead: self._start_one(dead.index, instead_of=dead),
            max_restarts,
            unresponsive_seconds,
        )
        self.retries = RequestRetries(self.state, self.replacer.handle_failure)
        self.length_estimator = LengthEstimator()
        self._model: Path | None = None
        self._swap_lock = asyncio.Lock()
        self._starting: set[Engine] = set()
        self._joining: set[int] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def engines(self) -> list[Engine]:
        """The engines that are in use now."""
        return self.state.engines

    @property
    def engines_use_memory(self) -> bool:
        """Whether an awake engine holds the memory that `sleep` would free."""
        return self.awake.is_set() and any(not engine.is_asleep for engine in self.state.up)

    @property
    def num_restarts(self) -> int:
        """Engines that were replaced since the start."""
        return self.replacer.num_restarts

    def set_weight_sender(self, send_weights: SendWeights) -> None:
        """Have `send_weights` give an engine that joins the fleet's weights (a function of
        `controller.push.pusher`). Until this is called an engine keeps those that it starts with.
        """
        self._send_weights = send_weights

    def forget_policy_version(self) -> None:
        """Let the next push have any version: a trainer that went back to a checkpoint pushes
        earlier versions again."""
        self.policy_version = -1

    async def start(self, model_path: str | os.PathLike[str], policy_version: int = 0) -> None:
        """Start all engines on the weights in `model_path`, and name these `policy_version`.

        The engines end with the thread that calls this: call it from the main thread. If an engine
        does not start, all are ended, and EngineError is raised."""
        self._model = Path(model_path)
        try:
            for index in range(self.num_engines):
                self.engines.append(self.launch(index))
            timeout = self.start_timeout_seconds
            await asyncio.gather(
                *(engine.prepare(policy_version, timeout) for engine in self.engines)
            )
        except BaseException:
            await self.close()
            raise
        self.policy_version = policy_version
        self.state.begin()
        self.replacer.begin()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        n: int,
        max_tokens: int,
        kind: str = "",
        step: int = 0,
        affinity: Affinity | None = None,
        **sampling: Any,
    ) -> list[Response]:
        """Sample a group of n responses on one engine; if that engine dies or fails, on another.

        vLLM refuses a request for more responses than `max_num_seqs`: a larger group is several
        requests, on any engines.

        Args:
            prompt_token_ids: the tokens of one prompt.
            n: responses.
            max_tokens: the most of a response.
            kind: the prompt's kind; response lengths are estimated for each kind.
            step: the training step; groups of an earlier one are sent first.
            affinity: the engine whose cache has the conversation's earlier turns.
            **sampling: further arguments of `EngineClient.generate`.

        Raises:
            EngineError: if the call was refused, no engine could serve it, or its engine died and
                no restart is left; the message names the engine and how it ended, and quotes its
                log.
        """
        sampling |= {"max_tokens": max_tokens}
        num_prompt_tokens = len(prompt_token_ids)
        expected_length = self.length_estimator.estimate(kind, num_prompt_tokens, max_tokens)

        async def sample(count: int) -> list[Response]:
            return await self.retries.run(
                DispatchedRequest(
                    count, num_prompt_tokens, expected_length, step, affinity=affinity
                ),
                lambda client: client.generate(prompt_token_ids, n=count, **sampling),
                _response_lengths,
            )

        limit = self._max_request_responses
        assert n <= limit or sampling.get("seed") is None, "requests of one seed sample the same"
        requests = [
            asyncio.ensure_future(sample(min(limit, n - offset))) for offset in range(0, n, limit)
        ]
        try:
            responses = list(chain.from_iterable(await asyncio.gather(*requests)))
        finally:
            for request in requests:
                request.cancel()  # of those that are done nothing is left to cancel
        self.length_estimator.add(kind, num_prompt_tokens, _response_lengths(responses))
        return responses

    async def compute_logprobs(
        self, token_ids: Sequence[int], first: int, *, step: int = 0
    ) -> array[float]:
        """Return the log-probabilities of token_ids[first:] at temperature 1, float32, from one
        engine; if that engine dies or fails, from another.

        Args:
            token_ids: the tokens of prompt and response.
            first: the index of the first of those tokens.
            step: the training step; calls of an earlier one are sent first.

        Raises:
            EngineError: the call was refused, no engine could serve it, or its engine died and no
                restart is left.
        """
        return await self.retries.run(
            DispatchedRequest(1, len(token_ids), ExpectedLength(1.0, 1.0, num_groups=1), step),
            lambda client: client.compute_logprobs(token_ids, first),
            lambda logprobs: [len(logprobs)],
        )

    @contextlib.contextmanager
    def liveness_grace(self, seconds: float) -> Iterator[None]:
        """Allow engines to be silent for `seconds` inside the block, while they wait for weights,
        before they count as dead."""
        self.replacer.grace_seconds = seconds
        try:
            yield
        finally:
            self.replacer.grace_seconds = 0.0

    async def swap_weights(self, update_info: PushUpdateInfo, policy_version: int) -> None:
        """Let the engines replace their weights by those that they have received; then the fleet
        holds `policy_version` and is awake.

        Sequences in flight continue under the new weights; their earlier tokens keep their version.
        An engine that did not receive the weights, or whose connection breaks, is replaced.

        Args:
            update_info: what the engines need to find the push.
            policy_version: number of the new weights.

        Raises:
            ValueError: for a `policy_version` that is not above the current one; engines that sleep
                have lost that, and may get it again.
            EngineError: if an engine refuses the weights, or dies and no restart is left; the fleet
                is unusable from then on.
        """
        self.state.require_usable()
        if policy_version < self.policy_version or (
            policy_version == self.policy_version and self.awake.is_set()
        ):
            raise ValueError(
                f"push of version {policy_version}, but the engines hold version "
                f"{self.policy_version}"
            )
        async with self._swap_lock:
            engines = self.state.up
            try:
                for call in weight_update_calls(
                    update_info, policy_version, asleep=not self.awake.is_set()
                ):
                    engines = await self._call_engines(engines, call)
            except Exception as error:
                self.state.fail(
                    EngineError(f"the push of version {policy_version} failed: {error}")
                )
                raise
            self.policy_version = policy_version
            self.awake.set()
            for engine in engines:
                if engine.is_asleep:
                    self.state.wake(engine)

    async def sleep(self) -> None:
        """Free the engines' memory for the trainer: the engines drop weights and caches until the
        next push. No request may be in flight. Returns at once if the fleet sleeps already.

        Raises:
            EngineError: an engine refuses.
        """
        async with self._swap_lock:
            if not self.awake.is_set():
                return
            self.state.require_usable()
            self.awake.clear()
            # A starting engine has no weights yet: it is started again once the fleet is awake.
            starting_engines = [engine for engine in self._starting if not engine.is_up]
            await asyncio.gather(*(engine.stop() for engine in starting_engines))
            awake_engines = [engine for engine in self.state.up if not engine.is_asleep]
            await self._call_engines(awake_engines, lambda client: client.sleep())

    async def add_engine(self) -> Engine:
        """Start one more engine, give it the current weights, and let it serve.

        Raises:
            EngineError: the engine does not start.
        """
        self.state.require_usable()
        # Reserved from now on: others may be joining, and none is in `engines` yet while the fleet
        # sleeps. Of two engines with one number every push would reach one only.
        indices = self._joining.union(engine.index for engine in self.engines)
        index = 1 + max(indices, default=-1)
        self._joining.add(index)
        try:
            engine = await self._start_one(index)
        finally:
            self._joining.discard(index)
        self.state.notify(f"{engine.name} has joined: {len(self.engines)} engines")
        return engine

    def metrics(self) -> dict[str, float]:
        """Return the fleet's entries of a step's line in metrics.jsonl."""
        return {
            "engines/up": sum(engine.accepts_groups for engine in self.engines),
            "engines/restarts": self.num_restarts,
            "engines/requeued": self.retries.num_requeued,
        }

    async def close(self) -> None:
        """End all engines. Safe to call more than once."""
        await self.replacer.close()
        self.state.dispatcher.fail(EngineError("the fleet was closed"))
        engines = list(self.engines)
        self.engines.clear()  # an inspection of one that ends would open its client again
        await asyncio.gather(*(engine.stop() for engine in engines))

    def launch(self, index: int) -> Engine:
        """Start an engine's processes and return at once; they end with the calling thread. Every
        engine samples with another seed, and shares a secret with its own client only."""
        assert self._model is not None, "start() was not called"
        settings = self.server_settings
        if self.make_server is EngineServer:  # hosts of a pool divide their GPUs themselves
            key = f"{self.section}.engines"
            settings = with_gpu_share(settings, index, self.num_engines, key)
        seed = (settings.get("seed", 0) + index) % 2**32  # vLLM hands it to numpy, too
        engine_settings = {"seed": seed, "secret": secrets.token_hex(32)}
        log = self.log_folder / f"{self.role}-{index}.log"
        server = self.make_server(self._model, log, **(settings | engine_settings))
        server.start()
        client = EngineClient(
            "",
            secret=engine_settings["secret"],
            timeout_seconds=self.request_timeout_seconds,
            vocab_size=vocab_size(self._model),
            name=f"{self.role}-{index}",
        )
        return Engine(index, server, client, role=self.role)

    def replace(self, engine: Engine, reason: EngineDied) -> None:
        """Replace an unusable engine, unless it is being replaced already.

        Raises:
            EngineDied: `reason`, where no restart is left.
        """
        self.replacer.replace(engine, reason)

    async def _start_one(self, index: int, instead_of: Engine | None = None) -> Engine:
        """Start an engine, give it the current weights, and let it serve. If the fleet is put to
        sleep before the engine serves, start the engine again when the fleet is awake.

        Raises:
            EngineError: the engine does not start, or refuses the weights.
        """
        while True:
            await self.awake.wait()
            try:
                engine = self.launch(index)
            except OSError as error:  # no memory for a process, no port
                raise EngineError(f"{self.role}-{index} cannot be started: {error}") from error
            engine.is_up = engine.accepts_groups = False
            if instead_of is None:
                self.engines.append(engine)
            self._starting.add(engine)
            try:
                await engine.prepare(self.policy_version, self.start_timeout_seconds)
                async with self._send_weights(engine) as has_weights:
                    replaced_engine = instead_of or engine
                    self.state.mark_up(engine, replaced_engine, is_asleep=has_weights is False)
                return engine
            except BaseException as error:
                if engine in self.engines:
                    self.engines.remove(engine)
                await engine.stop()
                if self.awake.is_set() or not isinstance(error, EngineError):
                    raise
            finally:
                self._starting.discard(engine)

    async def _call_engines(self, engines: list[Engine], call: EngineCall) -> list[Engine]:
        """Make one call of a push to every engine. Return the engines that get the next call: those
        that are up and received the weights. Any other is replaced."""
        calls = (engine.await_unrepeatable_call(call(engine.client)) for engine in engines)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for engine, outcome in zip(engines, outcomes, strict=True):
            if isinstance(outcome, EngineLacksPush):
                outcome = EngineDied(f"{engine.name} did not get the weights: {outcome}")
            if isinstance(outcome, EngineDied):
                self.replacer.replace(engine, outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
        return [engine for engine in engines if engine.is_up]


def _response_lengths(responses: Sequence[Response]) -> list[int]:
    return [len(response.token_ids) for response in responses]
