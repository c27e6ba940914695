"""A trainer rank: the one train step that SFT, RL and reward models share, on SPMD ranks that the
controller calls over ZeroMQ (`controller.trainer_calls`). `rank` and `worker` are a rank's process
and its loop over the calls; `operations` and `training_sample` are what both sides send;
`distributed` and `construction` build process groups, model and optimizer; `trainer`, `critic` and
`reference` have the operations of a step, `loaded_rollout` the samples that these are of,
`output_heads` what reads the model's output, `logprob_probe` the passes that train nothing,
`passes` Megatron's schedule, and `stage_communication` the hops between its stages; `packed`,
`batch`, `rollout_batches`, `token_advantages`, `losses`, `reward_losses` and `metrics` lead
from samples to a loss and its figures; `checkpoint_manager` and `checkpoints` write and read;
`rank_monitor` and `implementations` tell what a rank does, and by which kernels."""
