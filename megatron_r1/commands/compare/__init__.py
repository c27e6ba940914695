"""The parts of `megatron-r1 compare`, which finds where two runs part (docs/compare.md).

`difference` has what they find, `records` compares metrics and sample logs, `tensors` compares
checkpoints, and `verb` goes through the steps of both runs and prints the differences."""
