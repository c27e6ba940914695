"""What each engine of a fleet is started with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_r1.engine.server import EngineServer
from megatron_r1.fleet.hosts.engines import gpus_of_slot, visible_gpus


def share_of_gpus(settings: dict[str, Any], index: int, num_engines: int) -> dict[str, Any]:
    """The settings of one of several engines on this host's GPUs, each of which gets its own; hosts
    of a pool share theirs out themselves.

    Raises:
        EngineError: there are too few GPUs, or they cannot be shared out evenly.
    """
    is_here = settings.get("make_server", EngineServer) is EngineServer
    if num_engines == 1 or settings.get("device") != "cuda" or not is_here:
        return settings
    gpus = gpus_of_slot(visible_gpus(os.environ), num_engines, index % num_engines)
    return settings | {"extra_env": gpus | dict(settings.get("extra_env") or {})}


def vocabulary(model: Path) -> int | None:
    """Tokens that the model knows, if its config.json says so."""
    try:
        hf = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return (hf.get("text_config") or hf).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None  # the server says what is wrong with it
