"""What the null GPU itself does: memory, copies, and torch's operators on the host."""

from importlib import metadata
from pathlib import Path

import pytest
from nullgpu.conftest import TORCHRUN
from packaging.requirements import Requirement

from megatron_r1.base.processes.process_memory import trainer_allocator
from tests.nullgpu import counters

ROOT = Path(__file__).parents[2]

COPIES = """
import torch
assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
assert torch.cuda.device_count() == 1 and "null" in torch.cuda.get_device_name()
tensor = torch.arange(5.0).cuda()
assert tensor.is_cuda and tensor.cpu().tolist() == [0, 1, 2, 3, 4]
assert (tensor + 1).cpu().tolist() == [0] * 5, "kernels do not run"
assert torch.empty(3).pin_memory().is_pinned()
free, total = torch.cuda.mem_get_info()
held = torch.empty(2**30, dtype=torch.uint8, device="cuda")
assert total == 80 * 2**30 and free - torch.cuda.mem_get_info()[0] >= 2**30
"""
OPERATORS = """
import torch
from host_compute import HostCompute
with HostCompute():
    torch.manual_seed(0)
    x = torch.randn(4, 6).cuda().requires_grad_()
    w = torch.full((6, 3), 0.5, device="cuda")
    loss = torch.log_softmax(x @ w, -1)[:, 0].sum() + x.bfloat16().float().square().mean()
    loss.backward()
    on_gpu = [loss.detach().cpu(), x.grad.cpu()]
    x = x.detach().cpu().requires_grad_()
loss = torch.log_softmax(x @ torch.full((6, 3), 0.5), -1)[:, 0].sum()
loss = loss + x.bfloat16().float().square().mean()
loss.backward()
torch.testing.assert_close(on_gpu, [loss.detach(), x.grad])
a, b = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16()
with HostCompute():
    product = torch.mm(a.cuda(), b.cuda(), out_dtype=torch.float32).cpu()
    with torch.inference_mode():
        converted = a.cuda().double().cpu()
torch.testing.assert_close(product, a.float() @ b.float())
torch.testing.assert_close(converted, a.double())
"""
COUNTS = """
import torch
from counters import labelled
from host_compute import HostCompute
values = torch.arange(2**20).pin_memory()
with labelled("no wait"):
    on_gpu = values.to("cuda", non_blocking=True)
    back = torch.empty_like(values, device="cpu", pin_memory=True)
    back.copy_(on_gpu, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
with labelled("an event"):
    event.synchronize()
assert torch.equal(back, values)
with labelled("a number"):
    on_gpu[5].item()
with labelled("the device"):
    torch.cuda.synchronize()
with labelled("the CPU"):
    on_gpu.cpu()
held = torch.empty(5 * 2**20 + 1, dtype=torch.uint8).pin_memory()
"""
SHAPES = """
import torch
from counters import labelled
from host_compute import HostCompute
rows = torch.tensor([2, 0]).cuda()
with HostCompute():
    x = torch.arange(6.0, device="cuda").view(3, 2)
    mask = x > 2
    with labelled("known shapes"):
        x[rows], x[1:], torch.where(mask, x, 0.0), x.masked_fill(mask, 0.0)
        x.repeat_interleave(rows.new_full((3,), 2), 0, output_size=6)
        x.to(torch.float64, non_blocking=True)
        x[mask] = 0.0
        x[mask[:, 0], :] = 1.0
    for name, compute in {
        "nonzero": lambda: mask.nonzero(),
        "a mask": lambda: x[mask],
        "a mask written": lambda: x.index_put_((mask,), x.new_zeros(())),
        "indices of the CPU": lambda: x[torch.tensor([1])],
        "repeated": lambda: x.repeat_interleave(rows.new_full((3,), 2), 0),
        "unique": lambda: rows.unique(),
        "equal": lambda: torch.equal(x, x + 1),
        "converted": lambda: x.to("cpu", torch.float64),
    }.items():
        with labelled(name):
            compute()
"""
FREED = """
import torch
from host_compute import HostCompute, on_host
with HostCompute():
    scales = torch.ones(1000, device="cuda")
    kept = on_host(scales)
    assert kept.sum() == 1000
    del scales
    assert kept.isnan().all()
"""
PINNED = """
import torch
torch.cuda.synchronize()
torch.empty(21 * 2**30, dtype=torch.uint8, pin_memory=True)
"""
OF_THE_CPU = [
    "return False",
    "patch.install()  # imports what it changes",
    "keep_freed_memory()",
    'warnings.filterwarnings("ignore", module=r"megatron\\.core\\.")',
    "return tensor",
]


def test_memory_is_the_hosts_copies_are_real_and_kernels_do_nothing(on_null_gpu):
    on_null_gpu("-c", COPIES)


