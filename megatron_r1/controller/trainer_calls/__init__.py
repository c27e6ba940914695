"""The controller's side of training: starts the trainer ranks, sends them samples, calls their
operations and records the run. No torch; the ranks' side is `megatron_r1.trainer`.

    client.py, rank_socket.py         calls of all ranks, and their replies, over ZeroMQ
    rank_processes.py                 the ranks that the controller starts itself
    packing.py                        samples over ranks and micro-batches, of equal cost
    schedule.py                       the learning rate of each optimizer step
    recorder.py, checkpoint_series.py the run's folder and trackers; its checkpoints

Both sides import `trainer.operations`, the ranks' operations with their messages, and the files of
`trainer.checkpoints` and `trainer.sample` that need no torch."""
