"""Sends the trainer's weights to the engines; a weight passes these modules in this order.

1. `sender`: the operations of a push on each trainer rank, called by the controller
   (`megatron_r1.controller.push`).
2. `plan`: which rectangle of which tensor goes from which trainer rank to which engine rank.
3. `link_planner`: links this rank with the engine ranks that the plan gives it, from what the
   engines receive (`receivers`) and where each needs it (`receiver_layout`). `slices` has the
   parts of its parameters that each link carries, as they are or quantized to FP8.
4. `transports`: the bytes over shared memory, CUDA IPC, gloo or NCCL, both ends, and what has
   arrived (`arrivals`). Over NCCL all links are sent together, in rounds (`plan.rounds`):
   `ordered_sets` has each rank's part, and `round_sender` runs that of a trainer rank.
5. `checksum`: one per delivery, computed on both ends and compared before use.
6. `megatron_r1.engines.plugin.swap`: inside vLLM, the received weights replace the old ones;
   `backend` compares the tensors in use before and after.

Both sides agree on the plan before: an engine rank publishes its `table` of slots, the trainer the
`published_plan` of each position, and `rendezvous` is how all ranks find each other and learn of
failures. `results` has what ranks report to the controller.

docs/push.md begins with the words of a push: set, member, position, region, slot, and so on."""
