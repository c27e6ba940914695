"""The checks of a machine with a GPU, in the order of the damage that a failure would do."""

from dataclasses import dataclass

PYTEST = (
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    # The page shows the end of a check's output, which names what failed.
    "-rfEs",
    "--tb=short",
    "--disable-warnings",
)
# Where only torch and Triton are installed, the conftest files do not import.
STANDALONE_PYTEST = (*PYTEST, "--noconftest", "-c", "/dev/null", "--rootdir", ".")
BENCH_MINUTES = 1.5

PARTS = ("one", "several")
"""Of the checks: those of one GPU, and those of two or more."""


@dataclass(frozen=True)
class Check:
    """One command that succeeds or fails.

    A program of tools/gpu_check prints its verdict (`verdict`); of others the status is the
    verdict.

    Attributes:
        name: how --only names it.
        arguments: the arguments of python, from the repository's root; {out}: the folder of
            results.
        seconds: its limit.
        needs: modules without which it is not possible.
        settles: the lines of docs/gpu-checklist.md that it settles, by a phrase of theirs.
        interpreted: arguments instead, where Triton's interpreter runs on a CPU; none: not run
            there.
        num_gpus: how many it needs."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ("triton", "pytest")
    settles: tuple[str, ...] = ()
    interpreted: tuple[str, ...] = ()
    num_gpus: int = 1

    @property
    def command(self) -> str:
        """The command as it is typed in the repository's root."""
        return " ".join(("python", *self.arguments))

    @property
    def part(self) -> str:
        """The part that it belongs to."""
        return PARTS[self.num_gpus > 1]


TRAINER = ("transformer_engine", "megatron.core", "pydantic", "blake3", "zmq")
ENGINE = (*TRAINER, "vllm")


def _module_arguments(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"tools.gpu_check.{name}", *arguments)


def _layers_check(name: str, case: str, seconds: float, num_gpus: int, settles: str) -> Check:
    arguments = _module_arguments("layers", case, "{out}")
    return Check(name, arguments, seconds, TRAINER, (settles,), num_gpus=num_gpus)


FP8_AND_IPC = (
    "tests/gpu/test_fp8_engine.py",
    "tests/gpu/test_push_fp8_gpu.py",
    "tests/gpu/test_push_cuda_ipc.py",
)
BENCH = "`pip install -r requirements/bench.txt && python tools/bench kernels"

CHECKS = (
    _layers_check(
        "bf16, latent attention, packed batches",
        "one",
        120,
        1,
        "bf16 and latent attention on packed batches",
    ),
    Check(
        "the recipe: sleep, push, wake",
        _module_arguments("recipe", "recipe", "{out}"),
        240,
        needs=ENGINE,
        settles=("`rollout.colocated`:", "logprob_diff/mean (about 0.01 expected)"),
    ),
    Check(
        "an FP8 engine, pushed to over CUDA IPC",
        _module_arguments("recipe", "fp8", "{out}"),
        200,
        needs=ENGINE,
        settles=("The push over `push.transport: cuda_ipc`", "`push.fp8: true` in an RL run"),
    ),
    _layers_check(
        "an FP8 step",
        "fp8",
        100,
        1,
        "a DeepSeek-shaped model in bf16 and with `fp8: {recipe: blockwise}`",
    ),
    Check(
        "FP8 products and writes over CUDA IPC, against the CPU",
        (*PYTEST, *FP8_AND_IPC),
        90,
        needs=("pytest", *TRAINER),
        settles=(
            "`pytest tests/gpu/test_fp8_engine.py` on Hopper",
            "FP8 pushes: `pytest tests/gpu/test_push_fp8_gpu.py`",
        ),
    ),
    Check(
        "kernels against fp64",
        (*STANDALONE_PYTEST, "tests/gpu/test_kernels.py"),
        150,
        settles=("`pytest tests/gpu`: the kernels compiled",),
        interpreted=(*PYTEST, "tests/kernels/test_token_logprobs.py", "-k", "triton"),
    ),
    Check(
        "kernels compared with their peers",
        _module_arguments("kernel_times", "{out}/kernels.json", "--minutes", str(BENCH_MINUTES)),
        60 * BENCH_MINUTES + 60,
        needs=("triton", "numpy", "xxhash"),
        settles=(BENCH,),
    ),
    Check(
        "a rank's share of the vocabulary",
        _module_arguments(
            "kernel_times",
            "{out}/kernels-shard.json",
            "--preset",
            "shard",
            "--minutes",
            "1",
        ),
        100,
        needs=("triton", "numpy", "xxhash"),
        settles=(BENCH,),
    ),
    Check(
        "seconds of a decoding pass",
        _module_arguments("decode_seconds", "{out}"),
        270,
        needs=ENGINE,
        settles=("`seconds of a decoding pass`",),
    ),
    Check(
        "seconds of a micro-batch",
        _module_arguments("step_seconds", "micro-batch", "{out}"),
        200,
        needs=TRAINER,
        settles=("`seconds of a micro-batch`",),
    ),
    Check(
        "seconds between phases",
        _module_arguments("step_seconds", "phases", "{out}"),
        240,
        needs=ENGINE,
        settles=("`seconds between phases`",),
    ),
    Check(
        "the driver's answer and torch's",
        (*PYTEST, "tests/unit/engines/server/test_gpu.py"),
        40,
        needs=("pytest", "pydantic"),
        settles=("`pytest tests/unit/engines/server/test_gpu.py`",),
    ),
    Check(
        "a push over NCCL, and an engine killed in it",
        _module_arguments("nccl_push"),
        180,
        needs=("pydantic", "zmq", "blake3", "megatron.core"),
        settles=("The push over `push.transport: nccl`",),
        num_gpus=2,
    ),
    Check(
        "the recipe: expert-parallel engines, NCCL",
        _module_arguments("recipe", "recipe", "{out}"),
        270,
        needs=ENGINE,
        settles=("Engines with ranks inside:",),
        num_gpus=2,
    ),
    _layers_check(
        "context parallelism, latent attention",
        "context",
        100,
        2,
        "Context parallelism with Transformer Engine's attention",
    ),
    _layers_check("tensor x expert", "experts", 100, 2, "2 GPUs: TP 2, EP 2, PP 2"),
    _layers_check("tensor x expert x pipeline", "grid", 120, 4, "2 GPUs: TP 2, EP 2, PP 2"),
    _layers_check("all axes", "whole", 120, 8, "2 GPUs: TP 2, EP 2, PP 2"),
    Check(
        "trainer and checkpoints",
        (*PYTEST, "tests/parallel/test_trainer.py", "tests/parallel/test_checkpoints.py"),
        180,
        needs=("pytest", *TRAINER),
        settles=(
            "`pytest tests/unit tests/parallel` in the trainer image",
            "`tests/parallel/test_checkpoints.py` on NCCL",
        ),
        num_gpus=2,
    ),
)
