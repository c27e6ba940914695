"""Reinforcement learning: `loop` is the algorithm and `session` the run around it, with its
engines; `trainer_passes` has the trainer's passes over a rollout, `teacher` the engines of
on-policy distillation, `advantages` the arithmetic of `algorithms`, and `advice` what a rollout
that teaches little should change. `rollouts`, `trainer_calls`, `delivery` and `supervision` are
questions and responses, the trainer, the push and the watch over the run."""
