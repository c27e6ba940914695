"""The command line's verbs, one module or folder each, which sets up the roles that it needs and
runs them. `cli` parses (with `verb_words`) and dispatches; `verb_module` says what each verb must
define, and `parts` has what verbs are made of. Those of `rl` alone are next to it: `rl_checks`,
`rl_prompts`, `rollout_services`, `dry_run`."""
