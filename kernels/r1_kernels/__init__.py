"""Loss-head kernels for reinforcement learning of language models; needs torch (and triton on a
GPU) only.
"""
