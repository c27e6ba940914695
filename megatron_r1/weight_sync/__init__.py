"""Sends the trainer's weights to the engines; a weight passes these modules in this order.

1. `trainer_rank`: the operations of a push on each trainer rank, called by the controller
   (`megatron_r1.weight_bridge`).
2. `plan`: which rectangle of which tensor goes from which trainer rank to which engine rank.
3. `send`: `sender` reads what the engines offer to receive (`offers`), links this rank with those
   that the plan gives it (`link_planner`), and sends them its `slices`, as they are or quantized
   to FP8.
4. `transports`: the bytes over shared memory, CUDA IPC, gloo or NCCL, both ends (`base`); over the
   last two (`groups`, `pair_sender`, `pair_receiver`) an engine passes on to others what has
   entered it (`exchange`).
5. `receive`: the buffer of an engine rank in which a push arrives.
6. `verify`: one checksum per delivery, computed on both ends and compared before use.
7. `megatron_r1.vllm_plugin.swap`: inside vLLM, the received weights replace the old ones;
   `delivery` compares the tensors in use before and after.

Both sides agree on it before: an engine rank publishes its `table` of slots, and `rendezvous` is
how they find each other and learn of failures. These two, `receive`, `transports` and `verify` run
inside vLLM as well, so they import nothing else of ours."""
