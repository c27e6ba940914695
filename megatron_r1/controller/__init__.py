"""Reinforcement learning: the run (1 to 3), the algorithm (4), and what its steps use (5 to 9).

1. `rl_run`: the run around the algorithm, from its begin to its end, and what it keeps across
   restarts.
2. `cpu_memory`: the micro-batch that fits into a host without GPUs.
3. `supervision`: the watch over the run, its health endpoint and restarts.
4. `loop`: the algorithm.
5. `policy_engines`: the engines as the loop uses them, and `policy_trainer`: the trainer; `push`
   brings the engines the trainer's weights.
6. `rollouts`: prompts, responses and their rewards; `teacher_checks` refuses teachers that cannot
   score them in on-policy distillation.
7. `advantages`: the arithmetic of rewards; `algorithms` has one module per algorithm, and
   `corrections` the settings that correct any of them.
8. `trainer_calls`: carries each of the trainer's passes to its ranks.
9. `run_recorder`: the run's folder and metrics; `checkpoint_series` has its checkpoints, and
   `advice` says what to change where a rollout teaches little."""
