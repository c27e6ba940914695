"""Who waits for whom on null GPUs: calls that wait for each other in a circle, or for a rank that
has ended, named by ranks.

A stream waits for a call of NCCL, which waits for the peer's call, which may be queued on a stream
behind another call; a stream waits for an event or the default stream. A circle of these can only
be ended by an abort. Where a peer has not issued its call and a thread of its process is blocked in
a wait of the host, that wait counts as a link too: `through_host` says so, as another thread of
that process may still issue it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.null_gpu.segment_records import Call, Process, Wait, read

Node = tuple[int, int]
"""A stream's pid and number; a process's host is its pid and -1."""


@dataclass
class Cycle:
    """Calls and waits each of which waits for the next, and the last for the first."""

    links: list[Call | Wait] = field(default_factory=list)

    @property
    def through_host(self) -> bool:
        return any(isinstance(link, Wait) for link in self.links)

    def __str__(self) -> str:
        return "these wait for each other in a circle:\n" + "\n".join(f"  {a}" for a in self.links)


class WaitGraph:
    """Who waits for whom."""

    def __init__(self, processes: list[Process]) -> None:
        self.started: dict[Node, list[Call]] = {}
        self.by_name: dict[tuple[int, int], list[Call]] = {}
        self.processes = {process.pid: process for process in processes}
        for process in processes:
            for call in process.calls:
                self.by_name.setdefault((call.comm, call.number), []).append(call)
                if call.has_started:
                    self.started.setdefault((call.pid, call.stream), []).append(call)

    def edges(self, node: Node) -> Iterator[tuple[Call | Wait | None, Node]]:
        """Yield whom a stream or a host waits for, and by what; None: by its place in a queue."""
        pid, stream = node
        process = self.processes[pid]
        if stream < 0:
            for wait in process.waits:
                if wait.stream >= 0:
                    yield wait, (pid, wait.stream)
        elif stream in process.behind:
            yield None, (pid, process.behind[stream])
        for call in self.started.get(node, []):
            answers = [c for c in self.by_name[call.comm, call.number] if c.answers(call)]
            for answer in answers:
                if not answer.has_started:
                    yield call, (answer.pid, answer.stream)
            came = {answer.rank for answer in answers} | {call.rank}
            for other in self.processes.values():
                for comm, rank in other.members:
                    is_wanted = rank == call.peer if call.peer is not None else rank not in came
                    if comm == call.comm and is_wanted and rank not in came:
                        yield call, (other.pid, -1)

    def cycle(self) -> Cycle | None:
        """Return one, without a host where there is such a one."""
        for with_hosts in (False, True):
            finished_nodes: set[Node] = set()
            for node in self.started:
                if cycle := self._cycle_from(node, [], {}, finished_nodes, with_hosts=with_hosts):
                    return cycle
        return None

    def _cycle_from(
        self, node, labels, places, finished_nodes, *, with_hosts: bool
    ) -> Cycle | None:
        if node in places:
            links = [label for label in labels[places[node] :] if label is not None]
            # Streams alone cannot wait in a circle; what they wait for is read one after another.
            return Cycle(links) if links else None
        if node in finished_nodes:
            return None
        places[node] = len(labels)
        for label, neighbour in self.edges(node):
            if neighbour[1] >= 0 or with_hosts:
                cycle = self._cycle_from(
                    neighbour, [*labels, label], places, finished_nodes, with_hosts=with_hosts
                )
                if cycle:
                    return cycle
        del places[node]
        finished_nodes.add(node)
        return None


def find_cycle(segment: Path) -> Cycle | None:
    """Return calls that wait for each other, if there are any now."""
    return WaitGraph(read(segment)).cycle()


def abandoned_calls(processes: list[Process]) -> list[Call]:
    """Return calls that wait for a rank that has ended or left the communicator."""
    members = {member for process in processes for member in process.members}
    calls = [call for process in processes for call in process.calls if call.has_started]
    sizes = {comm: size for process in processes for comm, size in process.sizes.items()}
    return [
        call
        for call in calls
        for peer in ([call.peer] if call.peer is not None else range(sizes.get(call.comm, 0)))
        if (call.comm, peer) not in members
    ]


def find_stuck(segment: Path) -> str | None:
    """Return a text that names calls that wait for each other, or for ranks that have ended."""
    processes = read(segment)
    if cycle := WaitGraph(processes).cycle():
        return str(cycle)
    abandoned = abandoned_calls(processes)
    lines = ["these wait for ranks that have ended:", *(f"  {call}" for call in abandoned)]
    return "\n".join(lines) if abandoned else None
