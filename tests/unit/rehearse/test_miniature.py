"""Miniatures of recipes: an axis that is divided stays divided, and what a run would refuse of the
recipe it refuses of the miniature."""

import json
import random
from pathlib import Path

import pytest
import yaml
from r1_grading import grade
from r1_grading.reading import chain_of_thought
from refusals import refused
from tokenizers import Tokenizer

from megatron_r1.base.errors import Cause, RunError
from megatron_r1.config import Config, load_recipe
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.controller.rollouts.teacher_fleets import count_sources
from megatron_r1.data.prompts import load_prompts
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.weights.layout import recipe_stages
from megatron_r1.plan.push_traffic import traffic_of_sets
from megatron_r1.push.matching import TrainerGrid
from megatron_r1.push.matching.recipe_plan import check_pushes, engine_layout
from megatron_r1.push.matching.tensors import plain_bytes
from megatron_r1.rehearse import engine_sections, layout, miniature, model, synthetic_data
from megatron_r1.rehearse.coverage import structure_rows
from megatron_r1.rehearse.phases import PhaseRunner

ROOT = Path(__file__).parents[3]
RECIPES = [
    path
    for folder in ("deepseek_r1", "distill")
    for path in sorted((ROOT / "examples" / folder).glob("*.yaml"))
    if path.stem not in ("pipeline", "evaluation")
]

PUSHED = [path for path in RECIPES if not path.stem.endswith("_rm")]
"""A reward model has no MTP layers and is not pushed."""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def shrunk(path, overrides=None, max_ranks=16):
    config = load_recipe(path, overrides)
    hf_config = read_hf_config(config.model.path, None)
    return config, miniature.make_miniature(config, hf_config, Path("rehearsal"), max_ranks)


def test_a_push_with_more_links_or_other_bytes_than_its_plan_is_refused(tmp_path):
    config, small = shrunk(ROOT / "examples/deepseek_r1/r1_zero.yaml")
    path = {"path": str(tmp_path), "mtp": config.model.mtp}
    changed = {
        "model": small.config.model.model_copy(update=path),
        "push": small.config.push.model_copy(update={"transport": "gloo"}),
    }
    config = small.config.model_copy(update=changed)
    (tmp_path / "config.json").write_text(json.dumps(small.hf_config))
    stages = recipe_stages(config, small.hf_config)
    grid = TrainerGrid.from_recipe(config.parallel, 16)
    arguments = small.hf_config, grid, engine_layout(config), stages, plain_bytes("bfloat16"), 16
    planned = traffic_of_sets(*arguments, drafts=True)  # as megatron-r1 plan counts
    most, sent = planned.links_per_trainer_rank, sum(planned.sent_bytes)
    phases = PhaseRunner("rl", tmp_path / "recipe.yaml", config, [], 1.0, lambda line: None)
    phases._compare_with_plan(most, sent)
    with pytest.raises(RunError, match=f"{most + 1} .*{most}"):
        phases._compare_with_plan(most + 1, sent)
    with pytest.raises(RunError, match="tensors"):
        phases._compare_with_plan(most, 1.02 * sent)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_axis_that_is_divided_stays_divided(path):
    config, small = shrunk(path)
    for section, axes in {
        "parallel": ("tensor", "context", "expert", "expert_tensor", "pipeline"),
        "rollout": ("engines", "tensor_parallel", "data_parallel", "pipeline_parallel"),
    }.items():
        for axis in axes:
            before = getattr(getattr(config, section), axis)
            after = getattr(getattr(small.config, section), axis)
            assert after == min(before, 2), (section, axis, before, after)
    replicas = [p.data_parallel_size(p.processes) for p in (config.parallel, small.config.parallel)]
    if replicas[0] > 1:
        assert replicas[1] > 1
    assert small.config.parallel.processes <= 16
    small.config.parallel.check_sizes(small.config.parallel.processes)


@pytest.mark.parametrize("path", PUSHED, ids=lambda path: path.stem)
def test_its_own_stages_and_pushes_are_possible(path):
    _, small = shrunk(path)
    assert len(recipe_stages(small.config, small.hf_config)) == small.config.parallel.pipeline
    check_pushes(small.config, small.hf_config, small.config.parallel.processes)


def test_kernels_of_a_gpu_are_left_out_and_named():
    config = load_recipe(
        ROOT / "examples/deepseek_r1/r1_zero.yaml", {"parallel.dispatcher": "flex"}
    )
    hf_config = read_hf_config(config.model.path, None)
    small = miniature.make_miniature(config, hf_config, Path("rehearsal"), 16)
    assert small.config.parallel.dispatcher == "alltoall"
    assert ("parallel.dispatcher", "flex", "alltoall", "no GPU here") in small.changes
    row = next(
        row
        for row in structure_rows(config, hf_config, small.config, "rl")
        if "dispatcher" in row.what
    )
    assert row.exercised == "no: needs a GPU"


