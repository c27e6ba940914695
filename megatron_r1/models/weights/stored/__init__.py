"""Checkpoints on disk, Hugging Face's and Megatron's, read rectangle by rectangle and written piece
by piece.

    hf_folder, hf_weights, safetensors_file    Hugging Face folders, and `base.files.foreign`
    dcp_reading, dcp_writing, megatron_names   Megatron's distributed checkpoints
    megatron_weights                           these, read as Hugging Face tensors
    fp8, fp8_blocks                            DeepSeek's FP8 layout
    raw                                        rectangles of files, without mapping"""
