"""Patches of vLLM for a drafter whose weights are pushed, the MTP layer that
`--speculative-config` loads as a second model. Paths are below vllm/."""

import functools
from typing import Any

DRAFTER_KEYS = ("quantization_config", "scoring_func", "topk_method")
"""Keys of config.json that a model and its MTP layers have alike."""


def patch_drafter() -> None:
    """Apply both patches, once per process."""
    _checksum_the_drafter()
    _configure_as_the_model()


def _checksum_the_drafter() -> None:
    """Let POST /weight_checker answer for the drafter's own tensors, too, as `drafter.NAME`.

    Upstream: v1/worker/gpu_worker.py: `Worker.compute_weight_checksums`. Without it: what
    the drafter computes with cannot be seen from outside. Goes when: upstream includes it."""
    from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests
    from vllm.v1.worker.gpu_worker import Worker

    upstream = Worker.compute_weight_checksums

    def compute_weight_checksums(self: Any) -> dict[str, str]:
        digests = upstream(self)
        drafter = self.get_draft_model()
        drafter_digests = compute_tensor_digests(drafter) if drafter is not None else {}
        prefix = self._weight_checksum_prefix()
        return digests | {
            f"{prefix}drafter.{name}": digest for name, digest in drafter_digests.items()
        }

    Worker.compute_weight_checksums = compute_weight_checksums


def _configure_as_the_model() -> None:
    """Give the drafter the values of `DRAFTER_KEYS` that --hf-overrides changes.

    Upstream: config/speculative.py: `SpeculativeConfig.hf_config_override`, which leaves such
    overrides to the model: `push.fp8` would then start an FP8 model with a drafter whose FP8 has no
    blocks, a model in bf16 from an FP8 folder with a drafter in FP8, and a DeepSeek-V3 that
    transformers wrote with a drafter that routes otherwise. Goes when: it applies them."""
    from vllm.config.speculative import SpeculativeConfig

    upstream = SpeculativeConfig.compose_draft_hf_overrides

    def compose_draft_hf_overrides(target: Any) -> Any:
        if isinstance(target, dict) and (
            settings := {k: v for k, v in target.items() if k in DRAFTER_KEYS}
        ):
            return functools.partial(_with_target_settings, settings)  # is sent to other processes
        return upstream(target)

    SpeculativeConfig.compose_draft_hf_overrides = staticmethod(compose_draft_hf_overrides)


def _with_target_settings(settings: dict[str, Any], hf_config: Any) -> Any:
    """Return the drafter's configuration with these keys."""
    from vllm.config.speculative import SpeculativeConfig

    hf_config = SpeculativeConfig.hf_config_override(hf_config)
    for key, value in settings.items():
        setattr(hf_config, key, value)
    return hf_config
