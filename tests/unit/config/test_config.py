import contextlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from refusals import refused

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause
from megatron_r1.commands.cli import main
from megatron_r1.config.keys import describe_keys
from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.config.optimizer import learning_rate
from megatron_r1.config.overrides import parse_overrides
from megatron_r1.config.setting_keys import is_within
from megatron_r1.pipeline.pipeline_recipe import load_pipeline

ROOT = Path(__file__).parents[3]
REFUSED = yaml.safe_load(Path(__file__).with_name("refused.yaml").read_text(encoding="utf-8"))


def recipe(tmp_path, tree):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_defaults_are_the_papers_r1_zero():
    c = configuration.Config()
    assert (c.optimizer.learning_rate, c.rl.clip_high, c.rl.kl_beta) == (3e-6, 10.0, 0.001)
    assert c.rl.prompts_per_rollout * c.rl.group_size == 8_192
    assert c.rl.prompts_per_rollout * c.rl.group_size / c.rl.minibatches == 512
    assert c.run.steps * c.rl.minibatches == 10_400
    assert (c.rl.reference_refresh, c.rollout.max_response_tokens) == (400, 32_768)
    assert (c.rewards.weights["accuracy"], c.rewards.weights["format"]) == (1.0, 0.1)


def test_a_preset_fills_what_the_recipe_leaves_out(tmp_path):
    path = recipe(tmp_path, {"rl": {"preset": "grpo_v1", "kl_beta": 0.02}})
    c = configuration.load_recipe(path)
    assert (c.rl.group_size, c.rl.clip_low, c.rl.kl_beta) == (64, 0.2, 0.02)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: yaml.safe_dump(case["recipe"])[:60])
def test_a_wrong_key_or_value_names_itself_and_the_remedy(case):
    with refused(case["key"], Cause(case["cause"]), *case.get("shows", ())):
        configuration.parse_recipe(case["recipe"])


def test_what_is_written_is_what_is_read(tmp_path):
    c = configuration.Config(rl={"group_size": 8})
    path = tmp_path / "c.yaml"
    path.write_text(configuration.dump_recipe(c))
    assert configuration.load_recipe(path) == c


def test_overrides_are_yaml_values_of_dotted_keys():
    options = ["--rl.group_size", "8", "--data.task=chain_sum", "--model.path", "a b"]
    expected = {"rl.group_size": 8, "data.task": "chain_sum", "model.path": "a b"}
    assert parse_overrides(options) == expected
    with refused("--group_size", Cause.UNKNOWN, "--rl.group_size"):
        parse_overrides(["--group_size", "8"])
    with refused("--pipeline.statu", Cause.MISSING, "--pipeline.status"):
        parse_overrides(["--pipeline.statu"], {"pipeline.status"})
    for options in (["--rl.group_size"], ["--rl.group_size", "--rl.kl_beta", "0"]):
        with refused("--rl.group_size", Cause.MISSING):
            parse_overrides(options)
    assert parse_overrides(["--data.template=--{question}"]) == {"data.template": "--{question}"}


@pytest.mark.parametrize(
    ("layout", "critic_run_config"),
    [("Et|t|m*1L", "Et|t|L"), ("Et|tm*2L", "Et|tL"), ("E(tm)*2L", "E(t)*2L")],
)
def test_a_critic_has_no_mtp_layers_in_its_layout(layout, critic_run_config):
    critic = configuration.parse_recipe(
        {"parallel": {"pipeline_layout": layout}}
    ).critic_run_config()
    assert critic.parallel.pipeline_layout == critic_run_config


def test_a_critic_is_trained_whole():
    config = configuration.parse_recipe({"model": {"lora": {"rank": 8}}})
    assert config.critic_run_config().model.lora is None
    assert config.model.lora.scale == 4.0


def test_every_recipe_in_the_repository_is_valid():
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        if path.name == "published.yaml":  # figures of the paper
            continue
        is_pipeline = "\nstages:" in path.read_text(encoding="utf-8")
        (load_pipeline if is_pipeline else configuration.load_recipe)(path)


def test_a_template_is_text_and_a_switch_needs_no_value():
    assert parse_overrides(["--data.template", "{question}"]) == {"data.template": "{question}"}
    assert parse_overrides(["--a.b", "{x: null}"]) == {"a.b": {"x": None}}
    options = ["--pipeline.dry", "--pipeline.only", "base", "--pipeline.status"]
    switches = {"pipeline.dry", "pipeline.status"}
    expected = {"pipeline.dry": True, "pipeline.only": "base", "pipeline.status": True}
    assert parse_overrides(options, switches) == expected


