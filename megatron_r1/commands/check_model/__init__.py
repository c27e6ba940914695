"""The parts of `megatron-r1 check-model`, which examines a model folder.

`reference` runs in a process of its own: the folder's tensors, its tokenizer, and transformers'
log-probabilities. `comparisons` has Megatron and vLLM compute the same ones for `verb`, and
`results` is what they find."""
