"""Run under torchrun: the kernels on shards of the vocabulary and on parts of sequences."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import sequence_ranks
import torch.distributed as dist
import vocabulary_ranks

if __name__ == "__main__":
    dist.init_process_group("gloo")
    vocabulary_ranks.check()
    sequence_ranks.check()
    dist.destroy_process_group()
