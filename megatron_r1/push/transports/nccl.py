"""Both ends over NCCL: the receive buffer is on the engine rank's GPU, and a push travels in the
rounds that the plan has (`matching.rounds`). The trainer ranks' part is in `round_sender`.

An engine rank with a GPU of its own is a rank of its set's communicator: a thread runs its rounds
(`nccl_rounds`), checks what trainer ranks sent before it relays that, and then what others relayed.
An engine rank on a trainer rank's GPU is in no communicator: it publishes CUDA's inter-process
handles of its memory, the trainer rank writes all of a push there, and behind it the push's number.
"""

import contextlib
import time
from collections.abc import Iterator

import torch

from megatron_r1.push.protocol import PublishedTransfer, RankRounds, RelaySource
from megatron_r1.push.transports.base import Sender, gpu_uuid
from megatron_r1.push.transports.cuda_ipc import export_ipc_handle
from megatron_r1.push.transports.nccl_communicator import LONGEST_PAUSE, Communicator, NCCLError
from megatron_r1.push.transports.nccl_rounds import (
    BucketTransfer,
    PushRound,
    PushStreams,
    RoundRunner,
)
from megatron_r1.push.transports.payloads import BufferPayload, PayloadReceiver

CLOSE_SECONDS = 5.0
"""How long `close` waits for the thread that receives."""
CHECK_SECONDS = 0.5
"""Seconds between two checks whether the push has failed, while the trainer rank on this engine
rank's GPU writes it."""


