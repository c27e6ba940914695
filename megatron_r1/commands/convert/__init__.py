"""The parts of `megatron-r1 convert` (docs/convert.md).

`verb` has the command line, and `to_hf`, `from_hf` and `verify` are its verbs; `logits` is a
process of its own. `reload_check` compares what `to_hf` has written, `sources` reads either kind of
model, `conversion_parts` spreads a conversion over processes, and `work_folder` keeps what it has
finished."""
