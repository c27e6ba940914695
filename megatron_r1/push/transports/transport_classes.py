"""The classes of a transport by its name, each imported when it is asked for."""

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
    return getattr(import_module(f"{__package__}.{module}"), name)
