"""A trainer rank's part of pushes over NCCL: it sends the payloads of its links round by round
(`push_schedule`).

Where engine ranks are on trainer ranks' GPUs, it also receives for the one on its own, into memory
that both have mapped.

A rank whose wait fails (`transports.nccl_communicator`) aborts its communicator and finds out which
engine ranks have died; the sets of other communicators go on. The trainer ranks' own communicator
is made for the first push that needs it, and again after one that failed; all agree on that before
a push."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch.distributed import PrefixStore, Store

from megatron_r1.push.control_messages import EngineSetFailure
from megatron_r1.push.matching.rounds import SCATTER_BUCKET_BYTES
from megatron_r1.push.protocol import EngineRankChunks, ReceiverInfo, RelaySource, chunks_to
from megatron_r1.push.push_schedule import PayloadId, PushSchedule
from megatron_r1.push.rendezvous import (
    ENGINE_SET_FAILURE_ERRORS,
    EngineSetFailedError,
    TrainerRendezvous,
    wait_for_keys,
)
from megatron_r1.push.slots import SlotTable, TensorChunk
from megatron_r1.push.transports.cuda_ipc import open_ipc_handle
from megatron_r1.push.transports.nccl_communicator import Communicator, NCCLError
from megatron_r1.push.transports.nccl_rounds import (
    BucketTransfer,
    PushRound,
    PushStreams,
    RoundRunner,
)
from megatron_r1.push.transports.payloads import (
    BufferPayload,
    LinkPayload,
    Payload,
    ReceivePayloads,
)


@dataclass
class EngineSetRounds:
    """The part of trainer rank `rank` in the pushes to one set.

    Attributes:
        rendezvous: this rank's rendezvous with each engine of the set.
        schedule: the rounds of all sets that were connected together.
        engine_set_index: the number of the set in `schedule`.
        rank: the trainer rank.
        communicator: the set's communicator, if it has one.
        push_number_in_set: the latest push, by its number in the set; 0 before the first."""

    rendezvous: list[TrainerRendezvous]
    schedule: PushSchedule
    engine_set_index: int
    rank: int
    communicator: Communicator | None = None
    push_number_in_set: int = 0

    def __post_init__(self) -> None:
        self._colocated = self.schedule.colocated_engine_rank(self.engine_set_index, self.rank)
        """(member, engine rank) of the engine rank on this rank's GPU."""
        self._receive_plan: (
            tuple[SlotTable, Mapping[int | RelaySource, Sequence[TensorChunk]]] | None
        ) = None
        """Its table, and the chunks to it by source."""
        self._mapped_memory: tuple[torch.Tensor, torch.Tensor] | None = None
        """During a push, the memory of that rank, and that of the checksums, behind which is room
        for the push's number."""
        self._receive_payloads: ReceivePayloads | None = None
        self.transfers = [
            transfer
            for transfer in self.schedule.transfers(self.rank)
            if transfer.payload_id.engine_set_index == self.engine_set_index
        ]
        self.local_copies = [
            payload_id
            for payload_id in self.schedule.local_copies(self.rank)
            if payload_id.engine_set_index == self.engine_set_index
        ]

    def is_on_gpu_of(self, engine_rank: int) -> bool:
        """Return whether that rank of an engine of the set is on this trainer rank's GPU."""
        return self._colocated is not None and self._colocated[1] == engine_rank

    def prepare_receive(self, receivers: Sequence[ReceiverInfo], plan: EngineRankChunks) -> None:
        """Prepare to receive for the engine rank on this rank's GPU.

        Args:
            receivers: table and address of the equal ranks of all engines, by member.
            plan: the chunks to these ranks."""
        assert self._colocated is not None, "is_on_gpu_of() is True"
        member, _ = self._colocated
        self._receive_plan = receivers[member].table, chunks_to(plan, member)

    def create_communicator(self) -> None:
        """Begin to create the set's communicator, if it has one."""
        if communicator_size := self.schedule.communicator_size(self.engine_set_index):
            self.communicator = Communicator(self.rendezvous[0], self.rank, communicator_size)
            self.communicator.create()

    def connect(self) -> None:
        """Wait until the set's communicator is there.

        Raises:
            Exception: why the communicator is not there.
        """
        if self.communicator is not None and not self.communicator.wait_ready():
            assert self.communicator.error is not None
            raise self.communicator.error

    def map_memory(self) -> None:
        """Map the memory that the engine rank on this rank's GPU has published for the push."""
        if self._colocated is not None:
            member, engine_rank = self._colocated
            addresses = self.rendezvous[member].read_memory(engine_rank, self.push_number_in_set)
            memory, checksums = map(open_ipc_handle, addresses)
            self._mapped_memory = memory, checksums.view(torch.int64)

    def prepare_payloads(self, push_number: int) -> None:
        """Prepare the payloads of a push."""
        self._buffer_payloads: dict[PayloadId, BufferPayload] = {}
        if self._mapped_memory is not None:
            assert self._receive_plan is not None, "prepare_receive() comes first"
            (table, chunks), (memory, checksums) = self._receive_plan, self._mapped_memory
            self._receive_payloads = ReceivePayloads(
                table, chunks, table.buffer(memory, push_number), checksums
            )

    def unmap_memory(self) -> None:
        """Unmap the engine rank's memory."""
        self._mapped_memory, self._receive_payloads, self._buffer_payloads = None, None, {}

    def buffer_payload(self, payload_id: PayloadId) -> BufferPayload:
        """Return a payload that the engine rank on this rank's GPU receives or relays, in its
        memory."""
        if payload_id not in self._buffer_payloads:
            assert self._receive_payloads is not None, (
                "map_memory() and prepare_payloads() come first"
            )
            if (
                payload_id.trainer_rank is None
                and (payload_id.member, payload_id.engine_rank) == self._colocated
            ):
                self._buffer_payloads[payload_id] = self._receive_payloads.relay_payload()
            else:
                source = (
                    RelaySource(payload_id.member)
                    if payload_id.trainer_rank is None
                    else payload_id.trainer_rank
                )
                self._buffer_payloads[payload_id] = self._receive_payloads.payload(source)
        return self._buffer_payloads[payload_id]

    def copy_local_payloads(self, payloads: LinkPayloads, device: torch.device) -> None:
        """Copy what this rank holds itself for an engine rank on its GPU."""
        for payload_id in self.local_copies:
            source = payloads[payload_id.member, payload_id.engine_rank]
            target = self.buffer_payload(payload_id)
            for start in range(0, source.num_bytes, SCATTER_BUCKET_BYTES):
                end = min(start + SCATTER_BUCKET_BYTES, source.num_bytes)
                packed_bytes = torch.empty(end - start, dtype=torch.uint8, device=device)
                source.pack(start, end, packed_bytes)
                target.unpack(start, end, packed_bytes)

    def write_push_number(self) -> None:
        """Write the push's number behind the checksums of the engine rank's memory."""
        if self._mapped_memory is not None:
            self._mapped_memory[1][-1] = self.push_number_in_set

    def report_failure(self, error: Exception) -> EngineSetFailure:
        """Report why the set's push broke, and return the failure that was reported first."""
        if isinstance(error, EngineSetFailedError):
            return error.failure
        text = f"trainer rank {self.rank}: {type(error).__name__}: {error}"
        try:
            if self.communicator is not None and isinstance(error, (NCCLError, TimeoutError)):
                rank_ids = self.schedule.communicator_rank_ids(self.engine_set_index)
                return self.rendezvous[0].diagnose_failure(rank_ids, self.push_number_in_set, text)
            return self.rendezvous[0].publish_failure(EngineSetFailure(text))
        except RuntimeError:  # the store is lost
            return EngineSetFailure(text)

    def close(self) -> None:
        """Abort the set's communicator, if it was made."""
        if self.communicator is not None:
            self.communicator.abort(RuntimeError("the set is disconnected"))


