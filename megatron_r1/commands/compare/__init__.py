"""`megatron-r1 compare`: where two runs part that should be equal. `records` compares what a step
wrote down, `tensors` two checkpoints, `departure` is what either finds and the words for it, and
`verb` chooses the steps to look at and prints the answer ([compare](docs/compare.md))."""
