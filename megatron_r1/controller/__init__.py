"""Reinforcement learning: `loop` is the algorithm, `session` the run around it, `run_recorder` its
folder and checkpoints, and `policy_engines` its engines; `trainer_passes` has the trainer's passes
over a rollout, `teacher` the engines of on-policy distillation, `advantages` the arithmetic of
`algorithms`, and `advice` what to change where a rollout teaches little. `rollouts`,
`trainer_calls`, `push` and `supervision` are questions and responses, calls of the trainer, the
push and the watch over the run."""
