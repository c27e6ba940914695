"""`megatron-r1 init` guesses a recipe for a model folder and a data file, with reasons."""
