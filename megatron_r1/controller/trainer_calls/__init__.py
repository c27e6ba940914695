"""The controller's side of training: starts the trainer ranks, sends them samples and calls their
operations. No torch; the ranks' side is `megatron_r1.trainer`.

    client.py       calls of all ranks, and their replies, over ZeroMQ
    ranks.py        the ranks that the controller starts itself
    packing.py      samples over ranks and micro-batches, of equal cost

Both sides import `trainer.operations`, the ranks' operations with their messages, and the files of
`trainer.checkpoints` and `trainer.sample` that need no torch."""
