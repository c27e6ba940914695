"""The engines of a fleet: which are there, which take new groups, whether any can be used."""

from collections.abc import Callable

from megatron_r1.engines.fleet.dispatch import Dispatcher
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.errors import EngineError

Notify = Callable[[str], None]
"""Called with a line for a person when an engine is replaced, joins or leaves."""


class Members:
    """The state that a fleet's push, retries and replacement share. Every change of `is_open` goes
    through here, so that the dispatcher assigns groups to open engines only."""

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
        """Start to accept `generate` and `score` calls."""
        self._refusal = ""
        self._update()

    def fail(self, reason: Exception) -> None:
        """Refuse every waiting and later call, with this reason."""
        self._refusal = f"no engine can be used; stop and resume the run: {reason}"
        self.dispatcher.fail(EngineError(self._refusal))

    def require_usable(self) -> None:
        """Raise EngineError if no call can be served."""
        if self._refusal:
            raise EngineError(self._refusal)

    def set_open(self, engine: Engine, is_open: bool) -> None:
        """Let an engine take new groups, or stop it from taking them."""
        engine.is_open = is_open
        self._update()

    def put_up(self, engine: Engine, place_of: Engine) -> None:
        """Let an engine with the current weights serve in the place of a member, or of itself."""
        engine.is_up = engine.is_open = True
        self.engines[self.engines.index(place_of)] = engine
        self._update()

    def take_down(self, engine: Engine) -> None:
        """Exclude a dead engine from calls and pushes; it keeps its place for a replacement."""
        engine.is_up = engine.is_open = False
        self._update()

    def remove(self, engine: Engine) -> None:
        """Exclude an engine for good; harmless if it has left."""
        self.take_down(engine)
        if engine in self.engines:
            self.engines.remove(engine)

    def _update(self) -> None:
        self.dispatcher.use(engine for engine in self.engines if engine.is_open)
