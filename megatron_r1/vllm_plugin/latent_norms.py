"""A patch of vLLM 0.32, on every platform, for the norms inside latent attention."""

import functools
from typing import Any

from megatron_r1.vllm_plugin.model_classes import when_loaded

MODELS = "vllm.model_executor.models.deepseek_v2"
EPSILON = 1e-6


def use_released_epsilon() -> None:
    """Give the norms of latent attention the epsilon that the models were released with.

    Upstream: model_executor/models/deepseek_v2.py:501, 525, 1082 and 1098. The released code of
    DeepSeek-V2, V3, Moonlight and Kimi-K2 and transformers' classes use 1e-6 in these norms
    whatever rms_norm_eps is; vLLM uses rms_norm_eps, 1e-5 for Moonlight and GLM-4.7-Flash. Goes
    when: vLLM does as they do.
    """
    when_loaded(MODELS, _patch_both)


def _patch_both(models: Any) -> None:
    _patch(models.DeepseekV2Attention)
    _patch(models.DeepseekV2MLAAttention)


@functools.cache  # a second call would wrap the patch in itself
def _patch(attention: Any) -> None:
    upstream = attention.__init__

    @functools.wraps(upstream)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        upstream(self, *args, **kwargs)
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if hasattr(self, name):
                getattr(self, name).variance_epsilon = EPSILON

    attention.__init__ = construct
