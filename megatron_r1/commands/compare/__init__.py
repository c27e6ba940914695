"""The parts of `megatron-r1 compare`, which finds where two runs part (docs/compare.md).

`records` compares metrics and sample logs, `tensors` compares checkpoints, and `verb` goes through
the steps of both runs and prints what they found."""
