"""A trainer rank's part of pushes over NCCL: it sends the payloads of its links round by round
(`ordered_sets`), and where engine ranks are on trainer ranks' GPUs, receives for the one on its
own, into memory that both have mapped.

A rank whose wait fails (`transports.nccl_rounds`) aborts its communicator and finds out which
engine ranks have died; the sets of other communicators go on. The trainer ranks' own communicator
is made for the first push that needs it, and again after one that failed; all agree on that before
a push."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch.distributed import PrefixStore, Store

from megatron_r1.push.plan.rounds import ENTRY_BYTES
from megatron_r1.push.protocol import (
    Delivery,
    PositionPlan,
    ReceiverInfo,
    Relay,
    SlotTable,
    deliveries_to,
)
from megatron_r1.push.push_schedule import OrderedSets, PayloadId
from megatron_r1.push.rendezvous import EXPECTED_ERRORS, SetFailed, TrainerRendezvous, wait_for_keys
from megatron_r1.push.results import Failure
from megatron_r1.push.transports.nccl_rounds import (
    Communicator,
    NCCLError,
    PushStreams,
    Round,
    RoundRunner,
    Transfer,
)
from megatron_r1.push.transports.payloads import ArrivingPayloads, MemoryPayload, SlicesPayload
from megatron_r1.push.transports.shared_memory import mapped_memory


@dataclass
class SetRounds:
    """The part of trainer rank `rank` in the pushes to one set.

    Attributes:
        rendezvous: this rank's rendezvous with each engine of the set.
        ordered: the order of the sets that were connected together.
        index: the place of the set in `ordered`.
        rank: the trainer rank.
        communicator: the set's communicator, if it has one.
        number: the number of the set's push."""

    rendezvous: list[TrainerRendezvous]
    ordered: OrderedSets
    index: int
    rank: int
    communicator: Communicator | None = None
    number: int = 0

    def __post_init__(self) -> None:
        self.place = self.ordered.received_by(self.index, self.rank)
        """The engine rank on this rank's GPU, (member, position)."""
        self._receives: tuple[SlotTable, Mapping[int | Relay, Sequence[Delivery]]] | None = None
        """Its table, and the deliveries to it by source."""
        self._mapped: tuple[torch.Tensor, torch.Tensor] | None = None
        """During a push, the memory of that rank, and that of the checksums, behind which is room
        for the push's number."""
        self._arriving: ArrivingPayloads | None = None
        calls, copies = self.ordered.calls(self.rank), self.ordered.copies(self.rank)
        self.calls = [call for call in calls if call.payload.set_index == self.index]
        self.copies = [payload for payload in copies if payload.set_index == self.index]

    def receives_for(self, position: int) -> bool:
        """Return whether an engine rank at this position is on this rank's GPU."""
        return self.place is not None and self.place[1] == position

    def receive_for(self, receivers: Sequence[ReceiverInfo], plan: PositionPlan) -> None:
        """Prepare to receive for the engine rank on this rank's GPU.

        Args:
            receivers: table and address of the engine ranks at its position, by member.
            plan: the deliveries to that position."""
        assert self.place is not None, "receives_for() is True"
        member, _ = self.place
        self._receives = receivers[member].table, deliveries_to(plan, member)

    def begin_connect(self) -> None:
        """Begin to create the set's communicator, if it has one."""
        if num_ranks := self.ordered.num_ranks(self.index):
            self.communicator = Communicator(self.rendezvous[0], self.rank, num_ranks)
            self.communicator.begin()

    def connect(self) -> None:
        """Wait until the set's communicator is there.

        Raises:
            Exception: why the communicator is not there.
        """
        if self.communicator is not None and not self.communicator.wait_settled():
            assert self.communicator.error is not None
            raise self.communicator.error

    def map(self) -> None:
        """Map the memory that the engine rank on this rank's GPU has published for the push."""
        if self.place is not None:
            member, position = self.place
            addresses = self.rendezvous[member].read_memory(position, self.number)
            memory, sums = map(mapped_memory, addresses)
            self._mapped = memory, sums.view(torch.int64)

    def begin(self, push: int) -> None:
        """Prepare the payloads of a push."""
        self._memory_payloads: dict[PayloadId, MemoryPayload] = {}
        if self._mapped is not None:
            assert self._receives is not None, "receive_for() comes first"
            (table, deliveries), (memory, sums) = self._receives, self._mapped
            self._arriving = ArrivingPayloads(table, deliveries, table.buffer(memory, push), sums)

    def unmap(self) -> None:
        """Let go of the engine rank's memory."""
        self._mapped, self._arriving, self._memory_payloads = None, None, {}

    def memory_payload(self, payload: PayloadId) -> MemoryPayload:
        """Return the place, in the memory of the engine rank on this rank's GPU, of a payload that
        it receives or relays."""
        if payload not in self._memory_payloads:
            assert self._arriving is not None, "map() and begin() come first"
            if payload.sender is None and (payload.member, payload.position) == self.place:
                self._memory_payloads[payload] = self._arriving.own_payload()
            else:
                source = Relay(payload.member) if payload.sender is None else payload.sender
                self._memory_payloads[payload] = self._arriving.payload(source)
        return self._memory_payloads[payload]

    def copy(self, payloads: LinkPayloads, device: torch.device) -> None:
        """Copy what this rank holds itself for an engine rank on its GPU."""
        for payload in self.copies:
            source = payloads[payload.member, payload.position]
            target = self.memory_payload(payload)
            for start in range(0, source.num_bytes, ENTRY_BYTES):
                end = min(start + ENTRY_BYTES, source.num_bytes)
                packed = torch.empty(end - start, dtype=torch.uint8, device=device)
                source.pack(start, end, packed)
                target.unpack(start, end, packed)

    def mark_written(self) -> None:
        """Write the push's number behind the checksums of the engine rank's memory."""
        if self._mapped is not None:
            self._mapped[1][-1] = self.number

    def report_failure(self, error: Exception) -> Failure:
        """Report why the set's push broke, and return the failure that was reported first."""
        if isinstance(error, SetFailed):
            return error.failure
        text = f"trainer rank {self.rank}: {type(error).__name__}: {error}"
        try:
            if self.communicator is not None and isinstance(error, (NCCLError, TimeoutError)):
                names = self.ordered.names(self.index)
                return self.rendezvous[0].find_cause(names, self.number, text)
            return self.rendezvous[0].report(Failure(text))
        except RuntimeError:  # the store is lost
            return Failure(text)

    def close(self) -> None:
        """Abort the set's communicator, if it was made."""
        if self.communicator is not None:
            self.communicator.abort(RuntimeError("the set is disconnected"))


