"""Stage 4 in small, one real run: general questions and other weights of rewards from a step on,
another number of optimizer steps before it; killed and continued across both."""

import json
import subprocess

import pytest
from command_line import command, environment, run
from run_progress import lines, wait_for_step

from megatron_r1.data.prompts import load_prompts
from megatron_r1.data.sampler import PromptSampler

pytestmark = pytest.mark.more


OWN, GENERAL = "grader:grade", "grader:general"
STEPS = 5


@pytest.fixture(scope="module")
def crossed(base, tmp_path_factory):
    """The folder of a run that was killed at its third step, before general questions are drawn."""
    folder = tmp_path_factory.mktemp("schedule")
    questions = [
        {"question": f"{a}+{b}=", "truth": a + b, "kind": GENERAL if b % 2 else OWN}
        for a in range(10)
        for b in range(10)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "rl.yaml").write_text(
        f"""
run: {{folder: {folder}/run, steps: {STEPS}, seed: 3}}
model: {{path: {base}/base/hf, dtype: float32}}
data: {{path: {folder}/questions.jsonl, heldout_fraction: 0, template: "{{question}}"}}
rollout: {{max_response_tokens: 12, dtype: float32, max_num_seqs: 64}}
rl:
  prompts_per_rollout: 8
  group_size: 2
  minibatches: 2
  reference_refresh: 0
  kind_weights: {{"{GENERAL}": 0}}
  schedule:
    - {{from_step: 3, rl.minibatches: 1, rl.prompts_per_rollout: 4}}
    - from_step: 4
      rl.minibatches: 2
      rl.prompts_per_rollout: 8
      rl.kind_weights: {{}}
      rewards.weights: {{accuracy: 0.5, conciseness: 0.25}}
optimizer: {{learning_rate: 9.0e-4, decay: linear}}
rewards:
  weights: {{accuracy: 1.0, format: 0.1}}
  options: {{conciseness: {{free_length: 0, max_length: 48}}}}
"""
    )
    process = subprocess.Popen(
        command("rl", folder / "rl.yaml"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_step(process, folder / "run", 2)
    finally:
        process.kill()
        process.wait()
    assert lines(folder / "run/metrics.jsonl")[-1]["step"] < STEPS, "killed too late"
    done = run("rl", folder / "rl.yaml")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "continuing after step" in done.stdout and "from step 4: 50" in done.stdout
    return folder


def test_the_questions_are_those_of_an_uninterrupted_run_on_both_sides(crossed):
    prompts = load_prompts(path=crossed / "questions.jsonl", heldout_fraction=0.0).train
    order = PromptSampler(prompts, seed=3)
    samples = lines(crossed / "run/samples.jsonl")
    kinds = {prompt.question: prompt.kind for prompt in prompts}
    for step in range(1, STEPS + 1):
        is_late, count = step >= 4, 4 if step == 3 else 8
        drawn = list(dict.fromkeys(s["question"] for s in samples if s["step"] == step))
        expected = order.next_by_kind(count, {} if is_late else {GENERAL: 0})
        assert drawn == [prompt.question for prompt in expected]
        assert {kinds[question] for question in drawn} == ({OWN, GENERAL} if is_late else {OWN})


def test_rewards_count_as_their_step_says_and_kinds_are_graded_by_their_own(crossed):
    for sample in lines(crossed / "run/samples.jsonl"):
        terms, length = sample["rewards"], len(sample["response"])
        is_odd = length % 2 == 1
        second = int(sample["question"].rstrip("=").split("+")[1])
        assert terms["accuracy"] == float(is_odd == (second % 2 == 0))
        if sample["step"] < 4:
            assert sample["reward"] == pytest.approx(terms["accuracy"] + 0.1 * terms["format"])
        else:
            expected = 0.5 * terms["accuracy"] + 0.25 * terms["conciseness"]
            assert sample["reward"] == pytest.approx(expected)


def test_optimizer_steps_go_on_across_the_kill_and_the_border(crossed):
    metrics = lines(crossed / "run/metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    assert [m["optimizer_step"] for m in metrics] == [2, 4, 5, 7, 9]
    # Linear decay over the 9: the mean of the rates of each rollout's own.
    rates = [9e-4 * (1 - update / 9) for update in range(1, 10)]
    means = [sum(rates[i:j]) / (j - i) for i, j in ((0, 2), (2, 4), (4, 5), (5, 7), (7, 9))]
    assert [m["learning_rate"] for m in metrics] == pytest.approx(means)
    assert max(m["logprob_diff/max"] for m in metrics) < 1e-4
