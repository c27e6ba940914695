"""tools/gpu_check: checks are begun in order while they fit, and what they found is in the archive.

The checks of tests/gpu themselves run here without a GPU."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from waiting import wait_until

from megatron_r1 import config as configuration
from megatron_r1.models import read_hf_config
from megatron_r1.models.hf_config import sparse_layers
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.timing import time_section
from tools.gpu_check import launcher
from tools.gpu_check.checks import CHECKS, ONE, OVERHEAD_SECONDS, SEVERAL, Check, seconds_for

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
sys.path.append(str(ROOT / "tests" / "gpu"))
import decode_seconds  # noqa: E402
import recipe_runs  # noqa: E402
import step_seconds  # noqa: E402
import trainer_layers  # noqa: E402

COMPUTES_FP8 = re.search("amx_tile|avx512_bf16", Path("/proc/cpuinfo").read_text())


def play(checks, budget, lasts):
    """The limits of the checks that are begun, each of which takes what `lasts` says, or less."""
    factor = max(1.0, budget / sum(check.limit + OVERHEAD_SECONDS for check in checks))
    left, begun = budget, []
    for index, check in enumerate(checks):
        if seconds := seconds_for(check, checks[index + 1 :], left, factor):
            begun.append((check.name, seconds))
            left -= min(seconds, lasts(check)) + OVERHEAD_SECONDS
    assert left >= -OVERHEAD_SECONDS
    return begun


@pytest.mark.parametrize("part", [ONE, SEVERAL])
def test_limits_add_up_to_the_budget(part):
    """The launcher has 8 s for its own start."""
    checks = [check for check in CHECKS if check.part == part]
    for start in (0, 8):
        begun = play(checks, 540 - start, lambda _: 1e9)
        assert [name for name, _ in begun] == [check.name for check in checks]
        assert 525 <= sum(seconds for _, seconds in begun) <= 540
    draw = random.Random(0)
    for _ in range(200):
        play(checks, draw.uniform(0, 1500), lambda _: draw.uniform(0, 300))


def test_a_check_gets_what_those_before_it_left_over():
    short, long = (Check(name, (), 30) for name in ("short", "long"))
    assert play([short, long], 61, lambda _: 10) == [("short", 30.5), ("long", 50.5)]
    assert play([short, long], 61, lambda _: 1e9) == [("short", 30.5), ("long", 30)]
    (_, first), (_, second) = play([short, long], 121, lambda _: 1e9)
    assert 59 < first < 62 and 59 < second < 62
    assert play([long._replace(limit=70), short], 60, lambda _: 1e9) == [("short", 60)]


FIRST = """
import pytest

def test_first(record_figures, check_folder):
    record_figures({"gap": 0.5})

def test_wrong():
    assert 1 == 2, "the gap is 2"

def test_absent():
    pytest.skip("no FP8 here")

def test_endless(record_figures, check_folder):
    import signal
    import subprocess
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    record_figures({"steps": 2, "child": child.pid})
    signal.pause()
"""
CHURN = """
import shutil, sys
from pathlib import Path

while True:
    for number in range(300):
        folder = Path(sys.argv[1], str(number))
        folder.mkdir()
        (folder / "a.log").write_text("a")
    for number in range(300):
        shutil.rmtree(Path(sys.argv[1], str(number)))
"""
LAUNCH = """
import sys
from tools.gpu_check import launcher
from tools.gpu_check.checks import STANDALONE, Check

launcher._check_gpu = lambda: None
launcher.GRACE_SECONDS = float(sys.argv.pop())
names = sys.argv.pop().split(",")
launcher.CHECKS = [Check(n, (*STANDALONE, f"FILE::test_{n}"), 30) for n in names]
sys.exit(launcher.main())
"""


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher with the tests above, in the order of their names."""

    def start(names, budget, grace):
        file = tmp_path / "test_them.py"
        file.write_text(FIRST)
        program = LAUNCH.replace("FILE", str(file))
        out = tmp_path / "out"
        arguments = ["-c", program, "--out", str(out), "--budget", str(budget), names, str(grace)]
        return out, subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )

    return start


def has_ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def archived(out):
    """The JSON of the archive, by check."""
    with tarfile.open(out / "gpu_check.tar.gz") as archive:
        results = json.load(archive.extractfile("gpu_check/gpu_check.json"))
    return {check["name"]: check for check in results["checks"]}


