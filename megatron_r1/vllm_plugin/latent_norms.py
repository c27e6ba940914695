"""A patch of vLLM 0.32, on every platform, for the norms inside latent attention."""

import functools
import sys
from typing import Any

MODELS = "vllm.model_executor.models.deepseek_v2"
EPSILON = 1e-6


def use_released_epsilon() -> None:
    """Give the norms of latent attention the epsilon that the models were released with.

    Upstream: model_executor/models/deepseek_v2.py:501, 525, 1082 and 1098. The released code of
    DeepSeek-V2, V3, Moonlight and Kimi-K2 and transformers' classes use 1e-6 in these norms
    whatever rms_norm_eps is; vLLM uses rms_norm_eps, 1e-5 for Moonlight and GLM-4.7-Flash. Goes
    when: vLLM does as they do.
    """
    from vllm.model_executor.models import registry

    upstream = registry._LazyRegisteredModel.load_model_cls

    def load_model_cls(self: Any) -> Any:
        model = upstream(self)
        # Importing it here would cost every process of a server that runs no model some seconds.
        if MODELS in sys.modules:
            for name in ("DeepseekV2Attention", "DeepseekV2MLAAttention"):
                _patch(getattr(sys.modules[MODELS], name))
        return model

    registry._LazyRegisteredModel.load_model_cls = load_model_cls


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