@pytest.mark.more
@pytest.mark.parametrize(
    ("agents", "key"),
    [
        ({"environment": "lookup"}, "agents.environment"),
        ({"harness": "json:loads"}, "agents.harness"),
        ({"verifiers": {"taskset": "sums"}}, "agents.verifiers.taskset"),
    ],
)
def test_episodes_are_left_out_and_named(agents, key):
    """The taskset stayed, in a Python of its own, with questions that it does not take."""
    path = ROOT / "examples/distill/qwen2.5-32b_rl.yaml"
    config, small = shrunk(path, {"agents": agents, "data.template": "chat"})
    assert small.config.agents == Config().agents
    row = next(
        row for row in structure_rows(config, {}, small.config, "rl") if "agents" in row.what
    )
    assert (row.what, row.exercised) == (key, "no: random weights call no tool")


def test_adapters_stay_and_are_named():
    path = ROOT / "examples/distill/qwen2.5-math-1.5b.yaml"
    config, small = shrunk(path, {"model.lora": {"rank": 4}})
    assert small.config.model.lora == config.model.lora
    assert ("model.lora", "rank 4", "rank 4", "yes") in structure_rows(
        config, {}, small.config, "sft"
    )


def test_a_layout_that_the_recipe_cannot_push_the_miniature_cannot_either():
    changed = {"model.mtp": "none", "rollout.speculative.method": "none"}
    _, small = shrunk(ROOT / "examples/deepseek_r1/r1_zero.yaml", changed)
    with refused("parallel.pipeline_layout", Cause.CONFLICT):
        check_pushes(small.config, small.hf_config, small.config.parallel.processes)


def test_stages_keep_their_kinds():
    _, small = shrunk(ROOT / "examples/deepseek_r1/r1_zero.yaml")
    assert small.config.parallel.pipeline_layout == "Et|t|tt|tmL"
    assert small.config.parallel.virtual_pipeline == 2
    assert small.hf_config["num_hidden_layers"] == 5
    # 3 and 2 layers in the recipe: still one more in the first stage.
    _, uneven = shrunk(ROOT / "examples/deepseek_r1/helpful_rm.yaml")
    assert uneven.config.parallel.pipeline_layout == "Ett|tL"
    assert (
        small.hf_config["n_routed_experts"] == 8
        and small.hf_config["num_nextn_predict_layers"] == 1
    )
    # vLLM's latent attention on CPUs takes these only.
    assert (small.hf_config["kv_lora_rank"], small.hf_config["qk_rope_head_dim"]) == (512, 64)


@pytest.mark.parametrize(
    ("sizes", "processes"),
    [
        ({"processes": 8, "tensor": 4}, 4),
        ({"processes": 64, "tensor": 8, "context": 2, "pipeline": 2}, 16),
        # Experts over all replicas: two of them, though the dense part would do with one.
        ({"processes": 16, "expert": 16}, 2),
        ({"processes": 32, "expert": 8, "expert_tensor": 4}, 4),
        ({"processes": 1}, 1),
    ],
)
def test_ranks(sizes, processes):
    small = layout.shrink_layout(ParallelConfig(**sizes), 16)
    assert small.processes == processes
    small.check_sizes(processes)


def test_replicas_are_what_is_left_out_first():
    parallel = ParallelConfig(processes=64, tensor=2, context=2, pipeline=2)
    assert layout.shrink_layout(parallel, 16).processes == 16
    small = layout.shrink_layout(parallel, 8)
    assert (small.processes, small.tensor, small.context, small.pipeline) == (8, 2, 2, 2)


def test_more_ranks_than_allowed_are_refused():
    parallel = ParallelConfig(processes=64, tensor=2, context=2, pipeline=2)
    with refused("rehearsal.max_ranks", Cause.OUT_OF_RANGE, 4, 8):
        layout.shrink_layout(parallel, 4)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_resumed_run_has_another_layout(path):
    parallel = layout.shrink_layout(load_recipe(path).parallel, 16)
    other = layout.different_layout(parallel)
    assert other != parallel
    other.check_sizes(other.processes)
    assert layout.num_layers(other) == layout.num_layers(parallel)


def test_the_resumed_run_has_fewer_and_smaller_engines():
    _, small = shrunk(ROOT / "examples/deepseek_r1/r1_zero.yaml")
    spread = small.config.rollout.model_copy(update={"placement": "hosts", "hosts_per_engine": 2})
    fewer = layout.fewer_engine_ranks(spread)
    assert fewer == {"engines": 1, "data_parallel": 1, "hosts_per_engine": 1}
    assert layout.fewer_engine_ranks(spread.model_copy(update=fewer)) == {}


