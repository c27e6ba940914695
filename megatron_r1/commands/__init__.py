"""The command line's verbs, one module or folder each, which sets up the roles that it needs and
runs them. `cli` parses (with `verb_words`) and dispatches; `training_run`, `rollout_services`,
`dry_run` and `sampling_run` have what several verbs do, `sample_inputs` what `sample` reads, and
`verb_module` what each of them must define. `node_resources` says what the node has,
`guessed_settings` which sizes suit it, `cpu_memory` which micro-batch fits where it has no GPUs,
and `run_costs` what a run takes."""
