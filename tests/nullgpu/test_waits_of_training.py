"""What the host waits for, on null GPUs, in steps of a trainer that is split as at 671B.

That is pipeline with virtual stages, expert parallelism over context ranks or over tensor ranks
with sequence parallelism, packed samples, MTP layers, whole layers recomputed; in float32, and in
FP8 blocks as examples/deepseek_r1/r1_zero_fp8.yaml has them; with less recomputed, and with the
experts' exchange behind computation.

Steps of 2 and of 4 micro-batches, and models of 4 and of 8 layers, are compared, so that what is
waited for once per step cancels out."""

import json
from pathlib import Path

import pytest
from nullgpu import counters
from nullgpu.conftest import TORCHRUN
from nullgpu.random_weights import write_random
from small_models import DEEPSEEK

LAYOUT = {
    "pipeline": 2,
    "virtual_pipeline": 2,
    "expert": 2,
    "recompute": "full",
    "tokens_per_microbatch": 80,
}
PASSES = ("load", "logprobs", "compare", "update")
PRECISIONS = {
    "float32": {"dtype": "float32", "fp8": {"recipe": "none"}},
    "bfloat16": {"dtype": "bfloat16", "fp8": {"recipe": "none"}},
    "fp8": {"dtype": "bfloat16", "fp8": {"recipe": "blockwise", "scales": "float32"}},
}
WHOLE_BLOCKS = {
    **{"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128},
    **{"q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "v_head_dim": 32},
}
"""Sizes of a model whose weights are whole blocks of 128 x 128."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[tuple[str, int], str]:
    """Models by precision and number of layers, the first without experts, with an MTP layer."""
    folder = tmp_path_factory.mktemp("models")
    shapes = {
        (precision, n): {
            **DEEPSEEK,
            **(WHOLE_BLOCKS if precision == "fp8" else {}),
            "num_hidden_layers": n,
            "num_nextn_predict_layers": 1,
        }
        for precision in ("float32", "fp8")
        for n in (4, 8)
    }
    return {
        (precision, n): str(write_random(folder / f"{precision}-{n}", shape))
        for (precision, n), shape in shapes.items()
    }


def waits(on_null_gpu, folder: Path, cases: list[dict], gpus: int = 4) -> list[dict]:
    """Run the cases; returns of each rank {"LABEL pass": {kind: number}}."""
    script = ["waits_of_training.py", json.dumps(cases), str(folder)]
    settings = {
        "NULL_GPU_COUNTERS": str(folder / "counters"),
        "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1",
    }
    on_null_gpu(*TORCHRUN, f"--nproc-per-node={gpus}", *script, gpus=gpus, **settings)
    ranks = []
    for process in counters.read(folder / "counters"):
        labels = {row["label"] for row in process["waits"]}
        if any(label.startswith(cases[0]["label"]) for label in labels):
            ranks.append({label: counters.waits(process, label) for label in labels})
    assert len(ranks) == gpus
    return ranks


def per_unit(rank: dict, of: str, base: str, more: str, units: int) -> dict[str, float]:
    """Waits per unit, by kind, of which the case `more` has `units` more than `base`."""
    few, many = (rank.get(f"{label} {of}", {}) for label in (base, more))
    kinds = (few.keys() | many.keys()) - {"operator", "creation"}
    found = {kind: (many.get(kind, 0) - few.get(kind, 0)) / units for kind in sorted(kinds)}
    return {kind: number for kind, number in found.items() if number}


def places(folder: Path, label: str) -> str:
    """The lines of Python that waited under labels that begin so, for a failure's message."""
    rows = [row for file in folder.glob("*.json") for row in _rows(file)]
    found = [row for row in rows if row["label"].startswith(label)]
    return "\n".join(
        f"{row['number']} {row['label']}: {row['what']} in {row['of']}" for row in found
    )


def _rows(file: Path) -> list[dict]:
    found = json.loads(file.read_text())
    return found if isinstance(found, list) else []


LESS_RECOMPUTED = {"recompute": "selective", "recompute_modules": ["core_attn", "mla_up_proj"]}
OVERLAPPED = {"recompute": "none", "overlap_expert_exchange": True}
CASES = {
    "context": ({"context": 2}, "float32", False),
    "context, replayed": ({"context": 2}, "float32", True),
    "tensor": ({"tensor": 2}, "float32", False),
    "tensor, replayed": ({"tensor": 2}, "float32", True),
    "FP8": ({"context": 2}, "fp8", False),
    "FP8, replayed": ({"context": 2}, "fp8", True),
    "less recomputed, replayed": ({"context": 2, **LESS_RECOMPUTED}, "float32", True),
    "overlapped, replayed": ({"context": 2, **OVERLAPPED}, "bfloat16", True),
}
"""What each case changes of the layout, its precision, and whether experts are replayed."""


@pytest.mark.parametrize(("changes", "precision", "replay"), CASES.values(), ids=CASES)
def test_the_host_waits_per_micro_batch_only_for_counts_that_it_does_not_know(
    on_null_gpu, models, tmp_path, changes, precision, replay
):
    """Twice per layer of experts in log-probabilities, and once in an update.

    In these the routers of the policy and of the reference choose themselves; the reference's
    alone where the engine's choices are replayed. Nothing per hop, per layer that is recomputed, or
    per MTP layer but its experts'."""
    layout = {**LAYOUT, **changes}
    folders = "fp8" if precision == "fp8" else "float32"
    common = {"parallel": layout, "mtp": "frozen" if replay else "train", "replay": replay}
    common |= PRECISIONS[precision]
    cases = [
        {
            "label": f"{layers} x {number}",
            "model": models[folders, layers],
            "microbatches": number,
            **common,
        }
        for layers, number in ((4, 2), (4, 4), (8, 2))
    ]
    ranks = waits(on_null_gpu, tmp_path, cases)
    passes = 1 if replay else 2
    # Two layers a rank, on one pipeline rank one of them without experts, on the other also MTP's.
    for rank in ranks:
        found = {of: per_unit(rank, of, "4 x 2", "4 x 4", 2) for of in PASSES}
        experts = found["logprobs"].get("event", 0) / passes
        assert experts in (1, 2), places(tmp_path, "4 x 4")
        mtp = 0 if replay or experts == 1 else 1
        expected = {"load": {}, "logprobs": {"event": passes * experts}, "compare": {}}
        expected["update"] = {} if replay else {"event": experts + mtp}
        assert found == expected, places(tmp_path, "4 x 4")
        # Two more layers a rank and two micro-batches.
        deeper = {of: per_unit(rank, of, "4 x 2", "8 x 2", 4) for of in PASSES}
        updates = {} if replay else {"event": 1}
        # `logprob_diff/without_replay` is of the first micro-batches, whose routers choose again.
        expected = {"load": {}, "logprobs": {"event": 2}, "compare": {}, "update": updates}
        assert deeper == expected, places(tmp_path, "8 x 2")


def test_recomputed_mtp_layers_have_their_gradients_in_fp8(on_null_gpu, models):
    script = ["recomputed_mtp.py", models["fp8", 4]]
    settings = {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}
    norms = json.loads(on_null_gpu(*TORCHRUN, *script, **settings).splitlines()[-1])
    assert norms["none"] and min(norms["none"].values()) > 0
    assert norms["full"] == pytest.approx(norms["none"], rel=1e-3)
