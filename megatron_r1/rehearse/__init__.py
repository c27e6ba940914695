"""Runs a recipe in miniature, on real trainer ranks and engines (docs/rehearse.md).

- The small recipe: `miniature`, which lists what is not as in the recipe; its parts: `layout`,
  `model`, `served_reward_models`, `engine_sections`, `recipe_sections`, `synthetic_data`.
- Its run: `settings`, `phases` from start to export (`check_export`), each a `started_phase`;
  `launch` of its processes (`forked_ranks`: trainer ranks by fork; `null_gpu`: all of them on
  imitated GPUs).
- What was exercised and what was not: `coverage`.
- The nodes of a cluster: `preflight`."""
