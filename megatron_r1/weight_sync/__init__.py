"""Sends the trainer's weights to the engines; a weight passes these modules in this order.

1. `bridge` (controller): `WeightBridge` connects engines (`engine_links`), pushes, and compares
   both sides' log-probabilities (`probes`).
2. `trainer_rank`: the verbs of a push on each trainer rank, called by the bridge.
3. `plan`: which rectangle of which tensor goes from which trainer rank to which engine rank.
4. `send`: the rank's slices of its parameters, as they are or quantized to FP8.
5. `transports`: the bytes over shared memory, CUDA IPC, gloo or NCCL, both ends; over the last two
   an engine passes on to others what has entered it.
6. `receive`: the engine rank's table of slots and the buffer in which a push arrives.
7. `verify`: one checksum per delivery, computed on both ends and compared before use.
8. `megatron_r1.vllm_plugin.swap`: inside vLLM, the received weights replace the old ones;
   `delivery` compares the tensors in use before and after.

`receive`, `transports` and `verify` also run inside vLLM, so they import nothing else of ours."""
