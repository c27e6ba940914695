"""The two ends of a transport."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from megatron_r1.weight_sync.receive.buffer import ReceiveBuffer
from megatron_r1.weight_sync.receive.rendezvous import Offer, Plan, Rendezvous
from megatron_r1.weight_sync.receive.table import Delivery, Table, by_window


class Receiver(ABC):
    """An engine rank's end. Making it publishes `table`, waits for all trainer ranks' plans, and
    then receives in the background whatever they send.

    memory: of all areas.
    """

    def __init__(self, meeting: Rendezvous, rank: int, table: Table):
        self.meeting, self.rank, self.table = meeting, rank, table
        self.memory = self.allocate()
        try:
            meeting.offer(rank, Offer(table, self.address))
            plans = meeting.plans(rank)
            deliveries = {sender: plan.deliveries for sender, plan in plans.items()}
            self.inbox = ReceiveBuffer(table, self.memory, deliveries)
            self.connect(plans)
        except BaseException:
            self.close()
            raise

    address = ""
    """What the senders are told of where to send."""

    @abstractmethod
    def allocate(self) -> torch.Tensor:
        """The memory; raises ValueError when there is not enough."""

    @abstractmethod
    def connect(self, plans: dict[int, Plan]) -> None:
        """Begin to receive."""

    @abstractmethod
    def close(self) -> None:
        """End receiving and free what is held; harmless if done."""


class Sender(ABC):
    """A trainer rank's end towards one engine rank. In order: `plan`, `connect`, then for every
    push `send` window by window.

    full_every: of so many pushes the first is sent whole, and of the others what changed; where
    nothing travels, it makes no difference."""

    def __init__(
        self, meeting: Rendezvous, sender: int, rank: int, offer: Offer, full_every: int = 1
    ):
        self.meeting, self.sender, self.rank, self.offer = meeting, sender, rank, offer
        self.table, self.full_every = offer.table, full_every

    address = ""

    def plan(self, deliveries: Sequence[Delivery]) -> Plan:
        """What it will bring with every push, for the receiver."""
        self.deliveries = list(deliveries)
        self.windows = by_window(self.table, self.deliveries)
        return Plan(self.deliveries, self.address)

    @abstractmethod
    def connect(self) -> None:
        """After all plans are published; the receiver does the same."""

    @abstractmethod
    def send(self, push: int, window: int, sources: Sequence[torch.Tensor]) -> None:
        """Bring the deliveries of one window; sources[i] is (height, width), of any dtype, for the
        i-th delivery of all. On return the sources may change.

        From the third window on it waits until the engine rank is done with the one that lies
        where this goes: `await_room`."""

    @abstractmethod
    def close(self) -> None: ...

    def await_room(self, push: int, window: int) -> None:
        """Until the memory for this window may be written."""
        if window >= 2:
            self.meeting.await_release(self.rank, push, window - 2)
