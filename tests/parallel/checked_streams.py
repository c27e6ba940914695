"""Streams of a GPU on a CPU, with a check of their order.

An operation that reads or writes memory which another stream writes, without an event between them,
is an error.

Operations run where they are launched, as in `models.cpu_patches`; the check holds for every
timing that a GPU could have, not for the one that is seen. Each stream counts its operations, and
has a vector clock: how far of each stream is done before its next operation starts. An event copies
the clock of the stream that it is recorded in, and a stream that waits for it takes the larger
entries. A memory has the operation that wrote it last and those that have read it since; an
operation must come after them by its stream's clock. Not checked: memory that is freed while
another stream uses it."""

import contextlib
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    def __init__(self, *args, **kwargs):
        self.clock: Counter = Counter()

    def wait_stream(self, other: "Stream") -> None:
        self.clock |= other.clock

    def wait_event(self, event: "Event") -> None:
        event.wait(self)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        Streams.host |= self.clock


class Event:
    waits = True
    """False plants the fault that the check must find."""

    def __init__(self, *args, **kwargs):
        self.clock: Counter = Counter()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = Counter((stream or Streams.current).clock)

    def wait(self, stream: Stream | None = None) -> None:
        if Event.waits:
            (stream or Streams.current).wait_stream(self)

    def synchronize(self) -> None:
        Streams.host |= self.clock

    def query(self) -> bool:
        return True


class Streams(TorchDispatchMode):
    """Records every operation in its stream while it is entered; `races` are those out of order.

    `operations` counts those of each stream."""

    current = Stream()
    entered: "Streams | None" = None
    host: Counter = Counter()
    """What the host has waited for: done before anything that it launches."""

    def __init__(self):
        super().__init__()
        self.races: list[str] = []
        self.operations: Counter = Counter()
        self.written: dict[int, tuple[Stream, int, str]] = {}
        self.read: dict[int, dict[Stream, int]] = {}

    @staticmethod
    def install() -> None:
        cuda = torch.cuda
        cuda.Stream, cuda.Event = Stream, Event
        cuda.current_stream = lambda device=None: Streams.current

        @contextlib.contextmanager
        def using(stream: Stream):
            before, Streams.current = Streams.current, stream
            try:
                yield
            finally:
                Streams.current = before

        cuda.stream = using
        resize = torch.UntypedStorage.resize_

        def resized(storage, size):
            # Megatron gives memory back and takes other memory before it computes again.
            out = resize(storage, size)
            if size and (streams := Streams.entered):
                streams.forget(storage.data_ptr())
            return out

        torch.UntypedStorage.resize_ = resized

    def __enter__(self):
        Streams.entered = self
        return super().__enter__()

    def __exit__(self, *exception):
        Streams.entered = None
        return super().__exit__(*exception)

    def forget(self, memory: int) -> None:
        """Take memory that was another tensor's before for new."""
        self.read.pop(memory, None)
        self.written.pop(memory, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        stream = Streams.current
        stream.clock |= Streams.host
        stream.clock[stream] += 1
        self.operations[stream] += 1
        name, schema = str(function), function._schema.arguments
        named = [*zip(schema, args, strict=False)]
        named += [(each, kwargs[each.name]) for each in schema if each.name in kwargs]
        changed = set()
        inputs = set()
        for argument, value in named:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for memory in self._memories(value):
                inputs.add(memory)
                if writes:
                    changed.add(memory)
        if function.namespace == "c10d":  # whose schemas do not say that the first is written
            changed |= set(self._memories(args[0]))
        made = function(*args, **kwargs)
        if "_local_scalar_dense" in name:
            Streams.host |= stream.clock
        if not any(each.alias_info for each in function._schema.returns):
            for memory in set(self._memories(made)) - inputs:
                self.forget(memory)
                self.written[memory] = (stream, stream.clock[stream], name)
        # A view computes nothing.
        if not changed and any(each.alias_info for each in function._schema.returns):
            return made
        for memory in inputs:
            if last := self.written.get(memory):
                self._after(stream, *last[:2], f"{name} after {last[2]}")
        for memory in changed:
            for other, time in self.read.pop(memory, {}).items():
                self._after(stream, other, time, f"{name} writes what is being read")
            self.written[memory] = (stream, stream.clock[stream], name)
        for memory in inputs - changed:
            self.read.setdefault(memory, {})[stream] = stream.clock[stream]
        return made

    def _after(self, stream: Stream, other: Stream, time: int, what: str) -> None:
        if stream.clock[other] < time:
            self.races.append(what)

    @staticmethod
    def _memories(value) -> list[int]:
        tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
        return [t.untyped_storage().data_ptr() for t in tensors if t.untyped_storage().size()]
