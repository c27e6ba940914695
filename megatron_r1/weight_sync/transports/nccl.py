"""Both ends over NCCL: the receive buffer is on the engine rank's GPU, and a push travels in the
rounds that the plan has (`plan.rounds`). The trainer ranks' part is in `round_sender`.

An engine rank with a GPU of its own is a rank of its set's communicator: a thread runs its rounds
(`round_runner`), checks what has entered before it passes that on, and then what others passed on.
An engine rank on a trainer rank's GPU is in no communicator: it offers its memory through CUDA's
inter-process handles, the trainer rank writes all of a push there, and behind it the push's number.
Either way a push begins with a key in the store, so that no GPU waits for one to begin."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import torch

from megatron_r1.weight_sync.rendezvous import Half, Peer, RankRounds, SetFailed
from megatron_r1.weight_sync.results import IncompletePush
from megatron_r1.weight_sync.table import SlotTable
from megatron_r1.weight_sync.transports.base import Receiver, Sender, gpu_uuid
from megatron_r1.weight_sync.transports.blocks import Landing
from megatron_r1.weight_sync.transports.device_memory import share_memory
from megatron_r1.weight_sync.transports.nccl_library import NcclError
from megatron_r1.weight_sync.transports.round_runner import (
    LONGEST_PAUSE,
    Communicator,
    PushStreams,
    Round,
    RoundRunner,
    Transfer,
)

CLOSE_SECONDS = 5.0
"""How long `close` waits for the thread that receives."""
LOOK_SECONDS = 0.5
"""Seconds between two looks of an engine rank whether a push that it is served has failed."""


class NcclReceiver(Receiver):
    """An engine rank's end. Borrowed memory is allocated when a push begins and freed once it is
    loaded. Between pushes the engine's KV cache has it; the cache sleeps during a push.

    Run on null GPUs only (tests/nullgpu)."""

    is_weighted = True
    _thread: threading.Thread | None = None

    def prepare(self) -> None:
        # The current device of this thread, vLLM's: in the receiving thread it is GPU 0.
        self._gpu = torch.cuda.current_device()
        self.device = torch.device("cuda", self._gpu)
        self.address = gpu_uuid(self._gpu)  # by which the plan finds the trainer rank there
        self._is_closing = False
        self._number = self._answered = 0
        """The set's push that this rank has or waits for, and the last one in which it answered."""

    def allocate(self) -> torch.Tensor:
        if self.borrows_memory:
            return torch.empty(0, dtype=torch.uint8, device=self.device)  # `claim_memory` has it
        with self._memory_error():
            return torch.empty(self._num_bytes, dtype=torch.uint8, device=self.device)

    def claim_memory(self) -> None:
        """Allocate the memory if it is borrowed."""
        with self._memory_error():
            if self.memory.numel() < self._num_bytes:
                size = self._num_bytes
                self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
                self.buffer.memory = self.memory
            elif not (storage := self.memory.untyped_storage()).nbytes():
                storage.resize_(self._num_bytes)

    def free_memory(self) -> None:
        if self.borrows_memory and hasattr(self, "memory"):
            # Its storage, because views may be left, which would keep it allocated. What they show
            # is not used any more.
            self.memory.untyped_storage().resize_(0)
            torch.cuda.empty_cache()

    def reusable_memory(self, table: SlotTable) -> torch.Tensor | None:
        if table != self.table or (self._thread is not None and self._thread.is_alive()):
            return None
        return self.memory

    def connect(self) -> None:
        count = sum(map(len, self.buffer.deliveries.values()))
        # Behind the checksums: the number of the last push that is all there.
        self._sums = torch.zeros(count + 1, dtype=torch.int64, device=self.device)
        self._thread = threading.Thread(
            target=self._receive_pushes, args=(self.rounds,), name="push", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._is_closing = True
        if self._thread is not None:
            if self._thread.is_alive():
                with contextlib.suppress(
                    RuntimeError
                ):  # the trainer, and with it the store, is gone
                    self.rendezvous.report_own(self.rank, "it has closed")
                    self.rendezvous.end_waits(self._number)
            # A thread that is still in a call when the interpreter ends would abort the process.
            self._thread.join(CLOSE_SECONDS)
        if self._thread is None or not self._thread.is_alive():
            self.free_memory()  # after a push that broke off

    @property
    def _num_bytes(self) -> int:
        return self.table.areas * self.table.num_bytes

    @property
    def _name(self) -> str:
        return f"{self.rendezvous.member}/{self.rank}"

    def _receive_pushes(self, rounds: RankRounds | None) -> None:
        """Receive push after push, until one fails or this end closes."""
        communicator: Communicator | None = None
        try:
            streams = PushStreams(self._gpu)
            if rounds is not None:
                rank, size = rounds.rank, rounds.size
                communicator = Communicator(self.rendezvous, rank, size, self._look)
                communicator.begin()
                communicator.wait_settled()
                self._raise_error(communicator)
            connection = self.rendezvous.new_connection()
            while not self._is_closing:
                self._number += 1
                push = self.rendezvous.await_begun(self._number, connection)
                if not push:
                    self.rendezvous.raise_failure()
                    raise RuntimeError("a rank of the set has closed")
                try:
                    self.claim_memory()
                except ValueError as error:  # a ValueError of a push is damage
                    raise RuntimeError(str(error)) from error
                if communicator is None or rounds is None:
                    self._be_served(push, streams)
                else:
                    communicator.set_limit(self.rendezvous.push_seconds)
                    self._run_rounds(push, streams, communicator, rounds)
                    self.rendezvous.answer(self._name, self._number)
                if self.rendezvous.num_members > 1:
                    self.rendezvous.publish_complete(push)
        except Exception as error:  # noqa: BLE001 - raised by the push that waits
            if communicator is not None:
                communicator.abort(error)
            self._fail(error, rounds.names if rounds is not None else ())
        finally:
            if communicator is not None:
                communicator.abort(RuntimeError("it closes"))

    def _run_rounds(
        self, push: int, streams: PushStreams, communicator: Communicator, rounds: RankRounds
    ) -> None:
        """Run this rank's part of a push, and check it."""
        streams.copies_follow()
        landing = self._landing(push)
        own = landing.own_block()
        blocks = {source: landing.block(source) for source in _sources(rounds)}

        def planned(pairs: Sequence[tuple[Half | None, Half | None]]) -> list[Round]:
            found = []
            for send, receive in pairs:
                sent = received = None
                if send is not None:
                    sent = Transfer(send.peer, own, *own.extent(send.number, send.count))
                if receive is not None:
                    block = blocks[_source(receive)]
                    extent = block.extent(receive.number, receive.count)
                    received = Transfer(receive.peer, block, *extent)
                found.append(Round(communicator, sent, received))
            return found

        entering, passing = planned(rounds.entering), planned(rounds.passing)
        runner = RoundRunner(streams, [*entering, *passing])
        runner.run(entering)
        self._raise_error(communicator)
        self._check(push, streams, self.senders)
        if self.senders:  # what is damaged is not passed on
            self.buffer.wait(push, 0.0, self.senders)
        runner.run(passing)
        self._raise_error(communicator)
        peers = [source for source in self.buffer.deliveries if isinstance(source, Peer)]
        self._check(push, streams, peers)

    def _be_served(self, push: int, streams: PushStreams) -> None:
        """Offer the memory to the trainer rank on this GPU, which writes all of a push there, and
        check it."""
        with streams.copying():
            self._sums.zero_()
            self._is_written()  # waits until these are
        addresses = [share_memory(self.memory), share_memory(self._sums)]
        self.rendezvous.offer_memory(self.rank, self._number, addresses)
        deadline = time.monotonic() + self.rendezvous.push_seconds
        looked = 0.0
        with streams.copying():
            while not self._is_written():
                now = time.monotonic()
                if now > looked + LOOK_SECONDS:
                    looked = now
                    self.rendezvous.raise_failure()
                if now > deadline:
                    raise TimeoutError("the trainer rank on this GPU has not sent all of it")
                time.sleep(LONGEST_PAUSE)
        self._check(push, streams, list(self.buffer.deliveries))

    def _is_written(self) -> bool:
        """Return whether the trainer rank has written all of the push that is under way."""
        return int(self._sums[-1]) == self._number

    def _landing(self, push: int) -> Landing:
        area = self.table.area(self.memory, push)
        return Landing(self.table, self.buffer.deliveries, area, self._sums)

    def _check(self, push: int, streams: PushStreams, sources: Sequence[int | Peer]) -> None:
        """Compare what has come from these sources with its checksums."""
        landing = self._landing(push)
        with streams.copying():  # in which nothing waits for another rank
            for source in sources:
                for index, sent in enumerate(landing.block(source).sums.tolist()):
                    self.buffer.delivery_arrived(source, push, index, sent % 2**64)

    def _look(self) -> None:
        """Raise the failure of the set; answer where another rank asks who is alive."""
        if self._is_closing:
            raise RuntimeError("it closes")
        self.rendezvous.raise_failure()
        if self._number > self._answered and self.rendezvous.is_asked(self._number):
            self.rendezvous.answer(self._name, self._number)
            self._answered = self._number

    @staticmethod
    def _raise_error(communicator: Communicator) -> None:
        if communicator.error is not None:
            raise communicator.error

    def _fail(self, error: Exception, names: Sequence[str]) -> None:
        """Report to the set and to this engine that nothing more will arrive. names: the ranks of
        its position that are in the communicator."""
        if self._is_closing:
            return
        rendezvous, text = self.rendezvous, f"{type(error).__name__}: {error}"
        failure: Exception = error
        with contextlib.suppress(RuntimeError):  # the trainer, and with it the store, is gone
            if isinstance(error, SetFailed):
                pass
            elif isinstance(error, (NcclError, TimeoutError)):
                rendezvous.answer(self._name, self._number)
                failure = SetFailed(rendezvous.find_cause(names, self._number, text))
            else:
                is_damaged = isinstance(error, ValueError) and not isinstance(error, IncompletePush)
                failure = SetFailed(rendezvous.report_own(self.rank, text, is_damaged=is_damaged))
        self.buffer.fail(failure)

    @contextlib.contextmanager
    def _memory_error(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"push.transport: nccl: {self._num_bytes / 2**30:.3g} GiB are needed on the "
                "engine's GPU for weights in transit; lower rollout.gpu_memory, give each engine "
                "more GPUs, or set push.transport: gloo"
            ) from error


def _sources(rounds: RankRounds) -> set[int | Peer]:
    pairs = [*rounds.entering, *rounds.passing]
    return {_source(receive) for _, receive in pairs if receive is not None}


def _source(half: Half) -> int | Peer:
    return half.block if half.block >= 0 else Peer(-1 - half.block)


class NcclSender(Sender):
    """The sending end of a link: its deliveries."""

    in_rounds = True