@pytest.mark.more
def test_what_becomes_of_checks(launch):
    out, process = launch("first,wrong,absent,endless,first", 47, 15)
    printed, _ = process.communicate()
    with tarfile.open(out / "gpu_check.tar.gz") as archive:
        assert "gpu_check/first/output.log" in archive.getnames()
    found = archived(out)
    assert process.returncode == 1
    assert {name: check["status"] for name, check in found.items()} == {
        "first": "no time",
        "wrong": "failed",
        "absent": "not possible here",
        "endless": "stopped",
    }, printed
    assert "the gap is 2" in found["wrong"]["reason"]
    assert found["absent"]["reason"] == "no FP8 here"
    assert "--budget" in found["first"]["reason"]
    assert found["endless"]["figures"]["steps"] == 2
    wait_until(lambda: has_ended(found["endless"]["figures"]["child"]))
    page = (out / "gpu_check.md").read_text()
    assert re.search(r"\| first \| passed \| \d+ \| gap 0.5 \|", page)
    assert "## wrong" in page and "assert 1 == 2" in page


def test_sigterm_leaves_the_archive_with_the_figures_so_far(launch):
    out, process = launch("endless", 540, 0.5)
    result = out / "endless" / "result.json"
    wait_until(lambda: result.exists() and "steps" in result.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    found = archived(out)["endless"]
    assert (found["status"], found["reason"]) == ("stopped", "by SIGTERM")
    assert found["figures"]["steps"] == 2
    wait_until(lambda: has_ended(found["figures"]["child"]))


def test_files_that_vanish_meanwhile_do_not_end_the_archive(tmp_path):
    (tmp_path / "kept.json").write_text("{}")
    with subprocess.Popen([sys.executable, "-c", CHURN, str(tmp_path)]) as process:
        try:
            wait_until((tmp_path / "99").exists)
            archives = [launcher._archive(tmp_path) for _ in range(25)]
        finally:
            process.kill()
    for archive in archives:
        with tarfile.open(fileobj=io.BytesIO(archive)) as file:
            assert "gpu_check/kept.json" in file.getnames()


def test_a_check_is_stopped_when_sigterm_comes_while_it_is_archived(tmp_path, monkeypatch):
    check = Check("sleep", (), 30)
    monkeypatch.setattr(Check, "arguments", ("-c", "import time; time.sleep(1000)"))
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.1)
    started, start = [], launcher._start
    monkeypatch.setattr(
        launcher, "_start", lambda *each: started.append(start(*each)) or started[0]
    )

    def archive(_):
        os.kill(os.getpid(), signal.SIGTERM)
        return b""

    monkeypatch.setattr(launcher, "_archive", archive)
    results = launcher.Results(tmp_path)
    before = signal.signal(signal.SIGTERM, launcher._terminate)
    try:
        with pytest.raises(launcher.Terminated):
            results.run(check, 0.2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started[0].returncode is not None
    assert json.loads((tmp_path / "gpu_check.json").read_text())["checks"][0]["status"] == "stopped"


def test_the_archive_has_the_end_of_long_logs_and_is_never_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "FILE_BYTES", 1000)
    monkeypatch.setattr(launcher, "ARCHIVE_BYTES", 20_000)
    for number in range(30):
        (tmp_path / f"{number}.log").write_bytes(os.urandom(3000) + b"the end")
    (tmp_path / "small.json").write_text("{}")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernel.json").write_text("{}")
    (tmp_path / "weights.safetensors").write_bytes(b"1")
    (tmp_path / "it.tar.gz").write_bytes(launcher._archive(tmp_path))
    assert 8000 < (tmp_path / "it.tar.gz").stat().st_size < 22_000
    with tarfile.open(tmp_path / "it.tar.gz") as archive:
        names = archive.getnames()
        log = next(name for name in names if name.endswith(".log"))
        content = archive.extractfile(log).read()
    assert "gpu_check/small.json" in names
    assert not any(name.endswith(("kernel.json", ".safetensors")) for name in names)
    assert len(content) == 1000 and content.endswith(b"the end")


def planned():
    """The recipe on its GPUs."""
    recipe = ROOT / "examples" / "deepseek_r1" / "r1_zero.yaml"
    hf_config = read_hf_config(str(ROOT / "examples" / "deepseek_r1" / "model"))
    return PlannedJob(hf_config, configuration.load_recipe(recipe), 2048, HARDWARE["H800"])


SIZES = dict(zip(decode_seconds.VARIANTS, (8e8, 8e8, 3.6e9), strict=True))
DENSE_AND_HEAD = 2e9
FEW_BYTES = DENSE_AND_HEAD + SIZES[decode_seconds.FEW]


