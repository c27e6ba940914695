"""Where a rank is: its number among all ranks and in its node, as torchrun gives it."""

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class RankPlacement:
    """A rank and its node; it `is_node_leader` where it is its node's first rank, which checks the
    node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str

    @classmethod
    def from_environment(cls) -> "RankPlacement":
        """Return that of this process, from torchrun's environment variables."""
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", rank))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        return cls(rank, world_size, local, local_world_size, socket.gethostname())

    @property
    def node(self) -> int:
        """The number of this rank's node."""
        return self.rank // self.local_world_size

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return -(-self.world_size // self.local_world_size)

    @property
    def is_node_leader(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.local_rank == 0
