"""Checkpoints on disk, read rectangle by rectangle and written piece by piece (`tensor_files`).

They are Hugging Face's (`hf_folder`, `folder_mismatch` and `hf_writer`) or Megatron's (`dcp` and
`dcp_writer`, and `megatron_weights`, which reads them as Hugging Face tensors). `stacked_experts`,
`published_layout` and `quantized_blocks` have what differs in published checkpoints: stacked
experts, FP8 and MXFP4 blocks; `known_scales` reads the scales of FP8. `dequantized_folder` writes a
folder without such blocks."""
