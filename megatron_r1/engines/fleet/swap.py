"""The calls with which an engine replaces its weights by those that it has received."""

from collections.abc import Callable, Coroutine
from typing import Any

from megatron_r1.engines.server.client import EngineClient, UpdateInfo

EngineCall = Callable[[EngineClient], Coroutine[Any, Any, None]]


def swap_calls(update_info: UpdateInfo, version: int, *, asleep: bool) -> list[EngineCall]:
    """Return the calls that load a push as `version`, in order; after the last the engine samples.

    asleep: the engine sleeps. An update while the weights sleep kills vLLM, and the memory of the
    KV cache may hold the received weights until they are loaded, so it wakes after them."""
    if not asleep:
        return [lambda client: client.swap_weights(update_info, version, resume=True)]
    return [
        lambda client: client.wake("weights"),
        lambda client: client.swap_weights(update_info, version, resume=False),
        lambda client: client.wake("kv_cache"),
        lambda client: client.resume(),
    ]
