"""Two ranks with the trainer's store and the push's: rank 0 prints where its process listens.

Arguments: a recipe's section `rollout` as JSON, and the MASTER_ADDR that the ranks have."""

import json
import os
import sys
from datetime import timedelta

import psutil
import torch.distributed as dist

from megatron_r1.config import RolloutConfig
from megatron_r1.models import platform
from megatron_r1.push.store import open_store

rollout = RolloutConfig(**json.loads(sys.argv[1]))
os.environ["MASTER_ADDR"] = sys.argv[2]
platform.join_process_group(timedelta(seconds=300))
store, (host, port) = open_store(rollout)
if dist.get_rank() == 0:
    store.set("said", "by rank 0")
assert store.get("said") == b"by rank 0"
if dist.get_rank() == 0:
    connections = psutil.Process().net_connections()
    found = {c.laddr.port: c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    trainer = int(os.environ["MASTER_PORT"])
    print(json.dumps({"host": host, "trainer": found[trainer], "push": found[port]}))
dist.barrier()
dist.destroy_process_group()
