"""Keeps the state of a fleet's engines: which are there, which take new groups, and whether any can
be used."""

from collections.abc import Callable

from megatron_r1.engines.fleet.dispatch import Dispatcher
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.errors import EngineError

Notify = Callable[[str], None]
"""Called with a line for a person when an engine is replaced, joins or leaves."""


class FleetState:
    """The state that a fleet's push, retries and replacement share. Every change of
    `accepts_groups` goes through here, so that the dispatcher assigns groups to no other engine."""

    def __init__(self, dispatcher: Dispatcher, notify: Notify) -> None:
        self.dispatcher, self.notify = dispatcher, notify
        self.engines: list[Engine] = []
        self._refusal = "the fleet has no engines: call start() first"
        """Why no call can be served; empty while calls can be."""

    @property
    def up(self) -> list[Engine]:
        """Engines that answer and hold the current weights."""
        return [engine for engine in self.engines if engine.is_up]

    def begin(self) -> None:
        """Start to accept `generate` and `compute_logprobs` calls."""
        self._refusal = ""
        self._update_dispatcher()

    def fail(self, reason: Exception) -> None:
        """Refuse every waiting and later call, with this reason."""
        self._refusal = f"no engine can be used; stop and resume the run: {reason}"
        self.dispatcher.fail(EngineError(self._refusal))

    def require_usable(self) -> None:
        """Raise EngineError if no call can be served."""
        if self._refusal:
            raise EngineError(self._refusal)

    def set_accepts_groups(self, engine: Engine, accepts_groups: bool) -> None:
        """Let an engine take new groups, or stop it from taking them."""
        engine.accepts_groups = accepts_groups
        self._update_dispatcher()

    def mark_up(self, engine: Engine, replaced: Engine, *, is_asleep: bool = False) -> None:
        """Let an engine with the current weights serve instead of another engine, or again. One
        that sleeps has no weights, and serves after the next push (`wake`).

        Args:
            engine: the engine that serves from now on.
            replaced: the engine of the fleet that it replaces, or itself.
            is_asleep: whether it has no weights yet."""
        engine.is_up, engine.accepts_groups, engine.is_asleep = True, not is_asleep, is_asleep
        self.engines[self.engines.index(replaced)] = engine
        self._update_dispatcher()

    def wake(self, engine: Engine) -> None:
        """Let an engine serve that was put up asleep, and has the weights now."""
        engine.is_asleep = False
        self.set_accepts_groups(engine, True)

    def mark_down(self, engine: Engine) -> None:
        """Exclude a dead engine from calls and pushes; `engines` keeps it until a replacement is
        up."""
        engine.is_up = engine.accepts_groups = False
        self._update_dispatcher()

    def remove(self, engine: Engine) -> None:
        """Exclude an engine for good; harmless if it has left."""
        self.mark_down(engine)
        if engine in self.engines:
            self.engines.remove(engine)

    def _update_dispatcher(self) -> None:
        self.dispatcher.set_engines(engine for engine in self.engines if engine.accepts_groups)
