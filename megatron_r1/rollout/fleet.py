"""All rollout engines: who gets which group, one policy version everywhere, death noticed."""

import asyncio
import contextlib
import os
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_r1.rollout.client import Completion, EngineClient
from megatron_r1.rollout.errors import EngineError
from megatron_r1.rollout.server import EngineServer

T = TypeVar("T")
WATCH_SECONDS = 0.2
# A server whose engine core died fails its requests first and ends a moment later.
LAST_WORDS_SECONDS = 10.0


@dataclass
class Engine:
    """One server, its client, and what the fleet knows of it."""

    name: str
    server: EngineServer
    client: EngineClient
    num_running: int = 0
    """Sequences asked for and not yet back."""
    died: asyncio.Event = field(default_factory=asyncio.Event)


class RolloutFleet:
    """N engines that hold the same weights.

    Use as `async with RolloutFleet(...) as fleet`, or call `close`. A push that fails on any engine
    leaves the fleet refusing every call: it never serves a mixture of versions.
    """

    def __init__(
        self,
        num_engines: int,
        log_folder: str | os.PathLike[str],
        *,
        start_timeout_seconds: float = 300.0,
        request_timeout_seconds: float = 1800.0,
        **server_settings: Any,
    ) -> None:
        """
        Args:
            log_folder: gets `engine-0.log`, `engine-1.log`, ...
            server_settings: of `EngineServer`, the same for all; each engine samples from its own
                seed.

        Raises:
            ValueError: num_engines < 1.
        """
        if num_engines < 1:
            raise ValueError(f"num_engines is {num_engines}; it must be at least 1")
        self.num_engines = num_engines
        self.log_folder = Path(log_folder)
        self.start_timeout_seconds = start_timeout_seconds
        self.request_timeout_seconds = request_timeout_seconds
        self.server_settings = server_settings
        self.engines: list[Engine] = []
        self.version = -1
        self._model: Path | None = None
        self._broken: str | None = None
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "RolloutFleet":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self, model_path: str | os.PathLike[str], version: int = 0) -> None:
        """Start all engines on the weights in `model_path` and call these `version`.

        The engines end with the calling thread: call it from the main one.

        Raises:
            EngineError: one did not start; none is left running.
        """
        self._model = Path(model_path)
        try:
            for index in range(self.num_engines):
                self.engines.append(self._launch(index))
            await asyncio.gather(*(self._prepare(engine, version) for engine in self.engines))
        except BaseException:
            await self.close()
            raise
        self.version = version
        self._watch = asyncio.create_task(self.watch())

    async def generate(
        self, prompt_token_ids: Sequence[int], *, n: int, **sampling: Any
    ) -> list[Completion]:
        """Sample a group of n responses on the least loaded engine.

        Args:
            sampling: further arguments of `EngineClient.generate`.

        Raises:
            EngineError: the call failed or its engine died; says which, how, and what its log says.
        """
        self._refuse_if_broken()
        engine = min(self.engines, key=lambda engine: engine.num_running)
        engine.num_running += n
        try:
            return await self._unless_dead(
                engine, engine.client.generate(prompt_token_ids, n=n, **sampling)
            )
        finally:
            engine.num_running -= n

    async def push(
        self, update_info: Mapping[str, Any] | Sequence[Mapping[str, Any]], version: int
    ) -> None:
        """Give all engines new weights; the weights file may be deleted when this returns.

        Sequences in flight go on under the new weights; their earlier tokens keep their version.

        Raises:
            ValueError: `version` is not above the current one.
            EngineError: an engine failed; the fleet is unusable from then on.
        """
        self._refuse_if_broken()
        if version <= self.version:
            raise ValueError(
                f"push of version {version}, but the engines hold version {self.version}"
            )
        try:
            await self._on_all(lambda client: client.pause("keep"))
            await self._on_all(lambda client: client.update_weights(update_info, version))
            await self._on_all(lambda client: client.resume())
        except BaseException as error:
            self._broken = f"the push of version {version} failed: {error}"
            raise
        self.version = version

    async def restart(
        self,
        index: int,
        update_info: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Replace engine `index`, dead or alive, by a new one that holds the current version.

        Args:
            update_info: the current weights. None: those in the model folder, right only before the
                first push.

        Raises:
            EngineError: it did not start.
        """
        self._refuse_if_broken()
        await self._end(self.engines[index])
        engine = self._launch(index)
        try:
            await self._prepare(engine, self.version)
            if update_info is not None:
                await engine.client.pause("keep")
                await engine.client.update_weights(update_info, self.version)
                await engine.client.resume()
        except BaseException:
            await self._end(engine)
            raise
        self.engines[index] = engine

    async def watch(self) -> None:
        """Notice ended engines, so that calls waiting for them fail at once. Run by `start`."""
        while True:
            for engine in self.engines:
                if not engine.server.is_alive():
                    engine.died.set()
            await asyncio.sleep(WATCH_SECONDS)

    async def close(self) -> None:
        """End all engines. Safe to call more than once."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        await asyncio.gather(*(self._end(engine) for engine in self.engines))
        self.engines = []

    def _launch(self, index: int) -> Engine:
        assert self._model is not None, "start() was not called"
        name = f"engine-{index}"
        settings = self.server_settings | {"seed": self.server_settings.get("seed", 0) + index}
        server = EngineServer(self._model, self.log_folder / f"{name}.log", **settings)
        server.start()
        return Engine(
            name, server, EngineClient(server.url, timeout_seconds=self.request_timeout_seconds)
        )

    async def _prepare(self, engine: Engine, version: int) -> None:
        try:
            await asyncio.to_thread(engine.server.wait_ready, self.start_timeout_seconds)
        except EngineError as error:
            raise EngineError(f"{engine.name}: {error}") from error
        await engine.client.init_weight_transfer()
        await engine.client.set_version(version)

    async def _end(self, engine: Engine) -> None:
        engine.died.set()
        await engine.client.close()
        await asyncio.to_thread(engine.server.stop)

    async def _on_all(self, call: Any) -> None:
        await asyncio.gather(
            *(self._unless_dead(engine, call(engine.client)) for engine in self.engines)
        )

    async def _unless_dead(self, engine: Engine, call: Coroutine[Any, Any, T]) -> T:
        """Await `call`, or fail as soon as the engine's process has ended."""
        request = asyncio.ensure_future(call)
        death = asyncio.ensure_future(engine.died.wait())
        try:
            await asyncio.wait({request, death}, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                error = request.exception()
                if not isinstance(error, EngineError) or (error.status or 500) < 500:
                    return request.result()
                await asyncio.wait({death}, timeout=LAST_WORDS_SECONDS)
            if not death.done():
                return request.result()
            raise EngineError(f"{engine.name} died: {engine.server.describe_end()}")
        finally:
            request.cancel()
            death.cancel()

    def _refuse_if_broken(self) -> None:
        if self._broken is not None:
            raise EngineError(
                f"the engines may hold different weights, stop and resume the run: {self._broken}"
            )
        if not self.engines:
            raise EngineError("the fleet has no engines: call start() first")
