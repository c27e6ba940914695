"""The calls with which an engine replaces its weights by those that it has received."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from megatron_r1.engines.server.client import EngineClient
from megatron_r1.push.control_messages import PushUpdateInfo

EngineCall = Callable[[EngineClient], Coroutine[Any, Any, None]]


def weight_update_calls(
    update_info: PushUpdateInfo, policy_version: int, *, asleep: bool
) -> list[EngineCall]:
    """Return, in order, the calls after which an engine has loaded a push and samples again.

    Args:
        update_info: the description of the received push.
        policy_version: the version of the new weights.
        asleep: the engine sleeps. An update while the weights sleep kills vLLM, and the memory of
            the KV cache may hold the received weights until they are loaded, so it wakes after
            them.
    """
    if not asleep:
        return [lambda client: client.swap_weights(update_info, policy_version, resume=True)]
    return [
        lambda client: client.wake("weights"),
        lambda client: client.swap_weights(update_info, policy_version, resume=False),
        lambda client: client.wake("kv_cache"),
        lambda client: client.resume(),
    ]
