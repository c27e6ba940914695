"""Sends the trainer's weights to the engines; a weight passes these modules in this order.

1. `rank_push`: the operations of a push on each trainer rank, called by the controller
   (`megatron_r1.controller.push`); `sender` sends the rank's weights.
2. `matching`: which region of which tensor goes from which trainer rank to which engine rank.
3. `link_planner`: from the slot tables of the engine ranks (`receivers`, `published_sharding`) and
   the plan to the links of this rank; `parameter_regions` has what each link sends of the rank's
   parameters, as it is or quantized to FP8.
4. `transports`: the bytes over shared memory, CUDA IPC, gloo or NCCL, both ends, and which chunks
   an engine rank has received (`received_chunks`). Over NCCL all links are sent together, in rounds
   (`matching.rounds`): `push_schedule` has each rank's part, and `round_sender` runs that of a
   trainer rank.
5. `checksum`: one per chunk, computed on both ends and compared before use; `lane_checksum`
   computes it while copying.
6. `megatron_r1.engines.plugin.layer_reload`: inside vLLM, the received weights replace the old
   ones; `backend` compares the tensors in use before and after.

`protocol` has what both sides publish before: the slot table of each engine rank (`slots`), and the
plan for each. `rendezvous` is how all ranks find each other, and learn of failures, through a store
that trainer rank 0 hosts (`store`).
`control_messages` has what the controller sends to engines, and what ranks report to it.

The section "Words" of docs/push.md defines the terms."""
