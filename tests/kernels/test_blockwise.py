"""FP8 block-wise quantization, bit for bit, against the definition, vLLM's copy of DeepGEMM's
function and a table of the e4m3 numbers built from the format's description."""

import importlib
import math
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from r1_kernels import dequantize_blockwise, quantize_blockwise
from refusals import raised
from torch.utils._python_dispatch import TorchDispatchMode

# NaN, infinity and overflow are inputs and results here, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in multiply:RuntimeWarning")

FAR = 2**30 + 128
BLOCKS = [(128, 128), (1, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (1, 128), (2, 129), (128, 128), (129, 384), (257, 131), (300, 1), (131, 640)]
VALUES = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e, m in
          (divmod(code, 8) for code in range(127))]  # fmt: skip
"""Of codes 0 to 0x7E; 0x7F is NaN, the eighth bit the sign."""


@pytest.fixture(params=["torch", "triton", "triton-hardware-cast"])
def backend(request, monkeypatch):
    """Plain PyTorch, and Triton's interpreter with either way to convert e4m3."""
    if request.param == "torch":
        return "torch"
    fused = importlib.import_module("r1_kernels.primitives.blockwise_triton")
    monkeypatch.setattr(fused, "_has_e4m3", lambda device: request.param != "triton")
    return "triton"


def definition(x, block):
    (rows, columns), (height, width) = x.shape, block
    x = torch.nn.functional.pad(x.float(), (0, -columns % width, 0, -rows % height))
    blocks = x.view(x.shape[0] // height, height, x.shape[1] // width, width)
    scale_inv = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-4) / 448
    q = (blocks * (1 / scale_inv)).to(torch.float8_e4m3fn).view(x.shape)[:rows, :columns]
    return q.contiguous(), scale_inv[:, 0, :, 0]


def inverse_definition(q, scale_inv, block, dtype):
    scales = scale_inv.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (q.float() * scales[: q.shape[0], : q.shape[1]]).to(dtype)


def codes(q):
    """As uint8, with one code for NaN: its sign is the processor's."""
    bits = q.view(torch.uint8)
    return torch.where(bits & 0x7F == 0x7F, 0x7F, bits)


