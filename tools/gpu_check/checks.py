"""The checks of a machine with a GPU, in the order of the damage that a failure would do."""

from dataclasses import dataclass

PYTEST = (
    *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
    # The page shows the end of a check's output, which names what failed.
    *("-rfEs", "--tb=short", "--disable-warnings"),
)
# Where only torch and Triton are installed, the conftest files do not import.
ALONE = (*PYTEST, "--noconftest", "-c", "/dev/null", "--rootdir", ".")
BENCH_MINUTES = 2.0


@dataclass(frozen=True)
class Check:
    """One command that succeeds or fails.

    arguments: of python, from the repository's root; {out}: the folder of results. needs: modules
    without which it is skipped. seconds: its limit. settles: the lines of docs/gpu-checklist.md
    that it settles, by a phrase of theirs. interpreted: arguments instead, where Triton's
    interpreter runs on a CPU; none: not run there. num_gpus: how many it needs."""

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


ENGINE = ("vllm", "pydantic", "blake3", "zmq", "megatron.core")
TRAINER = ("transformer_engine", "megatron.core", "pydantic", "blake3", "zmq")

CHECKS = (
    Check(
        "kernels against fp64",
        (*ALONE, "tests/gpu/test_kernels.py"),
        150,
        settles=("`pytest tests/gpu`: the kernels compiled",),
        interpreted=(*PYTEST, "tests/kernels/test_token_logprobs.py", "-k", "triton"),
    ),
    Check(
        "kernels beside their peers",
        (
            *("tools/bench", "kernels", "--minutes", str(BENCH_MINUTES)),
            *("--json", "{out}/kernels.json"),
        ),
        60 * BENCH_MINUTES + 60,
        needs=("triton", "numpy", "xxhash"),
        settles=("`pip install -r requirements/bench.txt && python tools/bench kernels",),
    ),
    Check(
        "a rank's share of the vocabulary",
        (
            *("tools/bench", "kernels", "--preset", "shard", "--minutes", "1"),
            *("--json", "{out}/kernels-shard.json"),
        ),
        100,
        needs=("triton", "numpy", "xxhash"),
        settles=("`pip install -r requirements/bench.txt && python tools/bench kernels",),
    ),
    Check(
        "the driver's answer and torch's",
        (*PYTEST, "tests/unit/engine/test_gpu.py"),
        40,
        needs=("pytest", "pydantic"),
        settles=("`pytest tests/unit/engine/test_gpu.py`",),
    ),
    Check(
        "FP8 against the emulation",
        (*PYTEST, "tests/gpu/test_fp8_engine.py"),
        90,
        needs=("pytest", *TRAINER),
        settles=("`pytest tests/gpu/test_fp8_engine.py` on Hopper",),
    ),
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
    Check(
        "pushes over CUDA IPC",
        (*PYTEST, "tests/gpu/test_push_cuda_ipc.py", "tests/gpu/test_push_fp8_gpu.py"),
        120,
        needs=("pytest", *ENGINE),
        settles=("The push over `push.transport: cuda_ipc`", "FP8 pushes: `pytest tests/gpu"),
    ),
    Check(
        "an engine and a push",
        (*PYTEST, "tests/system/test_engine.py", "tests/system/test_push.py", "-m", "not slow"),
        240,
        needs=("pytest", *ENGINE),
        settles=("`pytest tests/system` with a CUDA vLLM",),
    ),
)
