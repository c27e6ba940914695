"""What several of the command line's verbs are made of; none of these modules is a verb.

- Before a run: `trainer_checks` refuses recipes.
- A run: `training_run` locks its folder and restarts it, `supervised_training` is one without
  rollouts; `sampling_run`: what `sample` and `eval` have in common; `torchrun`: several nodes;
  `preloads`: what ranks import.
- The node and the model: `node_resources`, `guessed_settings` (sizes that suit it), `cpu_memory`
  (the micro-batch that fits where it has no GPUs), `trained_model`, `trained_template`,
  `checkpoint_export`."""
