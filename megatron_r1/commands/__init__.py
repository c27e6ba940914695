"""The command line's verbs, one module or folder each, which sets up the roles that it needs and
runs them. `cli` parses (with `verb_words`) and dispatches; `verb_module` says what each verb must
define, and `parts` has what several verbs are made of. What one verb alone is made of is next to
it: `rl_checks`, `rl_prompts`, `rollout_services`, `run_facts`, `dry_run` and its `run_costs` are
of `rl`, `sample_inputs` is of `sample`, `rehearsal_jobs` and `rehearsal_checks` are of
`rehearse`."""
