"""Every registered kernel next to its plain twin, and what is generated from the registry."""

import importlib
import inspect

import pytest
import r1_kernels
import torch
from formulae import near
from r1_kernels import reference
from r1_kernels.examples import ExampleSizes, example_launches
from r1_kernels.registry import KERNELS, load_primitives

from tools import kernel_table

# Odd sizes: a prime number of tokens, a vocabulary and a weight that end inside a block.
SMALL = ExampleSizes(num_tokens=13, vocab_size=72, weight=(131, 130), num_sequences=3)


def tensors(results) -> dict[str, torch.Tensor]:
    """Return results by name. The parts of a loss are added: each backend has its own blocks."""
    if isinstance(results, torch.Tensor):
        return {"result": results}
    named = results._asdict() if hasattr(results, "_asdict") else dict(enumerate(results))
    return {k: v.sum() if k == "loss" else v for k, v in named.items()}


def cloned(arguments: tuple) -> list:
    """Return arguments of their own for a primitive that may overwrite one."""
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_example_gives_the_same_in_triton_and_in_plain_pytorch(kernel):
    torch.manual_seed(0)
    for example in example_launches(kernel, SMALL, "cpu"):
        ours, plain = (
            tensors(getattr(load_primitives(backend), kernel.name)(*cloned(example.arguments)))
            for backend in ("triton", "torch")
        )
        assert ours.keys() == plain.keys(), example.name
        for name, got in ours.items():
            # bf16 results may differ by one rounding, 2^-8; fp32 ones in the order of a sum.
            by = 2**-7 if got.dtype == torch.bfloat16 else 1e-5
            near(got, plain[name], rtol=by, atol=by, example=example.name, of=name, sizes=SMALL)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_both_backends_have_one_signature(kernel):
    ours, plain = (getattr(load_primitives(b), kernel.name) for b in ("triton", "torch"))
    assert inspect.signature(ours) == inspect.signature(plain), kernel.name
    for function, backend in ((ours, "triton"), (plain, "torch")):
        module = importlib.import_module(f"r1_kernels.primitives.{kernel.stem}_{backend}")
        assert function.__module__ == module.__name__


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_primitive_has_examples(kernel):
    assert list(example_launches(kernel, SMALL, "meta")), kernel.name


def test_readme_has_the_registrys_table():
    text = kernel_table.README.read_text()
    assert kernel_table.table() in text and kernel_table.updated_readme(text) == text, (
        "make kernel-files"
    )


def test_a_kernel_without_a_row_gets_one_and_the_text_around_the_table_stays():
    text = kernel_table.README.read_text()
    without = "".join(line for line in text.splitlines(True) if "`segment_sums`" not in line)
    assert without != text and kernel_table.updated_readme(without) == text
    with pytest.raises(SystemExit):
        kernel_table.updated_readme("# r1_kernels\n")


def test_the_reference_has_every_public_function_with_its_signature():
    for name in r1_kernels.__all__:
        public = getattr(r1_kernels, name)
        if inspect.isfunction(public):
            bound = getattr(reference, name)
            assert bound.func is public and bound.keywords == {"backend": "torch"}, name
            assert bound.__doc__ == public.__doc__, name
    with pytest.raises(AttributeError, match="softmax_loss"):
        _ = reference.softmax_loss
