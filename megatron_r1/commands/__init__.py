"""The command line's verbs, one module or folder each, which sets up the roles that it needs and
runs them. `cli` parses (with `verb_words`) and dispatches; `verb_module` says what each verb must
define, `rl_checks` refuses recipes of `rl`, and `parts` has what verbs are made of."""
