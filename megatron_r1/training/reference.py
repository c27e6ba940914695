"""The reference policy: a second set of this rank's weights, put in place only while it is asked.

It lives on the CPU; on a GPU it is copied over for the time of the forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Reference:
    """A frozen copy of a model's parameters and persistent buffers (the router's bias, too)."""

    def __init__(self, chunks: list[torch.nn.Module]):
        self._live = [t for chunk in chunks for t in _weights(chunk)]
        self._kept = [t.detach().cpu().clone() for t in self._live]

    def refresh(self) -> None:
        """Replace the reference by the present policy."""
        for kept, live in zip(self._kept, self._live, strict=True):
            kept.copy_(live.detach())

    def load(self, model: torch.nn.Module, state: dict[str, Tensor]) -> None:
        """Take `state`, as `model.state_dict()` names it, as the reference."""
        with self.in_place():
            model.load_state_dict(state)
            self.refresh()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within: the model computes with the reference's weights. The policy's are untouched."""
        policy = [live.data for live in self._live]
        try:
            for live, kept in zip(self._live, self._kept, strict=True):
                live.data = kept.to(live.device)
            yield
        finally:
            for live, data in zip(self._live, policy, strict=True):
                live.data = data


def _weights(chunk: torch.nn.Module) -> Iterator[Tensor]:
    yield from chunk.parameters()
    persistent = set(chunk.state_dict().keys())
    for name, buffer in chunk.named_buffers():
        if name in persistent:
            yield buffer
