"""The parts of `megatron-r1 check-model`, which examines a model folder.

`reference` runs in a process of its own: the folder's tensors, its tokenizer, and transformers'
log-probabilities. `verb` has Megatron and vLLM compute the same ones, and `results` is what both
find."""
