"""The copy with checksum in one pass, against a loop over words; damage of every kind shows."""

import re
import sys

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
import xxhash

from megatron_r1.push.checksum import RunningChecksum, copy_with_checksum, tensor_checksum
from megatron_r1.push.lane_checksum import LOOPS

CHECKSUMS = sys.modules[RunningChecksum.__module__]


def defined(values: torch.Tensor) -> int:
    """Compute the checksum with Python's integers: no vector, no overflow."""
    words = np.frombuffer(values.contiguous().view(torch.uint8).numpy().tobytes(), "<u8")
    plain, running = [0] * 16, [0] * 16
    for at, word in enumerate(words.tolist()):
        lane = at % 16
        plain[lane] = (plain[lane] + word) % 2**64
        bits = f"{running[lane]:064b}"
        running[lane] = (int(bits[29:] + bits[:29], 2) + plain[lane]) % 2**64
    both = np.array(plain + running, np.uint64)
    return xxhash.xxh3_64_intdigest(both.tobytes())


def bits(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return int16 over their whole range, so that sums exceed 2^64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, (height, width), generator=generator, dtype=torch.int16)


@pytest.mark.parametrize(
    ("height", "width", "left", "pitch"),
    [
        (1, 64, 0, 64),
        (700, 192, 0, 192),  # several passes
        (37, 128, 32, 224),  # columns, at 64 bytes
        (37, 128, 1, 161),  # nowhere aligned
    ],
)
def test_the_checksum_is_that_of_a_loop_over_words_and_the_copy_is_exact(
    height, width, left, pitch, monkeypatch
):
    monkeypatch.setattr(CHECKSUMS, "PASS_BYTES", 100 * 2 * width)
    monkeypatch.setattr(CHECKSUMS, "CACHE_BYTES", 100 * 2 * width)
    source = bits(height, pitch)[:, left : left + width]
    expected = defined(source)
    assert tensor_checksum(source) == tensor_checksum(source.clone()) == expected
    for shift in (0, 3):  # of the target's columns
        around = bits(height + 2, width + 64, seed=1)
        known, reports = around.clone(), []
        target = around[1:-1, shift : shift + width]
        assert copy_with_checksum(target, source, reports.append) == expected
        assert reports == list(range(100, height, 100))
        known[1:-1, shift : shift + width] = source
        assert torch.equal(around, known)  # and nothing next to it


def test_tensors_that_do_not_match_are_refused_before_a_byte_is_written():
    around = torch.zeros(8, 512, dtype=torch.int16)
    with pytest.raises(ValueError, match="broadcast"):
        copy_with_checksum(around[:, :64], bits(8, 128))
    assert not around.any()


def test_a_transposed_source_has_the_checksum_of_its_elements():
    source = bits(192, 70).T
    assert tensor_checksum(source) == tensor_checksum(source.contiguous()) == defined(source)
    for target in (torch.zeros(70, 192, dtype=torch.int16), torch.zeros_like(source)):
        assert copy_with_checksum(target, source) == defined(source)
        assert torch.equal(target, source)


def test_following_in_steps_is_the_checksum_of_all():
    values = bits(283, 320)[:, 64:256]
    running = RunningChecksum(values)
    for row in (0, 1, 1, 40, 282):
        running.update_to(row)
    assert running.digest() == defined(values)


def test_converted_elements_are_summed_in_the_target_dtype():
    source = torch.randn(50, 192)
    target = torch.empty(50, 192, dtype=torch.bfloat16)
    assert copy_with_checksum(target, source) == defined(source.to(torch.bfloat16))
    assert torch.equal(target, source.to(torch.bfloat16))


def test_every_kind_of_damage_changes_the_checksum():
    values = bits(64, 512)
    damaged = {"nothing": values}
    for bit in (0, 9, 15):
        for at in ((0, 0), (31, 3), (63, 511)):
            damaged[f"bit {bit} at {at}"] = values.clone()
            damaged[f"bit {bit} at {at}"][at] ^= -(2**15) if bit == 15 else 1 << bit
    for first, second in ((0, 1), (0, 63), (7, 39)):
        damaged[f"rows {first} and {second}"] = swapped = values.clone()
        swapped[[first, second]] = swapped[[second, first]]
    damaged["columns"] = values.roll(64, 1)
    damaged["lanes"] = values.roll(4, 1)
    damaged["a row missing"] = values.clone()
    damaged["a row missing"][5] = 0
    damaged["a row again"] = values.clone()
    damaged["a row again"][6] = values[5]
    assert len({tensor_checksum(each) for each in damaged.values()}) == len(damaged)


def test_errors_that_cancel_out_in_plain_sums_change_the_checksum():
    """Errors in the highest bits of a lane's words count only once or not at all in a sum."""
    values = bits(64, 512)
    sign = torch.tensor(-(2**15), dtype=torch.int16)
    damaged = {"nothing": values}
    for rows in ([0, 1], [0, 63], list(range(64))):
        damaged[f"signs in rows {rows}"] = signs = values.clone()
        signs[rows, 3] ^= sign
    for distance in (4, 64, 128):  # the words' halves, a stripe, two
        damaged[f"signs {distance} apart"] = signs = values.clone()
        signs[5, [3, 3 + distance]] ^= sign
    damaged["every fourth sign"] = signs = values.clone()
    signs[:, 3::4] ^= sign
    damaged["a second difference"] = bent = values.clone()
    bent[[7, 8, 9], 0] += torch.tensor([1, -2, 1], dtype=torch.int16)
    assert len({tensor_checksum(each) for each in damaged.values()}) == len(damaged)

    one_hot = torch.zeros(1024, 64)
    one_hot[torch.arange(1024), torch.arange(1024) % 64] = 1.0
    swapped = one_hot.clone()
    swapped[[0, 16]] = swapped[[16, 0]]
    assert tensor_checksum(one_hot) != tensor_checksum(swapped)


@pytest.mark.parametrize(
    ("triple", "cpu", "store", "fence"),
    [
        ("x86_64-unknown-linux-gnu", "x86-64-v3", r"vmovntdq\s+%ymm", "mfence"),
        ("x86_64-unknown-linux-gnu", "x86-64-v4", r"vmovntdq\s+%zmm", "mfence"),
        ("aarch64-unknown-linux-gnu", "neoverse-v2", r"stnp\s+q", "dmb"),
    ],
)
def test_the_loop_is_vectors_in_registers_on_other_machines(triple, cpu, store, fence):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu)
    assembly = machine.emit_assembly(llvm.parse_assembly(LOOPS))
    copy, rest = assembly.split("read:")
    read, memory_fence = rest.split("memory_fence:")
    assert re.search(store, copy) and not re.search(store, read)
    assert fence in memory_fence
    spilled = r".*mm\d.*%rsp|.*%rsp.*mm\d|.*\bq\d+, \[sp"
    assert not re.search(spilled, assembly)
