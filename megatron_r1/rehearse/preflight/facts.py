"""The measurements of one rank, in the form in which it sends them to rank 0."""

import msgspec

from megatron_r1.models.loaded_libraries import LoadedLibrary

COMPILATIONS = "compilations"
"""The step whose time is told apart: caches keep what it compiles."""


class MemoryUsage(msgspec.Struct):
    """Bytes of a device or a host before the run.

    Attributes:
        total: all bytes.
        free: bytes that nothing holds.
        holders: the largest other processes."""

    total: int
    free: int
    holders: list[str] = []


class LinkRate(msgspec.Struct):
    """The rate of one group: bytes that a rank sends per second."""

    operation: str
    ranks: list[int]
    rate: float


class FolderFacts(msgspec.Struct):
    """The run folder from one rank.

    Attributes:
        error: why it cannot be used, or "".
        shared: whether the file of node 0 is there.
        excluded: whether a lock that rank 0 holds excludes this rank; None where it was not tried.
        write_rate: bytes per second written.
        read_rate: bytes per second read.
        fsync_seconds: median of small files.
        free_bytes: what is left on its disk."""

    error: str = ""
    shared: bool = False
    excluded: bool | None = None
    write_rate: float = 0.0
    read_rate: float = 0.0
    fsync_seconds: float = 0.0
    free_bytes: int = 0


class Compilation(msgspec.Struct):
    """The compilation of one kernel: what its compiler says of a failure, or ""; and its time."""

    error: str
    seconds: float


class TrainerFacts(msgspec.Struct):
    """What a trainer rank of this node would start with.

    Attributes:
        attention: Transformer Engine's choice, with its reason where it is not cuDNN's.
        communicators: in words, those of NCCL that the plan counts for a rank.
        communicator_bytes: what they take of its GPU by the plan.
        fault: why it would refuse to start, or ""."""

    attention: str = ""
    communicators: str = ""
    communicator_bytes: int = 0
    fault: str = ""


class NodeFacts(msgspec.Struct):
    """The measurements of a node's first rank.

    Attributes:
        versions: what must be equal on all nodes, by name.
        memory: the host's.
        ports: setting → why its port cannot be bound.
        unreachable: why rank 0's node cannot be connected to, or "".
        clock_offset: seconds that this node's clock is ahead of rank 0's.
        lookup_seconds: the time to look up the name of rank 0's address.
        sandbox: why programs cannot be graded, or "".
        trainer: what it would start with here; None without a GPU.
        compilations: compiler → how it has compiled; none without a GPU."""

    versions: dict[str, str]
    memory: MemoryUsage
    ports: dict[str, str] = {}
    unreachable: str = ""
    clock_offset: float = 0.0
    lookup_seconds: float = 0.0
    sandbox: str = ""
    trainer: TrainerFacts | None = None
    compilations: dict[str, Compilation] = {}


class RankFacts(msgspec.Struct):
    """The measurements of a rank.

    Attributes:
        rank: its number among all ranks.
        node_index: the number of its node.
        host: the name of its host.
        device: the name of its GPU, or "cpu".
        memory: the memory of the rank's GPU; None without a GPU.
        product_flops: FLOP/s of matrix products.
        links: parallel axis → the rate of the rank's group on that axis.
        pair_rates: rates to the rank of the same number on the neighboring nodes, in bytes per
            second.
        folder: what the rank has found in the run folder, if it has used the folder.
        node: what the rank has found about its node; None but for a node's first rank.
        seconds: step of the preflight → how long it took.
        gloo_rates: like pair_rates, over gloo.
        libraries: the CUDA libraries that the rank has loaded; none without a GPU."""

    rank: int
    node_index: int
    host: str
    device: str
    memory: MemoryUsage | None
    product_flops: float
    links: dict[str, LinkRate]
    pair_rates: list[float]
    folder: FolderFacts
    node: NodeFacts | None
    seconds: dict[str, float]
    gloo_rates: list[float] = []
    libraries: list[LoadedLibrary] = []
