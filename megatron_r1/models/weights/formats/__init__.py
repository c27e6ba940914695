"""Checkpoints on disk, Hugging Face's (`hf_folder` and `hf_writer`) and Megatron's (`dcp` and
`dcp_writer`, and `megatron_weights`, which reads them as Hugging Face tensors), read rectangle by
rectangle and written piece by piece (`tensor_files`). `published_layout` and `quantized_blocks`
have what differs in published checkpoints: stacked experts, FP8 and MXFP4 blocks."""
