"""The sizes of the groups that Megatron makes for a rank of a recipe at its full size, as JSON:
`made_groups.py RECIPE RANK`. A fake process group stands for the other ranks."""

import json
import sys

from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1 import config as configuration
from megatron_r1.trainer import distributed


def main() -> None:
    recipe, rank = sys.argv[1:]
    parallel = configuration.load_recipe(recipe).parallel
    world_size = parallel.processes
    dist.init_process_group("fake", store=FakeStore(), rank=int(rank), world_size=world_size)
    distributed.os.environ |= {"RANK": rank, "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": "1"}
    distributed.initialize(parallel, seed=0)
    from megatron.core import parallel_state

    groups = [dist.group.WORLD, *parallel_state._global_process_group_list[1:]]
    print(json.dumps({group.group_desc: group.size() for group in groups}))


if __name__ == "__main__":
    main()