def test_waits_of_the_host_and_memory_are_counted(on_null_gpu, tmp_path):
    on_null_gpu("-c", COUNTS, NULL_GPU_COUNTERS=str(tmp_path / "counters"))
    (found,) = counters.read(tmp_path / "counters")
    assert counters.waits(found, "no wait") == {}
    assert counters.waits(found, "an event") == {"event": 1}
    assert counters.waits(found, "a number")["stream"] == 1
    assert counters.waits(found, "the device") == {"device": 1}
    assert counters.waits(found, "the CPU")["stream"] == 1
    # 8 MiB twice, and 5 MiB as torch rounds it.
    assert found["pinned_peak_bytes"] >= 3 * 8 * 2**20


def test_operators_on_the_host_wait_where_cudas_do(on_null_gpu, tmp_path):
    on_null_gpu("-c", SHAPES, NULL_GPU_COUNTERS=str(tmp_path / "counters"))
    (found,) = counters.read(tmp_path / "counters")
    by_label = {row["label"]: counters.waits(found, row["label"]) for row in found["waits"]}
    waits = {
        label: sum(kinds.values()) - kinds.get("operator", 0) for label, kinds in by_label.items()
    }
    names = "nonzero,a mask,a mask written,indices of the CPU,repeated,unique,equal,converted"
    assert {name: waits.get(name) for name in names.split(",")} == dict.fromkeys(
        names.split(","), 1
    )
    assert not waits.get("known shapes")


def test_memory_that_torch_frees_without_caching_is_nan(on_null_gpu):
    on_null_gpu("-c", FREED, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def test_by_default_a_pinned_buffer_of_21_gib_takes_32_of_the_host(on_null_gpu, tmp_path):
    counted = {"NULL_GPU_COUNTERS": str(tmp_path / "counters")}
    on_null_gpu("-c", PINNED, NULL_GPU_PINNED_BYTES=str(33 * 2**30), **counted)
    (found,) = counters.read(tmp_path / "counters")
    assert 32 * 2**30 <= found["pinned_peak_bytes"] < 33 * 2**30
    with pytest.raises(pytest.fail.Exception) as failed:
        on_null_gpu("-c", PINNED, NULL_GPU_PINNED_BYTES=str(31 * 2**30))
    assert "out of memory" in str(failed.value)


def test_a_trainer_s_pinned_buffer_takes_what_it_has(on_null_gpu, tmp_path):
    counted = {"NULL_GPU_COUNTERS": str(tmp_path / "counters")}
    allocator = trainer_allocator({})
    on_null_gpu("-c", PINNED, NULL_GPU_PINNED_BYTES=str(22 * 2**30), **counted, **allocator)
    (found,) = counters.read(tmp_path / "counters")
    assert 21 * 2**30 <= found["pinned_peak_bytes"] < 22 * 2**30


def test_torchs_operators_can_be_computed_on_the_host(on_null_gpu):
    on_null_gpu("-c", OPERATORS)


def test_what_is_installed_is_the_lock_and_complete(on_null_gpu):
    for line in (ROOT / "requirements" / "cuda.lock").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert metadata.version(name) == version, name
    built, core = (metadata.version(f"transformer-engine{end}") for end in ("-torch", ""))
    assert built == core
    on_null_gpu("-m", "pip", "check")


def test_nvcc_and_its_headers_are_those_that_cudas_release_names():
    wanted = {
        need.name: need.specifier
        for need in map(Requirement, metadata.requires("cuda-toolkit"))
        if any(need.marker.evaluate({"extra": extra}) for extra in ("nvcc", "cccl", "nvrtc"))
    }
    assert {"nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-cccl"} <= wanted.keys()
    found = {name: metadata.version(name) for name in wanted}
    assert not {name: found[name] for name in wanted if found[name] not in wanted[name]}


@pytest.mark.parametrize("gpus", [2, 4])
def test_collectives_and_messages_move_data_between_processes(on_null_gpu, gpus):
    printed = on_null_gpu(*TORCHRUN, f"--nproc-per-node={gpus}", "collectives.py", gpus=gpus)
    assert printed.count("all are right") == gpus


@pytest.mark.parametrize(
    ("what", "message"),
    [("unequal", "another collective than rank 0's"), ("shared", "another rank has the same GPU")],
)
def test_ranks_that_disagree_or_share_a_gpu_are_refused(on_null_gpu, what, message):
    # Each in a torchrun of its own: a second process group of the same name can read the id of the
    # first in the launcher's store, and its ranks then wait for each other in two groups.
    assert message in on_null_gpu(*TORCHRUN, "--nproc-per-node=2", "collectives.py", what, gpus=2)


def test_a_send_that_is_not_received_ends_by_torchs_time_limit(on_null_gpu):
    printed = on_null_gpu(*TORCHRUN, "--nproc-per-node=2", "collectives.py", "unreceived", gpus=2)
    assert "the send is released" in printed


def test_every_line_of_the_platforms_gpu_side_is_run(on_null_gpu):
    printed = on_null_gpu("platform_lines.py")
    number, *missed = printed[printed.index("lines run") - 3 :].splitlines()
    assert int(number.split()[0]) > 20
    assert missed == OF_THE_CPU
