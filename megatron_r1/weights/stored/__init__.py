"""Checkpoints on disk, either kind, read rectangle by rectangle and written piece by piece.

hf_folder, hf_weights, weight_files,
safetensors_file, file_plan                             Hugging Face
dcp_reading, dcp_writing, saved_tensor, megatron_names  Megatron's distributed checkpoints
megatron_weights                                        those, as Hugging Face tensors
fp8, known_scales                                       DeepSeek's FP8 layout
raw                                                     rectangles of files, without mapping them
"""