class NCCLReceiver(PayloadReceiver):
    """An engine rank's end. Where `allocates_per_push`, its memory is allocated when a push begins
    and freed once that is loaded; between pushes the engine's KV cache, which sleeps during a push,
    is there.

    Run on null GPUs only (tests/nullgpu)."""

    uses_weighted_sum = True

    def prepare(self) -> None:
        """Find this process's GPU, by whose UUID the plan knows it."""
        # The current device of this thread, vLLM's: in the receiving thread it is GPU 0.
        self._gpu = torch.cuda.current_device()
        self.device = torch.device("cuda", self._gpu)
        self.address = gpu_uuid(self._gpu)  # by which the plan finds the trainer rank there
        self._push_number_in_set = self._answered_push = 0
        """Numbers, counted in this set, of the push that this rank receives or waits for, and of
        the last push in which it has answered the question whether it is alive."""

    def allocate(self) -> torch.Tensor:
        """Return GPU memory for all buffers, or none yet where it is allocated per push."""
        if self.allocates_per_push:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        with self._memory_error():
            return torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)

    def allocate_push_memory(self) -> None:
        """Allocate the memory if it is not."""
        with self._memory_error():
            if self.memory.numel() < self.num_bytes:
                size = self.num_bytes
                self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
                self.received_chunks.memory = self.memory
            elif not (storage := self.memory.untyped_storage()).nbytes():
                storage.resize_(self.num_bytes)

    def free_memory(self) -> None:
        """Free memory that is allocated per push, views of it included."""
        if self.allocates_per_push and hasattr(self, "memory"):
            # Its storage, because views may be left, which would keep it allocated. What they show
            # is not used any more.
            self.memory.untyped_storage().resize_(0)
            torch.cuda.empty_cache()

    def connect(self) -> None:
        """Start the thread that takes part in every round."""
        # Behind the checksums: the number of the last push that is all there.
        self.checksums = torch.zeros(self.num_chunks + 1, dtype=torch.int64, device=self.device)
        self.start_thread(self._receive_pushes, self.rounds, name="push")

    def close(self) -> None:
        """Fail the push under way, join the threads and free memory that is allocated per push."""
        self.is_closing = True
        self.publish_closing(self._push_number_in_set)
        self.join_threads(CLOSE_SECONDS)
        if not self.is_running:
            self.free_memory()  # after a push that broke off

    def _receive_pushes(self, rounds: RankRounds | None) -> None:
        """Receive push after push, until one fails or this end closes."""
        communicator: Communicator | None = None
        try:
            streams = PushStreams(self._gpu)
            if rounds is not None:
                rank, num_ranks = rounds.rank, rounds.num_ranks
                communicator = Communicator(self.rendezvous, rank, num_ranks, self._check_set)
                communicator.create()
                communicator.wait_ready()
                self._raise_error(communicator)
            connection = self.rendezvous.new_connection()
            while True:
                self._push_number_in_set += 1  # `close` reads it after it has set `is_closing`
                if self.is_closing:
                    return
                push_number = self.rendezvous.wait_push_begun(self._push_number_in_set, connection)
                if not push_number:
                    self.rendezvous.raise_failure()
                    raise RuntimeError("a rank of the set has closed")
                try:
                    self.allocate_push_memory()
                except ValueError as error:  # a ValueError of a push is damage
                    raise RuntimeError(str(error)) from error
                if communicator is None or rounds is None:
                    self._receive_from_colocated(push_number, streams)
                else:
                    communicator.set_timeout(self.rendezvous.push_timeout_seconds)
                    self._run_rounds(push_number, streams, communicator, rounds)
                    self.rendezvous.publish_alive(self.name, self._push_number_in_set)
                if self.rendezvous.num_members > 1:
                    self.rendezvous.publish_complete(push_number)
        except Exception as error:  # noqa: BLE001 - raised by the push that waits
            if communicator is not None:
                communicator.abort(error)
            if not self.is_closing:
                rank_ids = rounds.rank_ids if rounds is not None else ()
                is_lost = isinstance(error, (NCCLError, TimeoutError))
                self.fail_set(error, rank_ids if is_lost else None, self._push_number_in_set)
        finally:
            if communicator is not None:
                communicator.abort(RuntimeError(f"engine rank {self.name} closes"))

    def _run_rounds(
        self, push_number: int, streams: PushStreams, communicator: Communicator, rounds: RankRounds
    ) -> None:
        """Run this rank's part of a push, and check it."""
        streams.order_copies_after_current()
        receiver = self.receive_payloads(push_number)
        relay_payload = receiver.relay_payload()
        payloads = {source: receiver.payload(source) for source in _payload_sources(rounds)}

        def bound(transfer: PublishedTransfer, payload: BufferPayload) -> BucketTransfer:
            start, end = payload.bucket_range(transfer.number, transfer.count)
            return BucketTransfer(transfer.peer, payload, start, end)

        scatter, relay = (
            [
                PushRound(
                    communicator,
                    None if send is None else bound(send, relay_payload),
                    None if receive is None else bound(receive, payloads[_payload_source(receive)]),
                )
                for send, receive in pairs
            ]
            for pairs in (rounds.scatter, rounds.relay)
        )
        runner = RoundRunner(streams, [*scatter, *relay])
        runner.run(scatter)
        self._raise_error(communicator)
        with streams.copy_stream():  # in which nothing waits for another rank
            self.verify_checksums(push_number, self.senders)
        if self.senders:  # what is damaged is not relayed
            self.received_chunks.wait(push_number, 0.0, self.senders)
        runner.run(relay)
        self._raise_error(communicator)
        relays = [
            source for source in self.received_chunks.chunks if isinstance(source, RelaySource)
        ]
        with streams.copy_stream():
            self.verify_checksums(push_number, relays)

    def _receive_from_colocated(self, push_number: int, streams: PushStreams) -> None:
        """Receive a push from the trainer rank on this GPU, which writes all of it into this rank's
        memory, and check it."""
        with streams.copy_stream():
            self.checksums.zero_()
            self._is_written()  # waits until these are
        addresses = [export_ipc_handle(self.memory), export_ipc_handle(self.checksums)]
        self.rendezvous.publish_memory(self.engine_rank, self._push_number_in_set, addresses)
        deadline = time.monotonic() + self.rendezvous.push_timeout_seconds
        checked_at = 0.0
        with streams.copy_stream():
            while not self._is_written():
                now = time.monotonic()
                if now > checked_at + CHECK_SECONDS:
                    checked_at = now
                    self.rendezvous.raise_failure()
                if now > deadline:
                    raise TimeoutError("the trainer rank on this GPU has not sent all of it")
                time.sleep(LONGEST_PAUSE)
            self.verify_checksums(push_number, list(self.received_chunks.chunks))

    def _is_written(self) -> bool:
        """Return whether the trainer rank has written all of the push that is under way."""
        return int(self.checksums[-1]) == self._push_number_in_set

    def _check_set(self) -> None:
        """Raise the failure of the set; publish that this rank is alive where another asks."""
        if self.is_closing:
            raise RuntimeError(f"engine rank {self.name} closes")
        self.rendezvous.raise_failure()
        if self._push_number_in_set > self._answered_push and self.rendezvous.is_alive_requested(
            self._push_number_in_set
        ):
            self.rendezvous.publish_alive(self.name, self._push_number_in_set)
            self._answered_push = self._push_number_in_set

    @staticmethod
    def _raise_error(communicator: Communicator) -> None:
        if communicator.error is not None:
            raise communicator.error

    @contextlib.contextmanager
    def _memory_error(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"push.transport: nccl: {self.num_bytes / 2**30:.3g} GiB are needed on the "
                "engine's GPU for weights in transit; lower rollout.gpu_memory, give each engine "
                "more GPUs, or set push.transport: gloo"
            ) from error


def _payload_sources(rounds: RankRounds) -> set[int | RelaySource]:
    pairs = [*rounds.scatter, *rounds.relay]
    return {_payload_source(receive) for _, receive in pairs if receive is not None}


def _payload_source(transfer: PublishedTransfer) -> int | RelaySource:
    return transfer.source if transfer.source >= 0 else RelaySource(-1 - transfer.source)


class NCCLSender(Sender):
    """The sending end of a link: its chunks."""
