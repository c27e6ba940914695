"""What `megatron-r1 check-model` finds out about a model folder.

`reference` runs in a process of its own: the folder's tensors, its tokenizer, and transformers'
log-probabilities. `comparison` has Megatron and vLLM compute the same ones."""
