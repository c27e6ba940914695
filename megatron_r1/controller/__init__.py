"""Reinforcement learning: the run (1, 2), the algorithm (3), and what its steps use (4 to 8).

1. `rl_run`: the run around the algorithm, from its begin to its end, and what it keeps across
   restarts.
2. `supervision`: the watch over the run, its health endpoint and restarts.
3. `loop`: the algorithm.
4. `policy_engines`: the engines as the loop uses them, and `policy_trainer`: the trainer; `push`
   brings the engines the trainer's weights.
5. `rollouts`: prompts, responses and their rewards; `teacher_checks` refuses teachers that cannot
   compute their log-probabilities in on-policy distillation.
6. `advantages`: the arithmetic of rewards; `algorithms` has one module per algorithm, and
   `corrections` the settings that correct any of them.
7. `trainer_calls`: carries each of the trainer's passes to its ranks.
8. `run_recorder`: the run's folder and metrics; `checkpoint_series` has its checkpoints, and
   `advice` says what to change where a rollout teaches little."""
