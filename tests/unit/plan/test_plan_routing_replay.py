"""What routing replay moves and keeps, by hand: DeepSeek-V3 has 58 layers of 8 experts, a byte
each."""

import pytest
from planned_jobs import ROOT, V3, planned

from megatron_r1 import config as configuration
from megatron_r1.models import read_hf_config
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.trainer.sample_encoding import encode_samples
from megatron_r1.trainer.training_sample import Sample

SAMPLES, MEAN, LONGEST = 8192, 512 + 8192, 512 + 32_768
TOKEN = 58 * 8
REPLICAS, TCP = 16, 1.6e9


def sections(**changed) -> dict:
    estimate = JobEstimate(planned(**changed))
    assert estimate.problems() == []
    return estimate.sections()


def test_a_token_takes_on_the_way_to_its_replica_what_the_plan_counts():
    """One token more: an id, a log-probability, and a row of experts."""

    def message(num_tokens: int) -> int:
        sample = Sample.pack(
            [1], range(num_tokens), [0.0] * num_tokens, 1.0, bytes(TOKEN * num_tokens)
        )
        return sum(map(len, encode_samples([[[sample]]])[1:]))

    rows = sections(rl__routing_replay=True)["samples of a rollout"]
    each = (rows["routed experts"].value + rows["ids, log-probabilities"].value) / SAMPLES
    sampled, given = message(2000) - message(1999), 512 * (TOKEN + 4)
    assert each == 8192 * sampled + given


@pytest.mark.more
def test_bytes_of_routed_experts_by_place():
    rows = sections(rl__routing_replay=True)["samples of a rollout"]
    sent = SAMPLES * MEAN * TOKEN
    assert rows["routed experts"].value == sent
    # The issue of TMPDIR: a rollout in which every response has 32,768 tokens.
    assert rows["at most"].value == SAMPLES * LONGEST * TOKEN == pytest.approx(126.5e9, rel=1e-3)
    assert rows["into the controller"].value == SAMPLES * MEAN * 61 * 8  # zeros of 3 dense layers
    assert rows["into a replica"].value == sent / REPLICAS
    part = sent / REPLICAS / 128
    # 16 stages x 8 ranks of tensor and context parallelism, which mark their tokens by a byte.
    each = part + SAMPLES / REPLICAS * MEAN / 8
    assert rows["into another rank's host"].value == pytest.approx(each, abs=1)
    own = SAMPLES / REPLICAS * MEAN / 2 / 4 * 4 * 8  # context 2, tensor 4; 4 layers on a rank
    assert rows["on a trainer's GPU"].value == own
    assert rows["in the sample log"].value == 15 * sent  # 3 checkpoints, each of 5 steps
    without = sections(rl__routing_replay=True, rl__sample_log=False)["samples of a rollout"]
    assert "in the sample log" not in without


def test_a_node_s_host_holds_the_longest_of_one_replica_and_its_ranks_parts():
    """The eight ranks of tensor and context parallelism are a node; one leads the replica."""
    first, *_, last = JobEstimate(planned(rl__routing_replay=True)).ranks
    replica = SAMPLES * LONGEST * TOKEN / REPLICAS
    assert 8 * first.host["routed experts"] == pytest.approx(replica + 8 * replica / 128, rel=1e-6)
    assert 8 * last.host["routed experts"] == pytest.approx(8 * replica / 128, rel=1e-6)
    host = sections(rl__routing_replay=True)["host memory of a node"]
    assert host["routed experts"].value == 8 * last.host["routed experts"], "of the fullest node"
    assert "routed experts" not in sections(rl__routing_replay=False)["host memory of a node"]


def waits_spared(on: dict, off: dict) -> float:
    """The seconds of a step in which the host waits for counts that replay knows.

    In four layers of each of 256 micro-batches it waits 0.2 ms for logprobs and in training, over
    1 - bubble."""
    once = 4 * 256 * 200e-6
    spared = sum(off[name].value - on[name].value for name in ("logprobs", "training"))
    assert spared == pytest.approx(once * (527 / 512 + 47 / 32))
    return spared


def test_a_step_waits_for_the_controller_and_for_the_first_rank_of_a_replica():
    """It cuts and sends 127 of 128 parts, and a byte for each token of the other ranks."""
    on, off = (sections(rl__routing_replay=value)["time"] for value in (True, False))
    sent = SAMPLES * MEAN * TOKEN
    part = sent / REPLICAS / 128 + SAMPLES / REPLICAS * MEAN / 8
    seconds = sent / TCP + 127 * part / 0.87e9
    assert on["routed experts"].value == pytest.approx(seconds)
    assert on["step"].value == pytest.approx(off["step"].value + seconds - waits_spared(on, off))
    assert on["share of routed experts"].value == pytest.approx(seconds / on["step"].value)
    assert "routed experts" not in off and "share of routed experts" not in off
    assert on["step"].formula.startswith("rollout + routed experts + ")


@pytest.mark.more
def test_beside_a_rollout_of_other_gpus_it_is_the_trainer_s_time():
    pools = {"rollout_gpus": 2048, "rollout__colocated": False, "rl__staleness": 1}
    pools |= {"rollout__gpu_memory": 0.7}  # a push over nccl needs the rest
    on, off = (sections(rl__routing_replay=value, **pools)["time"] for value in (True, False))
    waits = on["routed experts"].value - waits_spared(on, off)
    assert on["step"].value == pytest.approx(off["step"].value + waits / 2)  # of two steps' time


@pytest.mark.more
def test_models_of_more_than_256_experts_take_two_bytes():
    large = V3 | {"n_routed_experts": 384}
    config = configuration.load_recipe(ROOT / "examples/deepseek_r1/r1_zero.yaml")
    estimate = JobEstimate(PlannedJob(large, config, 2048, HARDWARE["H800"]))
    rows = estimate.sections()["samples of a rollout"]
    assert rows["routed experts"].value == 2 * SAMPLES * MEAN * TOKEN


def test_a_dense_model_has_none_and_importance_weights_send_nothing_more():
    recipe = ROOT / "examples/distill/qwen2.5-32b_rl.yaml"
    config = configuration.load_recipe(recipe, {"rl.importance_cap": 2.0})
    hf_config = read_hf_config(ROOT / "examples/distill/models/qwen2.5-32b")
    job = PlannedJob(hf_config, config, config.parallel.processes, HARDWARE["H800"])
    (row,) = JobEstimate(job).sections()["samples of a rollout"].values()
    assert row.formula.endswith("rl.importance_cap reads these")
    plain = PlannedJob(
        hf_config, configuration.load_recipe(recipe), config.parallel.processes, job.hardware
    )
    assert (
        row.value
        == JobEstimate(plain).sections()["samples of a rollout"]["ids, log-probabilities"].value
    )