LinkPayloads = Mapping[tuple[int, int], LinkPayload]
"""What is sent over each link of a set, by (member, engine rank)."""


class RoundSender:
    """Sends the payloads of trainer rank `rank` of `world_size`. Every method is called on all
    trainer ranks with the same sets, in the same order.

    Args:
        store: the trainer's store, through which its ranks agree on what has failed.
        rank: this trainer rank, from 0.
        world_size: the number of trainer ranks."""

    def __init__(self, store: Store, rank: int, world_size: int):
        self._store, self._rank, self._world_size = store, rank, world_size
        self._trainer_store = PrefixStore("trainers", store)
        self._num_agreements = 0
        self._trainer_communicator: Communicator | None = None
        """The communicator of all trainer ranks."""
        self._streams: PushStreams | None = None

    def connect(self, sets: Mapping[str, EngineSetRounds]) -> dict[str, Exception]:
        """Create the communicators of these sets, all at once; return the errors by set."""
        errors: dict[str, Exception] = {}
        for call in (EngineSetRounds.create_communicator, EngineSetRounds.connect):
            for name, engine_set_rounds in sets.items():
                if name not in errors:
                    try:
                        call(engine_set_rounds)
                    except ENGINE_SET_FAILURE_ERRORS as error:
                        errors[name] = error
        return errors

    def send(
        self, push_number: int, sets: Mapping[str, tuple[EngineSetRounds, LinkPayloads]]
    ) -> dict[str, EngineSetFailure]:
        """Send a push to these sets, and return the failures by set."""
        sending_sets, failures = dict(sets), dict[str, EngineSetFailure]()
        try:
            for name in self._map_and_agree(
                {name: engine_set_rounds for name, (engine_set_rounds, _) in sets.items()}
            ):
                sending_sets.pop(name)
                failures[name] = sets[name][0].report_failure(RuntimeError("an engine is gone"))
            self._run_push_rounds(push_number, sending_sets)
        except ENGINE_SET_FAILURE_ERRORS as error:
            for engine_set_rounds, _ in sending_sets.values():
                self._communicator_of_set(engine_set_rounds).abort(error)
        for name, (engine_set_rounds, _) in sending_sets.items():
            if (failure := self._communicator_of_set(engine_set_rounds).error) is not None:
                failures[name] = engine_set_rounds.report_failure(failure)
        for engine_set_rounds, _ in sets.values():
            engine_set_rounds.unmap_memory()
        return failures

    def close(self) -> None:
        """Abort this rank's own communicator, if it was made."""
        if self._trainer_communicator is not None:
            self._trainer_communicator.abort(RuntimeError("the trainer closes"))

    def _communicator_of_set(self, engine_set_rounds: EngineSetRounds) -> Communicator:
        communicator = engine_set_rounds.communicator or self._trainer_communicator
        assert communicator is not None, "_map_and_agree() comes first"
        return communicator

    def _map_and_agree(self, sets: Mapping[str, EngineSetRounds]) -> list[str]:
        """Map the memory of the engine ranks for which trainer ranks receive, and create the
        trainer's own communicator where it is needed and missing. Return the sets whose engines
        have not published their memory, the same on all ranks."""
        shared_sets = {
            name: engine_set_rounds
            for name, engine_set_rounds in sets.items()
            if engine_set_rounds.schedule.has_shared_gpus(engine_set_rounds.engine_set_index)
        }
        if not shared_sets:
            return []
        for engine_set_rounds in shared_sets.values():
            try:
                engine_set_rounds.map_memory()
            except ENGINE_SET_FAILURE_ERRORS as error:
                engine_set_rounds.report_failure(error)
        seconds = next(iter(shared_sets.values())).rendezvous[0].push_timeout_seconds
        self._num_agreements += 1
        number, trainer_store = self._num_agreements, self._trainer_store
        if self._trainer_communicator is None or self._trainer_communicator.error is not None:
            trainer_store.set(f"new/{number}", "1")
        if trainer_store.add(f"ready/{number}", 1) == self._world_size:  # the last decides for all
            failed_names = [
                name
                for name, engine_set_rounds in shared_sets.items()
                if engine_set_rounds.rendezvous[0].has_failed()
            ]
            decision = failed_names, trainer_store.check([f"new/{number}"])
            trainer_store.set(f"agreed/{number}", msgspec.msgpack.encode(decision))  # type: ignore[arg-type]
        wait_for_keys(trainer_store, [f"agreed/{number}"], seconds)
        encoded_decision = trainer_store.get(f"agreed/{number}")
        left_out, is_new = msgspec.msgpack.decode(encoded_decision, type=tuple[list[str], bool])
        if is_new:
            self.close()
            trainer_rendezvous = TrainerRendezvous(self._store, f"trainers.{number}", seconds)
            self._trainer_communicator = Communicator(
                trainer_rendezvous, self._rank, self._world_size
            )
            self._trainer_communicator.create()
            self._trainer_communicator.wait_ready()
        assert self._trainer_communicator is not None
        self._trainer_communicator.set_timeout(seconds)
        return left_out

    def _run_push_rounds(
        self, push_number: int, sets: Mapping[str, tuple[EngineSetRounds, LinkPayloads]]
    ) -> None:
        """Run this rank's rounds, and tell the engine rank on its GPU when all is there."""
        if self._streams is None:
            self._streams = PushStreams(torch.cuda.current_device())
        streams = self._streams
        streams.order_copies_after_current()
        for engine_set_rounds, payloads in sets.values():
            engine_set_rounds.prepare_payloads(push_number)
            if engine_set_rounds.communicator is not None:
                engine_set_rounds.communicator.set_timeout(
                    engine_set_rounds.rendezvous[0].push_timeout_seconds
                )
            with streams.copy_stream():
                engine_set_rounds.copy_local_payloads(payloads, streams.device)
        scatter, relay = (
            self._ordered_rounds(sets, is_relayed=is_relayed) for is_relayed in (False, True)
        )
        runner = RoundRunner(streams, [*scatter, *relay])
        runner.run(scatter)
        runner.run(relay)
        for engine_set_rounds, _ in sets.values():
            if self._communicator_of_set(engine_set_rounds).error is None:
                with streams.copy_stream():
                    engine_set_rounds.write_push_number()
                self._communicator_of_set(engine_set_rounds).wait(streams.copies_ended())

    def _ordered_rounds(
        self, sets: Mapping[str, tuple[EngineSetRounds, LinkPayloads]], *, is_relayed: bool
    ) -> list[PushRound]:
        """Return this rank's rounds of all sets in one order."""
        rounds_by_key: dict[tuple[int, int, int], PushRound] = {}
        for engine_set_rounds, payloads in sets.values():
            communicator = self._communicator_of_set(engine_set_rounds)
            group = (
                1 + engine_set_rounds.engine_set_index
                if engine_set_rounds.communicator is not None
                else 0
            )
            for transfer in engine_set_rounds.transfers:
                if transfer.is_relayed != is_relayed:
                    continue
                key = transfer.round, engine_set_rounds.schedule.schedule_number, group
                push_round = rounds_by_key.get(key) or PushRound(communicator, None, None)
                payload: Payload
                payload_id = transfer.payload_id
                if transfer.is_send and payload_id.trainer_rank is not None:
                    payload = payloads[payload_id.member, payload_id.engine_rank]
                else:
                    payload = engine_set_rounds.buffer_payload(payload_id)
                start, end = payload.bucket_range(transfer.number, transfer.count)
                bucket_transfer = BucketTransfer(transfer.peer, payload, start, end)
                if transfer.is_send:
                    rounds_by_key[key] = push_round._replace(sent=bucket_transfer)
                else:
                    rounds_by_key[key] = push_round._replace(received=bucket_transfer)
        return [rounds_by_key[key] for key in sorted(rounds_by_key)]