def decoded(latency, efficiency, rest=3e-3):
    """The judge's values of engines whose layers take so long, by hand."""
    read = 3.35e12 * efficiency
    seconds = {
        variant: rest
        + DENSE_AND_HEAD / read
        + variant.layers * latency
        + (variant.layers - 1) * SIZES[variant] / read
        for variant in decode_seconds.VARIANTS
    }
    return decode_seconds.evaluate(seconds, SIZES, FEW_BYTES, HARDWARE["H100"])


def test_the_seconds_of_a_pass_are_split_into_weights_layers_and_the_rest():
    found = decoded(90e-6, 0.7)
    assert found == pytest.approx(
        {"decode_latency_per_layer": 90e-6, "bandwidth_efficiency": 0.7, "pass_seconds": 3e-3}
    )
    for latency, efficiency, rest, words in (
        (90e-6, 1.2, 3e-3, "1.20"),
        (-1e-4, 0.7, 3e-3, "besides its weights"),
        (90e-6, 0.7, -1e-4, "besides its layers"),
    ):
        with pytest.raises(AssertionError, match=words):
            decoded(latency, efficiency, rest)
    same = dict.fromkeys(decode_seconds.VARIANTS, 0.01)
    with pytest.raises(AssertionError, match="more layers"):
        decode_seconds.evaluate(same, SIZES, FEW_BYTES, HARDWARE["H100"])


def test_engines_of_a_rank_s_share_have_v3_s_widths_and_a_layer_its_bytes(monkeypatch):
    """By hand: MLA of 16 heads, a shared expert, the router and 8 or 40 experts, in bf16."""
    monkeypatch.setattr(decode_seconds, "device_kind", lambda: "gpu")
    attention = 7168 * (1536 + 576) + 16 * (1536 * 192 + 512 * 256 + 128 * 7168)
    for variant in decode_seconds.VARIANTS:
        hf_config = decode_seconds.model(variant, {"vocab_size": 300})
        assert hf_config["vocab_size"] == 300 and "quantization_config" not in hf_config
        assert sparse_layers(hf_config) == [False] + [True] * (variant.layers - 1)
        weights = attention + (1 + variant.experts) * 3 * 7168 * 2048 + variant.experts * 7168
        assert decode_seconds.layer_bytes(hf_config) == pytest.approx(2 * weights, rel=1e-3)
        dense = attention + 3 * 7168 * 18432 + 300 * 7168  # and the head
        whole = 2 * (dense + (variant.layers - 1) * weights)
        assert decode_seconds.pass_bytes(hf_config) == pytest.approx(whole, rel=1e-3)


def test_the_numbers_of_the_phases_are_those_with_which_the_plan_takes_their_seconds():
    """Seconds that the planner itself gives with other numbers lead back to these."""
    wanted = {"tensor_load_seconds": 3e-4, "push_efficiency": 0.5}
    hidden = planned()
    hidden = replace(hidden, assumptions=replace(hidden.assumptions, **wanted))
    hidden = replace(hidden, hardware=replace(hidden.hardware, host_link=20e9))
    section = time_section(JobEstimate(hidden).times)
    every = hidden.config.checkpoint.every
    line = {
        "push/pause": section["load"].value,
        "push/transfer": section["push"].value,
        "checkpoint/seconds_blocked": section["saves"].value * every,
    }
    log = (
        "INFO It took 0.400000 seconds to fall asleep.\n"
        "INFO It took 0.700000 seconds to wake up tags {'weights'}.\n"
        "INFO It took 0.200000 seconds to wake up tags {'kv_cache'}.\n"
    )
    found = step_seconds.fit_phases([line] * 3, 2 * log, planned())
    assert found == pytest.approx(
        wanted | {"host_link": 20e9, "sleep_seconds": 0.4, "wake_seconds": 0.9}
    )
    assert step_seconds.fit_phases([{"step": 2}], "", planned()) == {}


def test_the_carried_results_of_the_cpu_are_of_the_present_settings(tmp_path):
    for case in trainer_layers.CASES:
        _, config, hf_config = trainer_layers.settings(case, tmp_path)
        assert trainer_layers.find_expected(config, hf_config)["before"]
    with pytest.raises(AssertionError, match="trainer_layers.py"):
        trainer_layers.find_expected(config, hf_config | {"hidden_size": 8})