@pytest.fixture(scope="module")
def key_lines():
    """What `megatron-r1 keys` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["keys"]) == 0
    return printed.getvalue().splitlines()


def test_all_keys_with_their_defaults_are_a_recipe_that_changes_nothing(key_lines):
    tree = {}
    for line in key_lines:
        key, _, default = line.partition("   # ")[0].partition(": ")
        *sections, leaf = key.split(".")
        of_others = (
            sections and sections[0] in ("pipeline", "stages", "rehearsal", "preflight")
        ) or not sections
        of_entry = "[]" in key or ".NAME." in key
        if of_others or of_entry or default == "(required)" or key.startswith("eval.server"):
            continue  # entries of what is empty by default
        if key.startswith(("sample.server", "model.lora.")):
            continue
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[leaf] = yaml.safe_load(default)
    assert configuration.parse_recipe(tree) == configuration.Config()
    assert set(configuration.Config.model_fields) == tree.keys()


def test_every_key_has_a_meaning(key_lines):
    assert len(key_lines) > 200
    assert [line for line in key_lines if not line.partition("   # ")[2]] == []


def test_keys_of_one_section(capsys):
    assert main(["keys", "sample.keep", "pipeline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sample.keep.min_accuracy: 1.0   # ")
    assert any(line.startswith("pipeline.seeds: []") for line in lines)
    assert {line.partition(".")[0] for line in lines} == {"sample", "pipeline"}
    with refused("rewardz", Cause.UNKNOWN, "rewards"):
        describe_keys([configuration.Config], ["rewardz"])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["rl", "nowhere.yaml"], "nowhere.yaml"),
        (["rl", str(Path(__file__).parent)], str(Path(__file__).parent)),
        (["train", "x.yaml"], "train"),
        (["rl"], "rl"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_status_two(capsys, arguments, name):
    assert main(arguments) == 2
    assert name in capsys.readouterr().err.splitlines()[0]


def test_a_recipe_that_is_no_file_and_a_missing_setting_are_named(tmp_path):
    with refused("recipe", Cause.NOT_FOUND, "nowhere.yaml"):
        configuration.load_recipe("nowhere.yaml")
    with refused("recipe", Cause.MALFORMED, tmp_path):
        configuration.load_recipe(tmp_path)
    with refused("run.folder", Cause.MISSING, "model.path"):
        configuration.load_recipe(recipe(tmp_path, {}), required=("run.folder", "model.path"))


def test_learning_rate_warms_up_and_decays_to_the_minimum():
    settings = configuration.OptimizerConfig(
        learning_rate=1.0, min_learning_rate=0.1, warmup_updates=4, decay="linear"
    )
    rates = [learning_rate(settings, step, 14) for step in (1, 4, 9, 14, 99)]
    assert rates == pytest.approx([0.25, 1.0, 0.55, 0.1, 0.1])
    cosine = settings.model_copy(update={"decay": "cosine"})
    assert learning_rate(cosine, 9, 14) == pytest.approx(0.55)
    assert learning_rate(configuration.OptimizerConfig(), 5_000, 10_400) == 3e-6


@pytest.mark.parametrize(
    ("text", "key", "cause", "lines"),
    [
        ("rl: {}\nrun: {steps: 3}\nrl: {kl_beta: 0.1}\n", "rl", Cause.DUPLICATE, (1, 3)),
        ("rl:\n  group_size: 4\n  group_size: 8\n", "group_size", Cause.DUPLICATE, (2, 3)),
        ("rl: [\n", "", Cause.MALFORMED, ()),
    ],
)
def test_no_line_of_a_recipe_is_ignored(tmp_path, text, key, cause, lines):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    for load, role in ((configuration.load_recipe, "recipe"), (load_pipeline, "pipeline recipe")):
        with refused(key or role, cause, *lines):
            load(path)


@pytest.mark.parametrize("text", ["rl: {kl_beta: 0.1", "rl:\n\tkl_beta: 0.1", "rl: \x07"])
def test_what_is_no_yaml_is_named_by_its_file(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with refused("recipe", Cause.MALFORMED, 'in "mine.yaml"'):
        configuration.load_recipe(tmp_path / "mine.yaml")


def test_a_merge_may_bring_a_key_that_is_set_beside_it(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text(
        "run:\n  <<: &one {steps: 3, seed: 1}\n  steps: 5\noptimizer: {warmup_updates: 2}\n"
    )
    loaded = configuration.load_recipe(path)
    assert (loaded.run.steps, loaded.run.seed) == (5, 1)


def test_keys_that_may_change_when_a_run_continues():
    """They change how long, how often or where a run computes; all others decide its result.
    `vllm` may do either: an engine that runs out of memory must be given another argument."""
    expected = {
        "run": "folder readable_by steps trackers project log_samples hang_seconds on_hang "
        "max_trainer_restarts health_port",
        "model": "attention_backend fusions",
        "push": "transport timeout_seconds probes probe_tolerance",
        "agents": "environment_processes",
        "rl": "keep_sample_log sample_log schedule",
        "rollout": "engines placement hosts_port hosts_address host_silence_seconds "
        "hosts_per_engine tensor_parallel pipeline_parallel data_parallel expert_parallel "
        "colocated gpu_memory max_restarts unresponsive_seconds threads speculative "
        "kv_block_tokens redundant_experts vllm",
        "teacher": "url engines tensor_parallel pipeline_parallel data_parallel expert_parallel "
        "gpu_memory max_num_seqs max_num_batched_tokens threads max_restarts "
        "unresponsive_seconds vllm",
        "rewards": "options.helpful.url options.judge.url options.safety.url workers max_ungraded",
    }
    keys = [f"{section}.{key}" for section, names in expected.items() for key in names.split()]
    keys += [f"teacher.by_source.*.{key}" for key in expected["teacher"].split()]
    assert sorted(configuration.RESUMABLE) == sorted([*keys, "checkpoint", "eval", "parallel"])


@pytest.mark.parametrize(
    ("key", "may_change"),
    [
        ("teacher.by_source.math.engines", True),
        ("teacher.by_source.openai/gsm8k.url", True),
        ("teacher.by_source.a.b.vllm.kv_cache_dtype", True),
        ("teacher.by_source.math.path", False),
        ("teacher.by_source.math.engines_of", False),
        ("teacher.by_source", False),
    ],
)
def test_settings_of_each_teacher_may_change_as_those_of_one(key, may_change):
    assert is_within(key, configuration.RESUMABLE) is may_change


def test_a_runs_config_of_an_earlier_version_loads_without_keys_that_were_removed(tmp_path):
    stored = configuration.Config().model_dump(mode="json")
    stored["push"] |= {"delta": False, "full_every": 50, "memory_gib": None, "probes": 5}
    c = configuration.load_recipe(recipe(tmp_path, stored))
    assert c == configuration.Config().with_changes(push={"probes": 5})


def test_settings_of_losses_are_read_as_mappings_too():
    settings = configuration.Config().rl.loss_settings(8)
    assert settings["kl_beta"] == settings.kl_beta
    changed = LossSettings.of({**settings, "objective": "cispo"})
    assert changed == replace(settings, objective="cispo") and LossSettings.of(changed) is changed


def test_an_option_below_a_key_that_is_null_makes_it_a_section(tmp_path):
    """A run's config.yaml has every key, also those that are null."""
    path = tmp_path / "config.yaml"
    path.write_text(configuration.dump_recipe(configuration.Config()))
    server = {"eval.server.url": "http://x", "eval.server.model": "m"}
    c = configuration.load_recipe(path, {"model.lora.rank": 8, **server})
    assert (c.model.lora.rank, c.eval.server.url) == (8, "http://x")
    with refused("--run.steps.x", Cause.CONFLICT, "steps"):
        configuration.load_recipe(path, {"run.steps.x": 1})


@pytest.mark.parametrize(
    ("text", "key", "cause"),
    [
        ("stages: {a: {verb: make, arguments: {x: ${here}/x}}}\n", "stages", Cause.CONFLICT),
        ("stages: {}\n", "stages", Cause.CONFLICT),
        ("run: {folder: ${here}/x}\n", "recipe", Cause.MALFORMED),
    ],
)
def test_a_pipeline_is_named_as_one_whatever_its_references(tmp_path, text, key, cause):
    (tmp_path / "recipe.yaml").write_text(text)
    with refused(key, cause):
        configuration.load_recipe(tmp_path / "recipe.yaml")


def test_a_section_s_settings_are_the_file_of_its_name():
    fields = configuration.Config.model_fields
    homes = {name: field.annotation.__module__ for name, field in fields.items()}
    assert homes == {name: f"megatron_r1.config.{name}" for name in homes}