LinkPayloads = Mapping[tuple[int, int], SlicesPayload]
"""What is sent over each link of a set, by (member, position)."""


class RoundSender:
    """Sends the payloads of trainer rank `rank` of `world_size`. Every method is called on all
    trainer ranks with the same sets, in the same order.

    Args:
        store: the trainer's store, through which its ranks agree on what has failed.
        rank: this trainer rank, from 0.
        world_size: the number of trainer ranks."""

    def __init__(self, store: Store, rank: int, world_size: int):
        self._store, self._rank, self._world_size = store, rank, world_size
        self._together = PrefixStore("trainers", store)
        self._num_agreements = 0
        self._own: Communicator | None = None
        """The communicator of all trainer ranks."""
        self._streams: PushStreams | None = None

    def connect(self, sets: Mapping[str, SetRounds]) -> dict[str, Exception]:
        """Create the communicators of these sets, all at once; return the errors by set."""
        errors: dict[str, Exception] = {}
        for call in (SetRounds.begin_connect, SetRounds.connect):
            for name, rounds in sets.items():
                if name not in errors:
                    try:
                        call(rounds)
                    except EXPECTED_ERRORS as error:
                        errors[name] = error
        return errors

    def send(
        self, push: int, sets: Mapping[str, tuple[SetRounds, LinkPayloads]]
    ) -> dict[str, Failure]:
        """Send a push to these sets, and return the failures by set."""
        present, failures = dict(sets), dict[str, Failure]()
        try:
            for name in self._agree({name: each for name, (each, _) in sets.items()}):
                present.pop(name)
                failures[name] = sets[name][0].report_failure(RuntimeError("an engine is gone"))
            self._send(push, present)
        except EXPECTED_ERRORS as error:
            for rounds, _ in present.values():
                self._communicator(rounds).abort(error)
        for name, (rounds, _) in present.items():
            if (failed := self._communicator(rounds).error) is not None:
                failures[name] = rounds.report_failure(failed)
        for rounds, _ in sets.values():
            rounds.unmap()
        return failures

    def close(self) -> None:
        """Abort this rank's own communicator, if it was made."""
        if self._own is not None:
            self._own.abort(RuntimeError("the trainer closes"))

    def _communicator(self, rounds: SetRounds) -> Communicator:
        found = rounds.communicator or self._own
        assert found is not None, "_agree() comes first"
        return found

    def _agree(self, sets: Mapping[str, SetRounds]) -> list[str]:
        """Have the memory of the engine ranks for which trainer ranks receive mapped, and the
        trainer's own communicator made where it is needed and missing. Return the sets whose
        engines have not published theirs, the same on all ranks."""
        shared = {
            name: each for name, each in sets.items() if each.ordered.has_shared_gpus(each.index)
        }
        if not shared:
            return []
        for rounds in shared.values():
            try:
                rounds.map()
            except EXPECTED_ERRORS as error:
                rounds.report_failure(error)
        seconds = next(iter(shared.values())).rendezvous[0].push_seconds
        self._num_agreements += 1
        number, together = self._num_agreements, self._together
        if self._own is None or self._own.error is not None:
            together.set(f"new/{number}", "1")
        if together.add(f"ready/{number}", 1) == self._world_size:  # the last decides for all
            failed = [name for name, each in shared.items() if each.rendezvous[0].has_failed()]
            decided = failed, together.check([f"new/{number}"])
            together.set(f"agreed/{number}", msgspec.msgpack.encode(decided))  # type: ignore[arg-type]
        wait_for_keys(together, [f"agreed/{number}"], seconds)
        encoded = together.get(f"agreed/{number}")
        left_out, is_new = msgspec.msgpack.decode(encoded, type=tuple[list[str], bool])
        if is_new:
            self.close()
            own = TrainerRendezvous(self._store, f"trainers.{number}", seconds)
            self._own = Communicator(own, self._rank, self._world_size)
            self._own.begin()
            self._own.wait_settled()
        assert self._own is not None
        self._own.set_limit(seconds)
        return left_out

    def _send(self, push: int, sets: Mapping[str, tuple[SetRounds, LinkPayloads]]) -> None:
        """Run this rank's rounds, and show the engine rank on its GPU when all is there."""
        if self._streams is None:
            self._streams = PushStreams(torch.cuda.current_device())
        streams = self._streams
        streams.copies_follow()
        for rounds, payloads in sets.values():
            rounds.begin(push)
            if rounds.communicator is not None:
                rounds.communicator.set_limit(rounds.rendezvous[0].push_seconds)
            with streams.copying():
                rounds.copy(payloads, streams.device)
        entering, relayed = (
            self._rounds(sets, is_relayed=is_relayed) for is_relayed in (False, True)
        )
        runner = RoundRunner(streams, [*entering, *relayed])
        runner.run(entering)
        runner.run(relayed)
        for rounds, _ in sets.values():
            if self._communicator(rounds).error is None:
                with streams.copying():
                    rounds.mark_written()
                self._communicator(rounds).wait(streams.copies_ended())

    def _rounds(
        self, sets: Mapping[str, tuple[SetRounds, LinkPayloads]], *, is_relayed: bool
    ) -> list[Round]:
        """Return this rank's rounds of all sets in one order."""
        found: dict[tuple[int, int, int], Round] = {}
        for rounds, payloads in sets.values():
            communicator = self._communicator(rounds)
            group = 1 + rounds.index if rounds.communicator is not None else 0
            for call in rounds.calls:
                if call.is_relayed != is_relayed:
                    continue
                key = call.round, rounds.ordered.number, group
                each = found.get(key) or Round(communicator, None, None)
                is_own = call.is_send and call.payload.sender is not None
                place = call.payload.member, call.payload.position
                payload = payloads[place] if is_own else rounds.memory_payload(call.payload)
                transfer = Transfer(call.peer, payload, *payload.extent(call.number, call.count))
                if call.is_send:
                    found[key] = each._replace(sent=transfer)
                else:
                    found[key] = each._replace(received=transfer)
        return [found[key] for key in sorted(found)]
