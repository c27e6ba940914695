"""Moves bytes from trainer ranks into an engine rank's memory.

A transport is a `Receiver` and a `Sender` (see base.py) in a module here, and its row of
`base.transports.TRANSPORTS`. Its name in vLLM is weight-transfer backend `megatron_r1_<name>`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_r1.base.transports import TRANSPORTS

if TYPE_CHECKING:  # a trainer rank needs one of the modules, with torch and llvmlite
    from megatron_r1.push.transports.base import Receiver, Sender


def receiver_class(transport: str) -> type[Receiver]:
    """Return the engine rank's end of a transport, imported only now."""
    return _import_class(TRANSPORTS[transport].receiver)


def sender_class(transport: str) -> type[Sender]:
    """Return the trainer rank's end of a transport, imported only now."""
    return _import_class(TRANSPORTS[transport].sender)


def _import_class(path: str) -> Any:
    module, name = path.split(".")
    return getattr(import_module(f"{__name__}.{module}"), name)