def assert_same(got, expected):
    """Bit for bit, signs of zeros included, except which NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if got.dtype == torch.float8_e4m3fn:
        assert torch.equal(codes(got), codes(expected))
    else:
        assert torch.equal(got.isnan(), expected.isnan())
        bits = torch.int32 if got.dtype == torch.float32 else torch.int16
        got, expected = got.nan_to_num(7.0, math.inf), expected.nan_to_num(7.0, math.inf)
        assert torch.equal(got.view(bits), expected.view(bits))


def matrix(rows, columns, dtype, seed=0):
    """Magnitudes spread over twelve powers of ten, a block at a time: all of e4m3 is used, and some
    blocks lie under the floor of 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 2, rows)[:, None]
    return (x * 10.0 ** torch.randint(-3, 2, (rows, columns), generator=generator)).to(dtype)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        # Each size with one type, the largest with all of them.
        pytest.param(size, dtype, marks=() if i % 3 == j or i == 7 else pytest.mark.more)
        for i, size in enumerate(SIZES)
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_there_and_back_is_the_definition_bit_for_bit(backend, size, block, dtype):
    x = matrix(*size, dtype)
    q, scale_inv = quantize_blockwise(x, block=block, backend=backend)
    expected_q, expected_scale = definition(x, block)
    assert_same(scale_inv, expected_scale)
    assert_same(q, expected_q)
    assert q.is_contiguous() and scale_inv.is_contiguous()
    back = dequantize_blockwise(q, scale_inv, block=block, dtype=dtype, backend=backend)
    assert_same(back, inverse_definition(expected_q, expected_scale, block, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_vllm_quantizes_to_the_same_bits(block, backend):
    from vllm.utils import deep_gemm

    x = matrix(300, 200, torch.bfloat16, seed=1)
    q, scale_inv = quantize_blockwise(x, block=block, backend=backend)
    expected_q, expected_scale = deep_gemm.per_block_cast_to_fp8(x, list(block), use_ue8m0=False)
    assert_same(scale_inv, expected_scale)
    assert_same(q, expected_q)


def test_every_number_midpoint_and_neighbor_of_a_midpoint_rounds_to_even(backend):
    cases = [(value, code) for code, value in enumerate(VALUES)]
    for low, (a, b) in enumerate(pairwise(VALUES)):
        middle = np.float32((a + b) / 2)
        cases.append((middle, low + low % 2))
        cases.append((np.nextafter(middle, np.float32(0)), low))
        cases.append((np.nextafter(middle, np.float32(1000)), low + 1))
    # A block that holds 448 has the scale 1: every other element is converted as it is.
    cases += [(448.0, 0x7E)] * (-len(cases) % 127)
    values = torch.tensor([float(value) for value, _ in cases]).view(-1, 127)
    wanted = torch.tensor([code for _, code in cases], dtype=torch.uint8).view(-1, 127)
    x = torch.nn.functional.pad(torch.cat([values, -values]), (1, 0), value=448.0)
    q, scale_inv = quantize_blockwise(x, block=(1, 128), backend=backend)
    assert torch.equal(scale_inv, torch.ones(len(x), 1))
    assert torch.equal(q.view(torch.uint8)[:, 1:], torch.cat([wanted, wanted | 0x80]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_reads_as_the_number_it_stands_for(backend, dtype):
    q = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    values = torch.tensor([*VALUES, math.nan], dtype=dtype)
    ones = torch.ones(2, 1)
    got = dequantize_blockwise(q, ones, block=(1, 128), dtype=dtype, backend=backend)
    assert_same(got, torch.stack([values, -values]))


@pytest.mark.parametrize("scale", [2.0**-149, 3e-41, 1e-30, 0.1, 700.0, 3e38, math.inf, math.nan])
def test_any_scale_is_multiplied_with_one_rounding(backend, scale):
    q = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    scales = torch.tensor([[scale]])
    got = dequantize_blockwise(q, scales, dtype=torch.float32, backend=backend)
    assert_same(got, inverse_definition(q, scales, (128, 128), torch.float32))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_nan_and_infinity_spoil_their_own_block_as_in_the_definition(backend, block, value):
    x = matrix(130, 260, torch.float32)
    x[3, 5] = x[129, 259] = value
    q, scale_inv = quantize_blockwise(x, block=block, backend=backend)
    expected_q, expected_scale = definition(x, block)
    assert not scale_inv[0, 0].isfinite() or block == (1, 128)
    assert scale_inv[0, 1].isfinite()
    assert_same(scale_inv, expected_scale)
    assert_same(q, expected_q)
    back = dequantize_blockwise(q, scale_inv, block=block, backend=backend)
    assert_same(back, inverse_definition(expected_q, expected_scale, block, torch.bfloat16))


def test_zeros_keep_their_sign_and_the_smallest_scale(backend):
    x = torch.tensor([[0.0, -0.0, 1e-45, -1e-45]])
    q, scale_inv = quantize_blockwise(x, backend=backend)
    assert q.view(torch.uint8).tolist() == [[0, 0x80, 0, 0x80]]
    assert scale_inv.item() == (torch.tensor(1e-4) / 448).item()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", [(0, 0), (0, 200), (200, 0)])
def test_empty_matrices_stay_empty(backend, size, block):
    q, scale_inv = quantize_blockwise(torch.empty(size), block=block, backend=backend)
    assert q.shape == size and scale_inv.shape == definition(torch.ones(size), block)[1].shape
    assert dequantize_blockwise(q, scale_inv, block=block, backend=backend).shape == size


@pytest.mark.parametrize("block", BLOCKS)
def test_any_layout_of_the_input_gives_the_same_bits(backend, block):
    x = matrix(130, 200, torch.bfloat16)
    wide = torch.full((130, 333), 1e9, dtype=x.dtype)
    wide[:, 7:207] = x
    q, scale_inv = quantize_blockwise(x, block=block, backend=backend)
    for view in (wide[:, 7:207], x.t().contiguous().t()):
        again_q, again_scale = quantize_blockwise(view, block=block, backend=backend)
        assert_same(again_q, q)
        assert_same(again_scale, scale_inv)
    back = dequantize_blockwise(q, scale_inv, block=block, backend=backend)
    columns_first = q.view(torch.uint8).t().contiguous().t().view(q.dtype)
    scales_first = scale_inv.t().contiguous().t()
    again = dequantize_blockwise(columns_first, scales_first, block=block, backend=backend)
    assert_same(again, back)


@pytest.mark.parametrize("block", BLOCKS)
def test_rows_2_to_the_30_elements_apart_are_read_where_they_lie(backend, block, monkeypatch):
    """The third row starts beyond 2^31 elements, the fifth beyond 2^32; the stride itself is a
    32-bit argument. Only the pages that are touched exist."""
    x = torch.empty(5 * FAR, dtype=torch.bfloat16).view(5, -1)[:, :200]
    x.copy_(matrix(5, 200, torch.bfloat16))
    expected_q, expected_scale = definition(x, block)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", lambda tensor: pytest.fail("copied"))
        q, scale_inv = quantize_blockwise(x, block=block, backend=backend)
    assert_same(q, expected_q)
    assert_same(scale_inv, expected_scale)
    far = torch.empty(5 * FAR, dtype=torch.uint8).view(5, -1)[:, :200]
    far.copy_(q.view(torch.uint8))
    far = far.view(torch.float8_e4m3fn)
    back = dequantize_blockwise(far, scale_inv, block=block, backend=backend)
    assert_same(back, inverse_definition(expected_q, expected_scale, block, torch.bfloat16))


def test_the_kernels_write_beyond_2_to_the_32_elements(interpreted, monkeypatch):
    """The first tile of a matrix of 2^30 + 128 columns: its fifth row lies beyond 2^32."""
    fused = importlib.import_module("r1_kernels.primitives.blockwise_triton")
    x = matrix(5, 128, torch.float32)
    expected_q, expected_scale = definition(x, (1, 128))
    q = torch.empty(5 * FAR, dtype=torch.uint8)
    scale_inv = torch.empty(5 * (FAR // 128))
    arguments = (q, scale_inv, 5, FAR, 128)
    tile = {"BLOCK_ROWS": 1, "TILE_ROWS": 8, "HARDWARE_CAST": False}
    fused._quantize_kernel[(1,)](x, *arguments, **tile)
    got = q.view(5, -1)[:, :128].view(torch.float8_e4m3fn)
    assert_same(got, expected_q)
    assert_same(scale_inv.view(5, -1)[:, :1], expected_scale)
    out = torch.empty(5 * FAR, dtype=torch.bfloat16)
    near = got.contiguous().view(torch.uint8)
    fused._dequantize_kernel[(1,)](near, scale_inv, out, *arguments[2:], RUN=8, **tile)
    back = inverse_definition(expected_q, expected_scale, (1, 128), torch.bfloat16)
    assert_same(out.view(5, -1)[:, :128], back)


def test_the_plain_backend_makes_no_copy_of_a_large_matrix():
    class Largest(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                self.num_bytes = max(self.num_bytes, out.numel() * 4)
            return out

    x = matrix(2048, 1024, torch.bfloat16)
    for block in BLOCKS:
        with Largest() as largest:
            q, scale_inv = quantize_blockwise(x, block=block, backend="torch")
            dequantize_blockwise(q, scale_inv, block=block, backend="torch")
        assert 0 < largest.num_bytes <= x.numel()  # a quarter of the matrix in fp32
        assert_same(q, definition(x, block)[0])


@pytest.mark.parametrize(
    ("call", "shows"),
    [
        (lambda x, q, s: quantize_blockwise(x[0]), ["x", "(130,)"]),
        (lambda x, q, s: quantize_blockwise(x.double()), ["x", "torch.float64"]),
        (lambda x, q, s: quantize_blockwise(x, block=(64, 128)), ["block", "(64, 128)"]),
        (lambda x, q, s: quantize_blockwise(x, backend="cuda"), ["backend", "'cuda'"]),
        (lambda x, q, s: dequantize_blockwise(q[0], s), ["q"]),
        (lambda x, q, s: dequantize_blockwise(q.view(torch.uint8), s), ["q", "torch.uint8"]),
        (lambda x, q, s: dequantize_blockwise(q, s.half()), ["(2, 2)", "torch.float16"]),
        (lambda x, q, s: dequantize_blockwise(q, s[:1]), ["scale_inv", "(2, 2)", "(1, 2)"]),
        (lambda x, q, s: dequantize_blockwise(q, s, block=(1, 128)), ["(130, 2)"]),
        (lambda x, q, s: dequantize_blockwise(q, s, dtype=torch.int8), ["dtype"]),
        (lambda x, q, s: dequantize_blockwise(q, s.to("meta")), ["scale_inv", "meta", "q"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, shows):
    x = torch.ones(130, 130)
    q, scale_inv = quantize_blockwise(x)
    with raised(ValueError, *shows):
        call(x, q, scale_inv)


def test_gradients_are_not_recorded():
    x = torch.ones(2, 2, requires_grad=True)
    assert not dequantize_blockwise(*quantize_blockwise(x)).requires_grad


COMPILE = r"""
import os, re, subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from r1_kernels.primitives import blockwise_triton as fused

tools = os.path.join(triton.__path__[0], "backends", "nvidia", "bin")

def report(arch, kernel, tensors, tile, **fixed):
    fixed |= {"TILE_ROWS": tile["TILE_ROWS"], "HARDWARE_CAST": arch >= 89}
    types = dict(zip(kernel.arg_names, tensors + ["i32"] * 3)) | dict.fromkeys(fixed, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 4, 5)}  # all but the rows
    options = {name: value for name, value in tile.items() if name != "TILE_ROWS"}
    source = ASTSource(kernel, types, fixed, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output([f"{tools}/cuobjdump", "-res-usage", cubin.name], text=True)
    ptx = built.asm["ptx"]
    wide = [len(re.findall(rf"{move}\.global\S*\.v4\.b32", ptx)) for move in ("ld", "st")]
    print(re.findall(r"(?:STACK|LOCAL):(\d+)", usage), *wide)
    print(*sorted(set(re.findall(r"(?:fma|div|mul|add)\.\S*f32|cvt\S*e4m3\S*", ptx))))

for arch in (80, 90, 100):
    for rows in (128, 1):
        quantize = fused._quantize_kernel, ["*bf16", "*u8", "*fp32"], fused.QUANTIZE[rows]
        report(arch, *quantize, BLOCK_ROWS=rows)
        dequantize = fused._dequantize_kernel, ["*u8", "*fp32", "*bf16"], fused.DEQUANTIZE
        report(arch, *dequantize, BLOCK_ROWS=rows, RUN=8)
"""


@pytest.mark.more  # test_compiled.py compiles all kernels, and counts the same moves
def test_compiled_kernels_spill_nothing_move_16_bytes_and_round_as_ieee_does(tmp_path):
    """The interpreter divides exactly and never fuses; only the compiled code shows that GPUs do
    the same: every operation rounded to nearest, no multiply-add, no subnormal flushed (.ftz)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    # A thread's 32 elements are four moves as bf16 and two as codes. Reading codes, it takes the
    # eight that fill one of its stores.
    write, read, spills = "4 2", "0 4", "['0', '0']"
    in_software = [f"{spills} {write}", "add.rn.f32 div.rn.f32 mul.rn.f32"]
    in_software += [f"{spills} {read}", "mul.rn.f32"]
    in_hardware = [f"{spills} {write}", "cvt.rn.satfinite.e4m3x2.f32 div.rn.f32 mul.rn.f32"]
    in_hardware += [f"{spills} {read}", "cvt.rn.f16x2.e4m3x2 mul.rn.f32"]
    assert run.stdout.splitlines() == in_software * 2 + in_hardware * 4
