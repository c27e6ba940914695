"""The parts of `megatron-r1 init`, which writes a recipe for a model and your questions.

`verb` has the command line; `rl_draft` and `supervised_drafts` make a `recipe_draft`, and
`rl_trial` tries one for `rl`."""
