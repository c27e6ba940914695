"""The parts of `megatron-r1 compare`, which finds where two runs part (docs/compare.md).

`difference` has what they find, `records` compares metrics and sample logs, `tensors` compares
checkpoints, `runs` goes through the steps of both runs, and `verb` prints the differences."""
