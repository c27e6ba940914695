import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_r1 import config as configuration
from megatron_r1.cli import main
from megatron_r1.config.loading import parse_overrides
from megatron_r1.config.losses import LossSettings
from megatron_r1.errors import UserError
from megatron_r1.trainer_client.schedule import learning_rate
from megatron_r1.workflow.pipeline_recipe import load as load_pipeline

ROOT = Path(__file__).parents[3]


def recipe(tmp_path, tree):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_defaults_are_the_papers_r1_zero():
    c = configuration.Config()
    assert (c.optimizer.learning_rate, c.rl.clip_high, c.rl.kl_beta) == (3e-6, 10.0, 0.001)
    assert c.rl.questions_per_rollout * c.rl.group_size == 8_192
    assert c.rl.questions_per_rollout * c.rl.group_size / c.rl.minibatches == 512
    assert c.run.steps * c.rl.minibatches == 10_400
    assert (c.rl.reference_refresh, c.rollout.max_response_tokens) == (400, 32_768)
    assert (c.rewards.weights["accuracy"], c.rewards.weights["format"]) == (1.0, 0.1)


def test_a_preset_fills_what_the_recipe_leaves_out(tmp_path):
    path = recipe(tmp_path, {"rl": {"preset": "grpo_v1", "kl_beta": 0.02}})
    c = configuration.load(path)
    assert (c.rl.group_size, c.rl.clip_low, c.rl.kl_beta) == (64, 0.2, 0.02)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"rl": {"group_sise": 8}}, "did you mean rl.group_size?"),
        ({"optimizer": {"lr": 1e-3}}, "unknown key optimizer.lr"),
        ({"rl": {"learning_rate": 1e-3}}, "did you mean optimizer.learning_rate?"),
        ({"rollouts": {}}, "did you mean rollout?"),
        ({"eval": {"benchmarks": ["gym/logic", {"name": "mmlu", "sample": 3}]}},
         "unknown key eval.benchmarks.1.sample; did you mean eval.benchmarks.1.samples?"),
        ({"eval": {"benchmarks": [{"name": "mmlu", "zest": 3}]}},
         "unknown key eval.benchmarks.0.zest; eval.benchmarks.0 has name, label, path, files,"),
        ({"eval": {"server": {"url": "http://a", "modle": "m"}}}, "did you mean eval.server.model"),
        ({"eval": {"server": {"url": "http://a"}}}, "eval.server.model must be set"),
        ({"optimizer": {"lr": 1e-3}}, "unknown key optimizer.lr; optimizer has learning_rate, min"),
        ({"parallel": {"microbatch_size": 8}}, "; did you mean parallel.tokens_per_microbatch?"),
        ({"eval": {"benchmarks": "questions"}}, "got 'questions'; in brackets: [questions]"),
        ({"eval": {"temperature": 0}}, "greater than 0, got 0; 0.01 decodes nearly greedily"),
        ({"rl": {"group_size": "many"}}, "rl.group_size: input should be a valid integer"),
        ({"rl": {"kl_beta": math.inf}}, "rl.kl_beta: input should be a finite number, got inf"),
        ({"optimizer": {"learning_rate": math.inf}}, "optimizer.learning_rate: input should be a"),
        ({"rl": {"group_size": 1}}, "greater than or equal to 2, got 1"),
        ({"model": {"checkpoint": "a/b", "init": "random"}},
         "model.checkpoint: a/b would not be read with model.init: random"),
        ({"rl": {"minibatches": 7}}, "rl.minibatches: 7 does not divide the 8192 responses"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_names_itself_and_the_remedy(tmp_path, wrong, right):
    with pytest.raises(UserError) as error:
        configuration.load(recipe(tmp_path, wrong))
    assert right in str(error.value)


def test_what_is_written_is_what_is_read(tmp_path):
    c = configuration.Config(rl={"group_size": 8})
    path = tmp_path / "c.yaml"
    path.write_text(configuration.dump(c))
    assert configuration.load(path) == c


def test_overrides_are_yaml_values_of_dotted_keys():
    options = ["--rl.group_size", "8", "--data.task=chain_sum", "--model.path", "a b"]
    expected = {"rl.group_size": 8, "data.task": "chain_sum", "model.path": "a b"}
    assert parse_overrides(options) == expected
    with pytest.raises(ValueError, match="did you mean --rl.group_size"):
        parse_overrides(["--group_size", "8"])
    with pytest.raises(
        ValueError, match="--pipeline.statu needs a value; did you mean --pipeline.st"
    ):
        parse_overrides(["--pipeline.statu"], {"pipeline.status"})
    for options in (["--rl.group_size"], ["--rl.group_size", "--rl.kl_beta", "0"]):
        with pytest.raises(ValueError, match="--rl.group_size needs a value"):
            parse_overrides(options)
    assert parse_overrides(["--data.template=--{problem}"]) == {"data.template": "--{problem}"}


@pytest.mark.parametrize(
    ("layout", "of_critic"),
    [("Et|t|m*1L", "Et|t|L"), ("Et|tm*2L", "Et|tL"), ("E(tm)*2L", "E(t)*2L")],
)
def test_a_critic_has_no_mtp_layers_in_its_layout(layout, of_critic):
    critic = configuration.parse({"parallel": {"pipeline_layout": layout}}).of_critic()
    assert critic.parallel.pipeline_layout == of_critic


def test_every_recipe_in_the_repository_is_valid():
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        if path.name == "published.yaml":  # figures of the paper
            continue
        is_pipeline = "\nstages:" in path.read_text(encoding="utf-8")
        (load_pipeline if is_pipeline else configuration.load)(path)


def test_a_template_is_text_and_a_switch_needs_no_value():
    assert parse_overrides(["--data.template", "{problem}"]) == {"data.template": "{problem}"}
    assert parse_overrides(["--a.b", "{x: null}"]) == {"a.b": {"x": None}}
    options = ["--pipeline.dry", "--pipeline.only", "base", "--pipeline.status"]
    switches = {"pipeline.dry", "pipeline.status"}
    expected = {"pipeline.dry": True, "pipeline.only": "base", "pipeline.status": True}
    assert parse_overrides(options, switches) == expected


def test_all_keys_with_their_defaults_are_a_recipe_that_changes_nothing(capsys):
    assert main(["keys"]) == 0
    tree = {}
    for line in capsys.readouterr().out.splitlines():
        key, _, default = line.partition("   # ")[0].partition(": ")
        *sections, leaf = key.split(".")
        of_others = (
            sections and sections[0] in ("pipeline", "stages", "rehearsal", "preflight")
        ) or not sections
        if of_others or "[]" in key or default == "(required)" or key.startswith("eval.server"):
            continue  # entries of what is empty by default
        if key.startswith(("sample.server", "model.lora.")):
            continue
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[leaf] = yaml.safe_load(default)
    assert configuration.parse(tree) == configuration.Config()
    assert set(configuration.Config.model_fields) == tree.keys()


def test_every_key_has_a_meaning(capsys):
    assert main(["keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 200
    assert [line for line in lines if not line.partition("   # ")[2]] == []


def test_keys_of_one_section(capsys):
    assert main(["keys", "sample.keep", "pipeline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sample.keep.min_accuracy: 1.0   # ")
    assert any(line.startswith("pipeline.seeds: []") for line in lines)
    assert {line.partition(".")[0] for line in lines} == {"sample", "pipeline"}
    assert main(["keys", "rewardz"]) == 2
    assert "did you mean rewards?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rl", "nowhere.yaml"], "recipe nowhere.yaml: no such file"),
        (["rl", str(Path(__file__).parent)], "is a folder; name a file in it"),
        (["train", "x.yaml"], "unknown verb train"),
        (["rl"], "rl needs a recipe"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_exit_status_two(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_missing_setting_is_named(tmp_path, capsys):
    assert main(["rl", str(recipe(tmp_path, {}))]) == 2
    assert "run.folder, model.path must be set" in capsys.readouterr().err


def test_learning_rate_warms_up_and_decays_to_the_minimum():
    settings = configuration.OptimizerConfig(
        learning_rate=1.0, min_learning_rate=0.1, warmup=4, decay="linear"
    )
    rates = [learning_rate(settings, step, 14) for step in (1, 4, 9, 14, 99)]
    assert rates == pytest.approx([0.25, 1.0, 0.55, 0.1, 0.1])
    cosine = settings.model_copy(update={"decay": "cosine"})
    assert learning_rate(cosine, 9, 14) == pytest.approx(0.55)
    assert learning_rate(configuration.OptimizerConfig(), 5_000, 10_400) == 3e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rl: {}\nrun: {steps: 3}\nrl: {kl_beta: 0.1}\n", "rl is there twice, in lines 1 and 3"),
        ("rl:\n  group_size: 4\n  group_size: 8\n", "group_size is there twice, in lines 2 and 3"),
        ("rl: [\n", "not YAML"),
    ],
)  # fmt: skip
def test_no_line_of_a_recipe_is_ignored(tmp_path, text, message):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        configuration.load(path)
    with pytest.raises(ValueError, match=message):
        load_pipeline(path)


def test_a_merge_may_bring_a_key_that_is_set_beside_it(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("run:\n  <<: &one {steps: 3, seed: 1}\n  steps: 5\noptimizer: {warmup: 2}\n")
    loaded = configuration.load(path)
    assert (loaded.run.steps, loaded.run.seed) == (5, 1)


def test_keys_that_may_change_when_a_run_continues():
    """They change how long, how often or where a run computes; all others decide its result."""
    expected = {
        "run": "folder steps trackers project log_samples hang_seconds on_hang "
        "max_trainer_restarts health_port",
        "model": "attention_backend fusions",
        "push": "transport memory_gib delta full_every timeout_seconds probes probe_tolerance",
        "agents": "environment_processes",
        "rl": "sample_log schedule",
        "rollout": "engines placement hosts_port hosts_address host_silence_seconds "
        "hosts_per_engine tensor pipeline data expert_parallel colocated gpu_memory max_restarts "
        "unresponsive_seconds threads speculative kv_block_tokens",
        "teacher": "url engines tensor pipeline data expert_parallel gpu_memory max_num_seqs "
        "tokens_at_once threads max_restarts unresponsive_seconds",
        "rewards": "options.helpful.url options.judge.url options.safety.url workers max_ungraded",
    }
    keys = [f"{section}.{key}" for section, names in expected.items() for key in names.split()]
    assert sorted(configuration.RESUMABLE) == sorted([*keys, "checkpoint", "eval", "parallel"])


def test_settings_of_losses_are_read_as_mappings_too():
    settings = configuration.Config().rl.loss_settings(8)
    assert settings["kl_beta"] == settings.kl_beta
    changed = LossSettings.of({**settings, "objective": "cispo"})
    assert changed == replace(settings, objective="cispo") and LossSettings.of(changed) is changed


def test_an_option_below_a_key_that_is_null_makes_it_a_section(tmp_path):
    """A run's config.yaml has every key, also those that are null."""
    path = tmp_path / "config.yaml"
    path.write_text(configuration.dump(configuration.Config()))
    server = {"eval.server.url": "http://x", "eval.server.model": "m"}
    c = configuration.load(path, {"model.lora.rank": 8, **server})
    assert (c.model.lora.rank, c.eval.server.url) == (8, "http://x")
    with pytest.raises(UserError, match="--run.steps.x: steps is not a section"):
        configuration.load(path, {"run.steps.x": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {a: {verb: make, arguments: {source: ${here}/x}}}\n", "it has stages: run it"),
        ("stages: {}\n", "it has stages: run it with megatron-r1 pipeline"),
        ("run: {folder: ${here}/x}\n", "not YAML"),
    ],
)
def test_a_pipeline_is_named_as_one_whatever_its_references(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        configuration.load(tmp_path / "recipe.yaml")
