"""Commands as a graph of stages (docs/pipeline.md).

- The recipe: `pipeline_recipe`; the stages that it has for a seed: `stages`, with what `references`
  stand for; their order: `graph`.
- Which are done or stale: `manifest`, `fingerprint` with `digests`, `status`.
- Their runs: `executor`, `stage_runner`, `child` behind a reaper, `function_stage` for a function,
  `serving` for their models.
- What they found: `results`, `pipeline_report`, `rl_plots`, `graph_svg`."""
