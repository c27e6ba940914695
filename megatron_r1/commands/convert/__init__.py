"""`megatron-r1 convert`: Hugging Face folders to Megatron distributed checkpoints and back, and the
comparison of two, tensor by tensor (docs/convert.md). The model is never whole in memory."""
