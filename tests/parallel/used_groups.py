"""The groups that ranks communicate in while they train: `used_groups.py MODEL OUT GRID` runs
`trainer_steps.py` and writes OUT/GRID.RANK.json, (name, size, number of collectives) of each."""

import json
import sys
from pathlib import Path

import trainer_steps
from torch import distributed as dist

from megatron_r1.trainer import distributed

initialize = distributed.initialize


def initialize_and_count(*arguments, **keywords):
    position = initialize(*arguments, **keywords)
    from megatron.core import parallel_state

    destroy = parallel_state.destroy_model_parallel
    groups = [dist.group.WORLD, *parallel_state._global_process_group_list[1:]]
    before = [group._get_sequence_number_for_group() for group in groups]

    def write_and_destroy() -> None:
        if parallel_state.model_parallel_is_initialized():
            rows = [
                (group.group_desc, group.size(), group._get_sequence_number_for_group() - earlier)
                for group, earlier in zip(groups, before, strict=True)
            ]
            file = Path(sys.argv[2]) / f"{sys.argv[3]}.{position.rank}.json"
            file.write_text(json.dumps(rows))
        destroy()

    parallel_state.destroy_model_parallel = write_and_destroy
    return position


if __name__ == "__main__":
    distributed.initialize = initialize_and_count
    trainer_steps.main()
