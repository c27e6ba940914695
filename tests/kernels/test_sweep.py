"""tools/bench kernels --sweep: what it refuses, and that each of its candidates computes what plain
PyTorch does."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from formulae import near
from r1_kernels.examples import ExampleSizes, example_launches
from r1_kernels.registry import KERNELS, load_primitives
from r1_kernels_bench import sweep
from r1_kernels_bench.command import add_options
from r1_kernels_bench.measure import CPUMeter
from test_registry import cloned, tensors

ROOT = Path(__file__).parents[2]
# Rows long enough for the most lanes with the most loads, and a weight that ends inside a tile.
SMALL = ExampleSizes(num_tokens=1030, vocab_size=72, weight=(131, 130), num_sequences=3)
ROWS = SMALL._replace(num_tokens=1, vocab_size=33_000)


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(words)


@pytest.mark.more
def test_a_machine_without_a_gpu_is_refused_by_the_command_with_what_it_needs():
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "tools/bench", "kernels", "--sweep"]
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for named in ("NVIDIA GPU", "torch.cuda.is_available()", "make setup-cuda", "bench resources"):
        assert named in done.stderr


def test_options_that_a_sweep_does_not_read_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "TRITON_INTERPRET" in sweep.refusal(options("--sweep"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert sweep.refusal(options("--sweep", "--only", "policy_terms", "--tokens", "9")) == ""
    assert "--preset" in sweep.refusal(options("--sweep", "--preset", "shard"))
    assert "--only policy_loss" in sweep.refusal(options("--sweep", "--only", "policy_loss"))


def test_the_plan_has_every_kernel_its_launches_and_the_values_in_use():
    assert {choices.kernel for choices in sweep.PLAN} == {kernel.name for kernel in KERNELS}
    for choices in sweep.PLAN:
        kernel = next(kernel for kernel in KERNELS if kernel.name == choices.kernel)
        known = {example.name for example in example_launches(kernel, SMALL, "meta")}
        assert set(choices.launches) <= known, choices.kernel
        assert choices.present_values in choices.candidates, choices
        assert (ROOT / choices.place.rpartition(" ")[2]).exists()
        for name in choices.values:
            assert name in (ROOT / choices.place.rpartition(" ")[2]).read_text()


@pytest.mark.more
@pytest.mark.parametrize("choices", sweep.PLAN, ids=lambda c: f"{c.kernel} {c.table} {[*c.values]}")
def test_every_candidate_gives_what_plain_pytorch_gives(choices):
    kernel = next(kernel for kernel in KERNELS if kernel.name == choices.kernel)
    sizes = ROWS if kernel.stem == "softmax" else SMALL
    sizes = sizes._replace(vocab_size=sizes.vocab_size + choices.more_columns)
    before = choices.present_values
    for example in example_launches(kernel, sizes, "cpu"):
        if example.name not in choices.launches:
            continue
        plain = tensors(getattr(load_primitives("torch"), kernel.name)(*cloned(example.arguments)))
        for values in choices.candidates:
            with choices.apply(values):
                assert choices.present_values == values
                results = getattr(load_primitives("triton"), kernel.name)(
                    *cloned(example.arguments)
                )
            for name, got in tensors(results).items():
                by = 2**-7 if got.dtype == torch.bfloat16 else 1e-5
                near(got, plain[name], rtol=by, atol=by, example=example.name, of=name, by=values)
    assert choices.present_values == before


def test_the_best_is_the_least_geometric_mean_over_launches():
    rows = [
        {"values": {"BLOCK": 1}, "seconds": {"a": 1.0, "b": 100.0}},
        {"values": {"BLOCK": 2}, "seconds": {"a": 4.0, "b": 10.0}},
        {"values": {"BLOCK": 4}, "seconds": {"a": 0.9, "b": 99.0}},
    ]
    found = sweep.best(rows, {"BLOCK": 1})
    assert found["best"] == {"BLOCK": 2}
    assert found["best_time"] == pytest.approx((4 * 0.1) ** 0.5)


def test_an_entry_has_the_seconds_of_every_candidate_and_its_table_where_to_change_them():
    (choices,) = (choices for choices in sweep.PLAN if choices.kernel == "segment_sums")
    entry = sweep.measure(choices, SMALL, CPUMeter(), repeats=1, device="cpu")
    assert [row["values"] for row in entry["rows"]] == choices.candidates
    assert all(row["seconds"]["segment_sums"] > 0 for row in entry["rows"])
    shown = "\n".join(sweep.lines(entry))
    assert "kernels/r1_kernels/primitives/policy_triton.py" in shown
    assert f"best: SUM_BLOCK {entry['best']['SUM_BLOCK']}" in shown
    assert sum(" *" in line for line in shown.splitlines()) == 1, "the values in use are marked"


STAGES = """
from unittest import mock
from r1_kernels.examples import ExampleSizes, example_launches
from r1_kernels.registry import KERNELS
from r1_kernels_bench import compiled
from triton.runtime.jit import JITFunction
run = JITFunction.run
def code(kernel, stages):
    def staged(self, *arguments, **options):
        return run(self, *arguments, num_stages=stages, **options)
    with mock.patch.object(JITFunction, "run", staged):
        launch = compiled.compile_launches(kernel, example, 90)[0].kernel
    sass = compiled._cuobjdump_output(launch, "-sass")
    return [each[1:] for each in compiled._sass_instructions(sass)]
for kernel in KERNELS:
    example = next(example_launches(kernel, ExampleSizes(), "meta"))
    assert code(kernel, 1) == code(kernel, 4), kernel.name
    print(kernel.name)
"""


@pytest.mark.more
def test_stages_change_no_instruction(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'grading'}")
    done = subprocess.run([sys.executable, "-c", STAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [kernel.name for kernel in KERNELS]