def test_changes_name_every_setting_that_differs():
    config, small = shrunk(ROOT / "examples/deepseek_r1/r1_zero.yaml")
    changed = {change[0] for change in small.changes}
    for section in Config.model_fields:
        before, after = getattr(config, section), getattr(small.config, section)
        for key, value in before:
            assert (f"{section}.{key}" in changed) == (getattr(after, key) != value)
    assert "config.json hidden_size" in changed
    # What decides how a run behaves is not among them.
    kept = (
        "rollout.expert_parallel",
        "rollout.colocated",
        "rollout.speculative",
        "model.mtp",
        "rl.clip_low",
        "model.dtype",
    )
    assert not changed & set(kept)


def test_random_text_often_has_the_form_of_a_response(tmp_path):
    """By chance two of 56 had, and a sampling recipe goes through only if one is kept."""
    draw = random.Random(0)
    hf_config = read_hf_config(ROOT / "examples/deepseek_r1/model", None)
    model.write_random_model_folder(
        tmp_path, model.shrink_config(hf_config, num_layers=2, fp8=False), seed=0
    )
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [
        tokenizer.decode(
            [draw.randrange(model.VOCABULARY_SIZE) for _ in range(engine_sections.RESPONSE_TOKENS)]
        )
        for _ in range(200)
    ]
    formed = [bool(chain_of_thought(text)) and "<answer>" in text for text in texts]
    assert 40 <= sum(formed) <= 90


def test_a_drafter_that_drafts_nothing_is_named():
    _, small = shrunk(ROOT / "examples/deepseek_r1/r1_zero.yaml")
    run = PhaseRunner("rl", Path("r/recipe.yaml"), small.config, [], 60.0, print)
    lines = [
        {"step": step, "logprob_diff/mean": 0.0, "grad_norm": 1.0, "response_length/max": length}
        for step, length in ((1, 12), (2, 24))
    ]
    with pytest.raises(RunError, match=r"rollout.speculative.method: mtp"):
        run._show_pushes(lines)


def test_a_judge_that_is_not_served_is_no_term_of_the_reward():
    later = {"from_step": 9, "rewards.weights": {"judge": 1.0}}
    settings = {
        "rewards.weights": {"accuracy": 1.0, "judge": 0.5, "safety": 0.5},
        "rewards.options.judge": {"url": "http://judge:8000", "model": "m"},
        "rewards.options.safety": {"url": "http://safety:8000", "model": "m"},
        "rl.schedule": [later],
    }
    config, small = shrunk(ROOT / "examples/distill/qwen2.5-32b_rl.yaml", settings)
    assert small.config.rewards.weights == {"accuracy": 1.0, "safety": 0.5}
    assert small.config.rewards.options.keys() == {"safety"}
    assert small.config.at(2).rewards.weights == {"accuracy": 1.0}
    rows = {row.what: row.exercised for row in structure_rows(config, {}, small.config, "rl")}
    assert rows["rewards.options.judge"] == "no: none is served"
    assert rows["rewards.options.safety"] == "yes"


def test_a_critic_that_warms_up_leaves_steps_for_the_policy():
    ppo = {"rl.algorithm": "ppo", "critic.warmup_steps": 40, "critic.path": "a/model"}
    _, small = shrunk(ROOT / "examples/distill/qwen2.5-32b_rl.yaml", ppo)
    assert (small.config.critic.warmup_steps, small.config.critic.path) == (1, "rehearsal/model")
    run = PhaseRunner("rl", Path("r/recipe.yaml"), small.config, [], 60.0, print)
    step = {"logprob_diff/mean": 0.0, "time/rollout": 1.0, "time/train": 1.0, "time/push": 1.0}
    run._show_pushes([step | {"step": 1}, step | {"step": 2, "grad_norm": 1.5}])
    assert "gradient norms –, 1.5" in run.results[0].evidence
    with pytest.raises(RunError, match="zero"):
        run._show_pushes([step | {"step": 1}, step | {"step": 2, "grad_norm": 0.0}])


def test_microbatches_take_no_more_memory_than_the_recipes():
    """With responses of 24 tokens it was 158,378 tokens, 12 GiB of activations."""
    shape = {"model.path": str(ROOT / "examples/distill/models/llama-3.1-8b")}
    _, short = shrunk(ROOT / "examples/smollm2/rl.yaml", shape)
    assert short.config.parallel.tokens_per_microbatch == 16_384
    _, long = shrunk(ROOT / "examples/deepseek_r1/r1_zero.yaml")
    room = long.config.rollout.max_model_len
    assert long.config.parallel.tokens_per_microbatch == 9_216 * room // 67_584


