"""The cells of the study: a model, a mismatch between engine and trainer, and a correction of it.

Every cell trains the same base model of its task with the demo's settings, made small. A part
is a mismatch, and its cells are corrections; the others are compared with its first. Bounds and
caps are the defaults and what docs/algorithms.md names with them."""

from dataclasses import dataclass, field
from typing import Any

from tools.bench.small_models import qwen2

Settings = dict[str, dict[str, Any]]
"""Sections of a recipe."""

NONE = "none"
"""The name of a cell without a correction."""


@dataclass(frozen=True)
class Task:
    """A base model and the recipe that all cells of it share.

    Attributes:
        model: config.json of the base model, which is trained on the demo's corpus.
        about: words for the page."""

    model: dict[str, Any]
    about: str


TASKS = {
    "dense": Task(qwen2(128, 2, 4), "a dense model of Qwen2's shape: 2 layers, hidden size 128"),
    "moe": Task(
        qwen2(
            hidden=128,
            layers=3,
            heads=4,
            architectures=["Qwen3MoeForCausalLM"],
            model_type="qwen3_moe",
            head_dim=32,
            attention_bias=False,
            moe_intermediate_size=64,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        ),
        "a mixture of experts of Qwen3-MoE's shape: 3 layers of 8 experts, 2 of them active, "
        "hidden size 128",
    ),
}

COMMON_SETTINGS: Settings = {
    "run": {"steps": 24},
    "data": {"num_train": 400, "num_heldout": 100},
    "rollout": {"max_response_tokens": 40},
    "rl": {
        "prompts_per_rollout": 8,
        "group_size": 8,
        "minibatches": 4,
        "reference_refresh": 0,
        "sample_log": False,
    },
    "optimizer": {
        "learning_rate": 2.0e-4,
        "min_learning_rate": 2.0e-5,
        "warmup_updates": 4,
    },
    "eval": {"every": 0, "samples": 4},
    "checkpoint": {"every": 1_000},
}
"""What differs from examples/laptop/r1_zero.yaml in every cell."""

MISMATCH: dict[str, Settings] = {
    NONE: {},
    "importance_cap": {"rl": {"importance_cap": 2.0}},
    "token": {"rl": {"engine_mask": "token", "importance_cap": 5.0}},
    "sequence": {"rl": {"engine_mask": "sequence"}},
    "divergence": {"rl": {"engine_mask": "divergence", "importance_cap": 20.0}},
}
"""Corrections of a difference between engine and trainer, compared with each other."""
BF16: Settings = {"rollout": {"dtype": "bfloat16"}}
REPLAY: Settings = {"rl": {"routing_replay": True}}


@dataclass(frozen=True)
class Part:
    """Cells that differ in their correction alone.

    Attributes:
        about: the mismatch, for the page.
        cells: by the correction's name, what it sets; the first is compared with the others.
        settings: what all cells of the part set.
        task: a name in `TASKS`.
        engine_temperature: planted: engines sample at this temperature, and the trainer knows
            nothing of it; None: at the recipe's, as they should.
        without_kept_ids: planted in this cell: the trainer gets no sampling mask from the engines
            and computes over the whole vocabulary; None: in no cell."""

    about: str
    cells: dict[str, Settings] = field(default_factory=lambda: MISMATCH)
    settings: Settings = field(default_factory=dict)
    task: str = "dense"
    engine_temperature: float | None = None
    without_kept_ids: str | None = None


def _cells_of_setting(section: str, key: str, *values: str) -> dict[str, Settings]:
    """Return a cell for each value of a setting."""
    return {value: {section: {key: value}} for value in values}


PARTS = {
    "bf16": Part("engines in bfloat16, trainer in float32", settings=BF16),
    "temperature": Part(
        "planted: engines sample at temperature 1.25, the trainer computes at 1",
        engine_temperature=1.25,
    ),
    "stale": Part(
        "`rl.staleness: 4`, which needs an `importance_cap`",
        cells={
            "importance_cap": MISMATCH["importance_cap"],
            "token": MISMATCH["token"],
            "sequence": {"rl": {"engine_mask": "sequence", "importance_cap": 2.0}},
            "divergence": MISMATCH["divergence"],
        },
        settings={"rl": {"staleness": 4}},
    ),
    "moe": Part(
        "engines in bfloat16, trainer in float32",
        cells={
            **MISMATCH,
            "replay": REPLAY,
            "replay + importance_cap": {"rl": {"routing_replay": True, "importance_cap": 2.0}},
        },
        settings=BF16,
        task="moe",
    ),
    "limit": Part(
        "`rollout.max_response_tokens: 19`, fewer than many sums that are worked out take",
        cells={NONE: {}, "truncated: mask": {"rl": {"truncated": "mask"}}},
        settings={"rollout": {"max_response_tokens": 19}},
    ),
    "kl": Part(
        "`kl_beta: 0.05`, `minibatches: 8`",
        cells={"k3": {}, **_cells_of_setting("rl", "kl_estimator", "k2", "unbiased")},
        settings={"rl": {"kl_beta": 0.05, "minibatches": 8}},
    ),
    "cut": Part(
        "`rollout.top_p: 0.8`, `top_k: 20`; `without kept ids`, planted: the trainer computes over "
        "the whole vocabulary",
        cells={"kept ids": {}, "without kept ids": {}},
        settings={"rollout": {"top_p": 0.8, "top_k": 20}},
        without_kept_ids="without kept ids",
    ),
    "cut-masked": Part(
        "as `cut`, with `engine_mask: sequence`, which masks responses whose engine and trainer "
        "differ",
        cells={"kept ids": {}, "without kept ids": {}},
        settings={"rollout": {"top_p": 0.8, "top_k": 20}, **MISMATCH["sequence"]},
        without_kept_ids="without kept ids",
    ),
    "rewards": Part(
        "two rewards of one weight, accuracy and format",
        cells={"sum": {}, "each": {"rl": {"reward_normalization": "each"}}},
        settings={"rewards": {"weights": {"accuracy": 1.0, "format": 1.0}}},
    ),
}
"""By the name that --part takes."""
