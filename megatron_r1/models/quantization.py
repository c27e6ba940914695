"""Which quantized checkpoints can be read, by `quantization_config` of `config.json`. No torch."""

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import model_family

BLOCK = 128
FP8_BLOCKS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
"""`quantization_config` of DeepSeek's published FP8 checkpoints (`models.weights.stored.fp8`)."""


def check_quantization(hf: dict) -> None:
    """Raise UserError for weights that are stored in another form than the one that can be read:
    blocks of FP8, or for models with stacked experts MXFP4."""
    found = hf.get("quantization_config")
    if not found:
        return
    if model_family(hf).stacked:
        needed: dict[str, object] = {"quant_method": "mxfp4"}
    else:
        needed = {key: FP8_BLOCKS[key] for key in ("quant_method", "weight_block_size")}
        if "fmt" in found:  # its default in transformers is that of FP8_BLOCKS
            needed["fmt"] = FP8_BLOCKS["fmt"]
    for key, value in needed.items():
        if found.get(key) != value:
            raise UserError(
                f"config.json: quantization_config with {key}={found.get(key)!r} cannot be read, "
                f"only {value!r}; give a folder of the model in bf16",
                key="quantization_config",
                cause=Cause.UNSUPPORTED,
            )
