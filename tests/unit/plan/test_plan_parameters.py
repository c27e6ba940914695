"""Counts of parameters, against published figures and the weight table."""

import json
import math
import subprocess
import sys

import pytest
from planned_jobs import LLAMA_405B, QWEN_72B, V3, real_job

from megatron_r1.models import weights
from megatron_r1.plan.counts import ModelCounts, RankCounts


@pytest.mark.more
def test_the_configuration_is_deepseek_v3_s_as_transformers_knows_it():
    code = (
        "import json; from transformers import DeepseekV3Config\n"
        "print(json.dumps(DeepseekV3Config().to_dict()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    theirs = json.loads(done.stdout)
    ours = {name: V3[name] for name in V3.keys() & theirs.keys()}
    differing = {name for name, value in ours.items() if value != theirs[name]}
    # The published file allows 163,840 = 40 x 4,096 tokens by YaRN; the default is without.
    assert differing == {"architectures", "max_position_embeddings", "transformers_version"}
    assert (
        V3["rope_scaling"]["factor"] * V3["rope_scaling"]["original_max_position_embeddings"]
        == (V3["max_position_embeddings"])
    )
    assert V3["quantization_config"]["weight_block_size"] == [128, 128]


@pytest.mark.parametrize(
    "count, published",
    [
        # DeepSeek-V3's README_WEIGHTS.md: 671B; 36.6B active, the head's 0.9B among them; MTP 11.5B
        # of its own, "14B of the Multi-Token Prediction (MTP) Module weights" with its copies.
        ("num_total", 671e9),
        ("num_multiplied", 36.6e9),
        ("mtp_own", 11.5e9),
        ("num_active", 37e9),
    ],
)
def test_deepseek_v3_has_its_published_parameters(count, published):
    assert getattr(ModelCounts(V3), count) == pytest.approx(published, rel=0.02)


def test_the_released_685b_are_671b_and_the_mtp_layers_with_their_copies():
    counts = ModelCounts(V3)
    assert counts.num_total == 671_026_419_200
    assert round(counts.mtp / 1e9) == 13 and round((counts.num_total + counts.mtp) / 1e9) == 684
    # Two copies: of the embedding and of the head.
    assert counts.mtp - counts.mtp_own == 2 * 129_280 * 7168


@pytest.mark.parametrize("hf_config", [V3, LLAMA_405B, {**QWEN_72B, "tie_word_embeddings": True}])
def test_counts_are_those_of_the_weight_table(hf_config):
    main_model = weights.hf_tensors(hf_config, with_mtp=False)
    assert ModelCounts(hf_config).num_total == sum(
        math.prod(shape) for shape, _ in main_model.values()
    )
    every = weights.hf_tensors(hf_config)
    assert ModelCounts(hf_config).num_total + ModelCounts(hf_config).mtp == sum(
        math.prod(shape) for shape, _ in every.values()
    )


def test_every_rank_s_count_is_its_layout_s():
    job = real_job(tensor=2, context=4, expert=4)
    counts = RankCounts(job)
    for rank in (0, 3, 15):
        expected = 0
        for chunk in job.pipeline_stages[rank]:
            at = {"tp": (0, 2), "ep": (0, 4), "etp": (0, 1)}
            entries = weights.parameter_layout(V3, weights.Shard(**{**vars(chunk), **at}))
            expected += sum(math.prod(entry.shape) for entry in entries.values())
        found = counts.rank_counts(rank)
        assert found.parameters + found.buffers == expected, rank
