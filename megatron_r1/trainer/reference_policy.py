"""The reference policy: a second set of this rank's weights, swapped in only while it computes.

On the CPU it takes GPU memory only while it is swapped in; then policy and reference are both on
the device. On the device it is there all the time, and nothing is copied."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_r1.models import platform


class ReferencePolicy:
    """A frozen copy of what training changes of a model: trained parameters and persistent buffers
    (the router's bias).

    Of a model with adapters that is a copy of the adapters: before the first update, the model
    without them."""

    def __init__(self, chunks: Sequence[torch.nn.Module], on_cpu: bool = True):
        """Keep a copy of the policy's weights.

        Args:
            chunks: the policy's chunks.
            on_cpu: whether the weights are kept in pinned host memory, not on the policy's device.
        """
        self._live = [t for chunk in chunks for t in _trained_tensors(chunk)]
        self._copies = [
            platform.empty_in_host_memory(tuple(t.shape), t.dtype)
            if on_cpu
            else torch.empty_like(t)
            for t in self._live
        ]
        frozen_tensors: Iterator[Tensor] = (
            p for chunk in chunks for p in chunk.parameters() if not p.requires_grad
        )
        self._by_live: dict[int, Tensor] = {id(t): t for t in frozen_tensors}
        self._by_live |= {id(t): copy for t, copy in zip(self._live, self._copies, strict=True)}
        self.refresh()

    def stored_value(self, live: Tensor) -> Tensor:
        """Return the reference's value of a tensor of the model: the stored copy of a trained one,
        and the tensor itself where it is not trained.

        Args:
            live: the parameter or buffer, not a view.

        Raises:
            KeyError: for any other tensor."""
        return self._by_live[id(live)]

    def refresh(self) -> None:
        """Replace the reference by the current policy."""
        for copy, live_tensor in zip(self._copies, self._live, strict=True):
            copy.copy_(live_tensor.detach())

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model compute with the reference's weights inside the block. They are brought to
        the parameters' device: data of another would lose the hooks that collect gradients."""
        policy = [live_tensor.data for live_tensor in self._live]
        try:
            for live_tensor, copy in zip(self._live, self._copies, strict=True):
                live_tensor.data = copy.to(live_tensor.device, non_blocking=True)
            yield
        finally:
            for live_tensor, data in zip(self._live, policy, strict=True):
                live_tensor.data = data


def _trained_tensors(chunk: torch.nn.Module) -> Iterator[Tensor]:
    yield from (parameter for parameter in chunk.parameters() if parameter.requires_grad)
    # Buffers that are not saved are derived, such as rotary frequencies, and equal in both.
    persistent_names = set(chunk.state_dict().keys())
    for name, buffer in chunk.named_buffers():
        if name in persistent_names:
            yield buffer
