"""The controller's side of the trainer, without torch.

`rank_processes` starts the ranks, `rank_socket` carries their calls over ZeroMQ, `client` calls
their operations, and `packing` divides samples among ranks and micro-batches of equal cost, and
refuses batches too small for the ranks. Both sides import `trainer.operations`,
`trainer.rank_messages`, and what of `trainer.training_sample` and `trainer.checkpoints` needs no
torch."""
