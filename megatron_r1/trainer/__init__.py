"""A trainer rank: the one train step that SFT, RL and reward models share, on SPMD ranks that the
controller calls over ZeroMQ (`controller.trainer_calls`).

- `rank`, `rank_server`: a rank's process and its loop over the calls.
- `operations`, `rank_messages`, `training_sample`, `sample_encoding`: what both sides send;
  `replica`: the ranks that get one share.
- `distributed`, `construction`, `optimizer`: process groups, model and optimizer.
- `trainer`, `critic`, `reference_policy`: the operations of a step; `loaded_rollout`: their
  samples.
- `output_heads`: what reads the model's output; `evaluation_passes`: the passes that train nothing.
- `passes`: Megatron's schedule; `stage_communication`: the hops between its stages.
- `sequence_packing`, `batch`, `whole_microbatch`, `rollout_batches`, `token_advantages`,
  `loss_head`, `losses`, `reward_losses`, `value_loss`, `metrics`: from samples to a loss and its
  figures.
- `token_split`, `prefix_matching`: which rank has which tokens, and which tokens samples share.
- `routing`: the experts that the engine chose, for the rank that replays them.
- `offload`, `offload_stores`: the state's way off the device and back.
- `checkpoint_manager`, `checkpoints`: write and read.
- `rank_monitor`, `implementations`: tell what a rank does, and by which kernels."""