@pytest.mark.more
@pytest.mark.skipif(torch.cuda.is_available(), reason="python tools/gpu_check")
@pytest.mark.parametrize(
    ("program", "case", "planted", "words"),
    [
        (trainer_layers.compare, "one", None, "gradient norm, of the CPU's"),
        (trainer_layers.compare, "one", "packing", "differ by"),
        (trainer_layers.compare, "one", "gradient", "cosine"),
        (trainer_layers.compare, "fp8", None, "cosine with the CPU's move"),
        (trainer_layers.compare, "fp8", "gradient", "cosine"),
        (trainer_layers.compare, "context", None, "attention"),
        (recipe_runs.check, "recipe", None, "recipe: logprob_diff/mean"),
        (recipe_runs.check, "recipe", "undelivered", "not what the engine"),
        pytest.param(
            *(recipe_runs.check, "fp8", None, "fp8: push/probe_diff"),
            marks=pytest.mark.skipif(not COMPUTES_FP8, reason="vLLM has no FP8 blocks here"),
        ),
        (step_seconds.check, "micro-batch", None, "compute_efficiency"),
        (step_seconds.check, "phases", None, "tensor_load_seconds"),
        (decode_seconds.check, None, None, "ms of a pass, 6 x 40"),
    ],
)
def test_the_checks_themselves_without_a_gpu(tmp_path, monkeypatch, program, case, planted, words):
    """Where there is none, the same functions compute on the CPU, in the recipe's bf16."""
    figures = {}
    arguments = [tmp_path, figures.update] if case is None else [case, tmp_path, figures.update]
    arguments += [lambda: 1e9] if program is decode_seconds.check else []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if planted is None:
        program(*arguments)
        assert words in figures
        assert not list(tmp_path.parent.rglob("calibration.yaml")), "a CPU's times say nothing"
        return
    where = (
        ROOT / "tests" / "system" / "planted"
        if planted == "undelivered"
        else HERE / "planted_in_checks"
    )
    monkeypatch.setenv("PYTHONPATH", f"{where}:{ROOT}")
    monkeypatch.setenv("PLANTED", planted)
    with pytest.raises(AssertionError, match=words):
        program(*arguments)


def test_a_run_s_faults_are_found():
    memory = recipe_runs.UsedMemory()
    line = {"grad_norm": 4.0, "logprob_diff/mean": 0.007, "push/probe_diff": 0.003}
    lines = [line | {"step": step} for step in (1, 2)]
    recipe_runs.judge(lines, 2, memory, 0.05)
    for wrong, words in (
        (lines[:1], "steps .1. of 2"),
        ([lines[0], lines[1] | {"logprob_diff/mean": 0.8}], "differ by 0.8"),
        ([lines[0], lines[1] | {"grad_norm": 0.0}], "norm is 0.0"),
        ([lines[0], lines[1] | {"push/probe_diff": None}], "not proven"),
    ):
        with pytest.raises(AssertionError, match=words):
            recipe_runs.judge(wrong, 2, memory, 0.05)
    memory.samples.extend((10, 60, 8, 55, 0))
    recipe_runs.judge(lines, 2, memory, 0.05)
    memory.samples[:] = (10, 60, 58, 60, 0)
    with pytest.raises(AssertionError, match="while they sleep"):
        recipe_runs.judge(lines, 2, memory, 0.05)


def test_every_check_is_of_files_that_exist():
    assert len({check.slug for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        files = [part.partition("::")[0] for part in check.tests if part.startswith("tests/")]
        assert files and all((ROOT / file).exists() for file in files), check.name
        assert check.limit > launcher.GRACE_SECONDS


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="--interpret"):
        launcher._check_gpu()


KERNELS = next(check for check in CHECKS if check.name == "kernels against fp64")
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "zmq", "blake3", "msgspec", "megatron", "vllm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""


@pytest.mark.more
@pytest.mark.parametrize(
    "arguments",
    [
        ("tools/gpu_check", "--help"),
        ("tools/bench", "kernels", "--help"),
        (*KERNELS.arguments, "--collect-only"),
    ],
)
def test_torch_and_triton_are_enough_for_the_kernels(tmp_path, arguments):
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join((str(tmp_path), str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_backend_of_attention_is_read_from_the_log():
    log = (
        "[DEBUG    | DotProductAttention]: Running with config={'cudnn_version': '9.19.0'}\n"
        "[INFO     | DotProductAttention]: Running with UnfusedDotProductAttention backend\n"
    )
    assert trainer_layers.logged_backends(2 * log) == "UnfusedDotProductAttention"