def test_a_long_template_has_room():
    template = "Example: 48 + 37 = 85. " * 40 + "{question} ="
    _, small = shrunk(ROOT / "examples/distill/qwen2.5-32b_rl.yaml", {"data.template": template})
    tokens = len(model._train_tokenizer().encode(template.replace("{question}", "15 + 16 =")).ids)
    rollout = small.config.rollout
    assert tokens > engine_sections.PROMPT_TOKENS
    assert rollout.max_model_len >= tokens + rollout.max_response_tokens
    _, ours = shrunk(ROOT / "examples/distill/qwen2.5-32b_rl.yaml")
    assert (
        ours.config.rollout.max_model_len
        == engine_sections.PROMPT_TOKENS + engine_sections.RESPONSE_TOKENS
    )


def test_longer_responses_of_the_schedule_are_sampled():
    """The second step's limit is twice the first's, and it is noticed if it is not applied."""
    _, small = shrunk(ROOT / "examples/deepseek_r1/r1_zero.yaml")
    run = PhaseRunner("rl", Path("r/recipe.yaml"), small.config, [], 60.0, print)

    def lines(*lengths):
        return [{"step": i, "response_length/max": n} for i, n in enumerate(lengths, start=1)]

    run._show_schedule(lines(12, 24.0, 23.0))
    assert run.results[-1].phase == "schedule" and "[12, 24, 23]" in run.results[-1].evidence
    for wrong in (lines(12, 12, 12), lines(24, 24, 24)):
        with pytest.raises(RunError, match=r"rl\.schedule: .*\[12, 24, 24\]"):
            run._show_schedule(wrong)


def test_files_that_sample_reads_are_left_out():
    given = {"sample.decontaminate": ["none.jsonl"], "sample.shots": "none.jsonl"}
    _, small = shrunk(ROOT / "examples/deepseek_r1/rejection_sampling.yaml", given)
    sample = small.config.sample
    assert sample.decontaminate == [] and sample.shots is None


def test_every_teacher_has_a_small_model_and_questions(tmp_path):
    recipe = yaml.safe_load((ROOT / "examples/distill/qwen2.5-math-7b_on_policy.yaml").read_text())
    recipe["teacher"]["by_source"] = {"gsm8k": {"path": "m", "url": ["http://there:8000"]}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    _, small = shrunk(file)
    teacher = small.config.teacher
    assert teacher.by_source["gsm8k"].url == [] and teacher.by_source["gsm8k"].path != teacher.path
    path = tmp_path / "questions.jsonl"
    synthetic_data.write_questions(path, 4, [], list(teacher.by_source))
    assert [json.loads(line)["data_source"] for line in path.open()] == ["", "gsm8k"] * 2


def test_many_teachers_all_have_questions(tmp_path, monkeypatch):
    recipe = yaml.safe_load((ROOT / "examples/distill/qwen2.5-math-7b_on_policy.yaml").read_text())
    recipe["teacher"]["by_source"] = {f"s{n}": {"path": "m"} for n in range(11)}
    recipe["data"]["where"] = {"level": 3}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    config = load_recipe(file)
    small = miniature.make_miniature(config, read_hf_config(config.model.path), tmp_path, 16)
    assert small.config.data.where == {}
    monkeypatch.setattr(model, "write_random_model_folder", lambda *_, **__: None)
    miniature.write_miniature(small, "rl")
    prompts = load_prompts(path=small.config.data.path, num_heldout=small.config.data.num_heldout)
    counts = count_sources(small.config.teacher, prompts.train)
    assert counts.keys() == {"", *small.config.teacher.by_source}


def test_stage_4_asks_reward_models_from_its_last_part_on(tmp_path):
    _, small = shrunk(ROOT / "examples/deepseek_r1/all_scenarios_rl.yaml")
    first, middle, last = (small.config.at(step) for step in (1, 2, 3))
    assert first.rl.kind_weights == middle.rl.kind_weights == {"helpful": 0, "safety": 0}
    assert last.rl.kind_weights == {} and last.rl.minibatches == first.rl.minibatches == 2
    assert middle.rl.minibatches == 1
    path = tmp_path / "questions.jsonl"
    synthetic_data.write_questions(path, 6, miniature._other_kinds(small.config))
    rows = [json.loads(line) for line in path.open()]
    kinds = [row["kind"] for row in rows]
    assert all(grade("language", "<think>so it is</think>", **row).reward == 1 for row in rows)
    assert kinds == [synthetic_data.KIND, "helpful", "safety"] * 2
