"""A rank's communicators of NCCL and first calls on null GPUs, and the configuration of a push's
communicator against NCCL's header."""

import json
import re
import subprocess

import trainer_steps
from nullgpu import counters
from nullgpu.conftest import TORCHRUN
from nullgpu.random_weights import write_random
from small_models import MODELS
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_r1.base.transports import PUSH_CHANNELS
from megatron_r1.models import read_hf_config
from megatron_r1.plan.communicators import group_sizes
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.push.transports import nccl_communicator
from tools.null_gpu.shim.build import INCLUDE

PROGRAM = """
#include <nccl.h>
#include <stddef.h>
#include <stdio.h>
#define FIELD(name) printf("%zu %zu\\n", offsetof(ncclConfig_t, name), sizeof undefined.name);
int main(void) {
    ncclConfig_t undefined = NCCL_CONFIG_INITIALIZER;
    printf("%zu %u ", sizeof undefined, NCCL_API_MAGIC);
    printf("%d %d\\n", NCCL_VERSION_CODE, NCCL_CONFIG_UNDEF_INT);
    FIELDS
    for (size_t i = 0; i < sizeof undefined; i++) printf("%02x", ((unsigned char *)&undefined)[i]);
}
"""


def test_the_configuration_is_that_of_nccls_header(tmp_path):
    header = (INCLUDE[1] / "nccl.h").read_text()
    struct = re.search(r"typedef struct ncclConfig_\w+ \{(.*?)\} ncclConfig_t;", header, re.DOTALL)
    names = re.findall(r"\b(\w+);", struct[1])
    program = PROGRAM.replace("FIELDS", "".join(f"FIELD({name})" for name in names))
    (tmp_path / "fields.c").write_text(program)
    include = [argument for folder in INCLUDE for argument in ("-isystem", str(folder))]
    subprocess.run(
        ["cc", *include, "fields.c", "-o", "fields"], check=True, cwd=tmp_path, timeout=60
    )
    lines = subprocess.check_output([tmp_path / "fields"], text=True).splitlines()

    config = nccl_communicator.push_config()
    assert [int(word) for word in lines[0].split()] == [
        config.size,
        config.magic,
        config.version,
        nccl_communicator.UNDEFINED,
    ]
    assert [name for name, _ in config._fields_] == names
    ours = [getattr(nccl_communicator.NCCLConfig, name) for name in names]
    assert [f"{field.offset} {field.size}" for field in ours] == lines[1:-1]
    for name in ("blocking", *PUSH_CHANNELS):
        setattr(config, name, nccl_communicator.UNDEFINED)
    config.commName = None
    assert bytes(config).hex() == lines[-1], "all else is undefined, as in NCCL's initializer"


def test_a_rank_makes_the_planned_communicators_and_no_others(on_null_gpu, tmp_path):
    grid, model = "pp2xvp2", write_random(tmp_path / "model", MODELS["deepseek-yarn-mtp"])
    script = ["trainer_on_null_gpu.py", str(model), str(tmp_path), grid]
    counted = {"NULL_GPU_COUNTERS": str(tmp_path / "counters")}
    on_null_gpu(*TORCHRUN, "--nproc-per-node=2", *script, gpus=2, **counted)
    config = trainer_steps.config(str(model), grid)
    planned = group_sizes(PlannedJob(read_hf_config(model), config, 2, HARDWARE["H800"]))
    processes = counters.read(tmp_path / "counters")
    assert len(processes) == 2
    for process in processes:
        assert all(made["calls"] for made in process["communicators"])
        sizes = [made["size"] for made in process["communicators"] if made["size"] > 1]
        assert sorted(sizes) == sorted(planned.values())


def test_first_calls_are_in_each_bucket_and_change_no_gradient(on_null_gpu, tmp_path):
    model = write_random(tmp_path / "model", MODELS["deepseek-yarn-mtp"])
    printed = on_null_gpu(*TORCHRUN, "first_steps_on_null_gpu.py", str(model), "one", "auto")
    (called,) = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert called["unchanged"]
    # Heads of 40 and 20 values; 3,000 tokens in 16 samples.
    assert called["calls"] == [
        [is_training, [[tokens, 4, 40], [tokens, 4, 40], [tokens, 4, 20]], 16, tokens]
        for tokens in (1024, 2048, 3008)
        for is_training in (True, False)
    ]
    assert "attention called with 1,024, 2,048, 3,000 tokens, and the loss head" in printed


def test_first_calls_do_not_count_as_gradients_of_gpt_oss_offsets(on_null_gpu, tmp_path):
    model, hf_config = tmp_path / "model", AutoConfig.for_model(**MODELS["gpt-oss"])
    AutoModelForCausalLM.from_config(hf_config).save_pretrained(model)
    # cuDNN's attention is not for training gpt-oss.
    arguments = ["first_steps_on_null_gpu.py", str(model), "one", "unfused"]
    printed = on_null_gpu(*TORCHRUN, *arguments)
    (called,) = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert called["unchanged"] and called["calls"]
