"""An algorithm outside the package: the one that docs/algorithms.md shows, and its mistakes."""

import math
import re
import sys
from functools import partial
from pathlib import Path

import algorithm_formulae as formulae
import algorithm_problem
import msgspec
import pytest
import torch
from algorithm_problem import EXACT, LIMIT, Problem, check, ours
from refusals import refused

from megatron_r1.base.errors import Cause, RunError
from megatron_r1.config import RLConfig, dump_recipe, load_recipe, parse_recipe
from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.controller import algorithms
from megatron_r1.trainer.loss_head import LossHead

PAGE = Path(__file__).parents[4] / "docs/algorithms.md"


def blocks(language):
    text = PAGE.read_text(encoding="utf-8").partition("## Add one in one file")[2]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder in which modules may be written; they are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def raft(folder):
    (folder / "raft.py").write_text(blocks("python")[0], encoding="utf-8")
    (folder / "mine.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    return load_recipe("mine.yaml").rl


def test_the_recipe_of_the_page_has_the_defaults_of_the_file(raft):
    assert (raft.algorithm, raft.group_size) == ("raft:RULES", 8)
    assert (raft.advantage_std, raft.minibatches, raft.kl_beta) == ("none", 1, 0.0)
    assert raft.loss_settings(8).kl_beta == 0.0
    config = load_recipe("mine.yaml", {"rl.kl_beta": 0.1})
    Path("config.yaml").write_text(dump_recipe(config), encoding="utf-8")
    assert load_recipe("config.yaml") == config and config.rl.kl_beta == 0.1
    with refused("rl.advantage_std", Cause.CONFLICT, "raft:RULES"):
        load_recipe("mine.yaml", {"rl.advantage_std": "group"})


def test_the_test_of_the_page_passes(raft):
    names = {}
    exec(compile(blocks("python")[1], str(PAGE), "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_its_loss_and_gradients_are_those_of_its_formula(raft):
    def best(responses):
        chosen = {}
        for o in responses:
            rewards = formulae.rewards_of(responses, o.group)
            if o.reward is not None and o.reward == rewards.max() != rewards.min():
                chosen.setdefault(o.group, o)
        return formulae.same_for_all_tokens(responses, lambda o: float(chosen.get(o.group) is o))

    def weighted(o, a):
        return formulae.clipped(o, a, 10.0, 10.0)

    check("raft:RULES", {"minibatches": 2}, best, weighted, "sequence")


@pytest.fixture
def sapo(folder, monkeypatch):
    """The page's module; its head stores π_old at the first update, as the trainer's does."""
    head = partial(LossHead, stores_old_logprobs=True)
    monkeypatch.setattr(algorithm_problem, "LossHead", head)
    (folder / "sapo.py").write_text(blocks("python")[2], encoding="utf-8")
    return "sapo:RULES"


def test_the_own_loss_of_the_page_is_its_formula(sapo):
    def gated(o, a):
        tau = torch.where(a > 0, torch.ones_like(a), 1.05)
        return 4 / tau / (1 + (-tau * ((o.new - o.old).exp() - 1)).exp()) * a

    problem = Problem()
    advantages = formulae.group_relative(problem.responses)
    for step, (loss, gradient, terms, _) in enumerate(ours(problem, sapo, {})):
        graded = [i for i in problem.minibatches[step] if problem.rewards[i] is not None]
        responses = [problem.responses[i] for i in graded]
        expected = formulae.loss(responses, [advantages[i] for i in graded], gated, "token", LIMIT)
        expected.backward(retain_graph=True)
        torch.testing.assert_close(gradient, problem.gradients(), **EXACT)
        torch.testing.assert_close(loss, expected.detach(), **EXACT)
        means = [term.metrics["loss"] for term in terms]
        assert loss.item() == pytest.approx(
            sum(m.total.item() for m in means) / sum(m.count.item() for m in means)
        )


def test_the_own_loss_of_the_page_without_its_gate_learns_as_grpo(sapo):
    """The limit of small τ is ρ A, as GRPO's inside its clip; without KL."""
    flat = {"options": {"tau_up": 1e-6, "tau_down": 1e-6}}
    shipped = {"loss_average": "token", "kl_beta": 0.0}
    problem = Problem()
    made = [gradient for _, gradient, *_ in ours(problem, sapo, flat)]
    wanted = [gradient for _, gradient, *_ in ours(problem, "grpo", shipped)]
    gate = [gradient for _, gradient, *_ in ours(problem, sapo, {})]
    torch.testing.assert_close(made, wanted, **EXACT)
    torch.testing.assert_close(gate[0], wanted[0], **EXACT)  # ρ is 1
    assert not torch.allclose(gate[1], wanted[1], rtol=1e-3)


def test_losses_and_token_advantages_reach_the_trainer_as_names(folder):
    (folder / "several.py").write_text(
        "from megatron_r1.config.algorithms import AlgorithmRules\n"
        "PLAIN, CRITIC = AlgorithmRules(), AlgorithmRules(critic=True)\n"
        "def loss(batch, head, settings): ...\n"
        "def token_advantages(rollout, settings): ...\n"
    )
    plain = algorithms.find_algorithm("several:PLAIN")
    critic = algorithms.find_algorithm("several:CRITIC")
    assert plain.loss == critic.loss == "several:loss"
    assert plain.token_advantages == "several:token_advantages"
    assert (plain.rules.critic, critic.rules.critic) == (False, True)
    rewards = [[1.0, 0.0, 0.5]]
    assert plain.outcome_advantages(rewards, RLConfig()) == algorithms.find_algorithm(
        "grpo"
    ).outcome_advantages(rewards, RLConfig())


def test_options_of_its_own_have_defaults_and_reach_its_functions(folder):
    (folder / "top.py").write_text(
        "from megatron_r1.config.algorithms import AlgorithmRules\n"
        "RULES = AlgorithmRules(options={'keep': 0.25, 'ties': False})\n"
        "def advantages(groups, rl):\n"
        "    return [[float(r >= sorted(g)[-int(len(g) * rl.options['keep'])]) for r in g]\n"
        "            for g in groups]\n"
    )
    given = {"algorithm": "top:RULES", "options": {"keep": 0.5}}
    rl = RLConfig(**given)
    assert rl.options == {"keep": 0.5, "ties": False}
    assert algorithms.find_algorithm("top:RULES").outcome_advantages(
        [[1.0, 4.0, 3.0, 2.0]], rl
    ) == [[0, 1, 1, 0]]
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(rl.loss_settings(8)), type=LossSettings)
    assert carried.options == rl.token_advantage_settings.options == rl.options
    schedule = [{"from_step": 3, "rl.options": {"keep": 1}}]
    parts = dict(parse_recipe({"rl": {**given, "schedule": schedule}}).schedule_parts())
    assert [part.rl.options["keep"] for part in parts.values()] == [0.5, 1]


@pytest.mark.parametrize(
    ("option", "value", "cause", "shown"),
    [
        ("kep", 1.0, Cause.UNKNOWN, "keep"),
        ("keep", "much", Cause.MALFORMED, "much"),
        ("ties", 1, Cause.MALFORMED, "1"),
    ],
)
def test_wrong_options_are_named(folder, option, value, cause, shown):
    (folder / "own.py").write_text(
        "from megatron_r1.config.algorithms import AlgorithmRules\n"
        "RULES = AlgorithmRules(options={'keep': 0.25, 'ties': False})\n"
    )
    with refused(f"rl.options.{option}", cause, shown):
        parse_recipe({"rl": {"algorithm": "own:RULES", "options": {option: value}}})


@pytest.mark.parametrize(
    ("source", "name", "cause", "shown"),
    [
        ("", "nowhere:RULES", Cause.NOT_FOUND, "'nowhere'"),
        ("RULES = 3", "own:RULES", Cause.NOT_FOUND, "own.py"),
        ("MINE = AlgorithmRules()", "own:MIEN", Cause.NOT_FOUND, "MIEN"),
        ("RULES = AlgorithmRules({'clip_hi': 1})", "own:RULES", Cause.UNKNOWN, "clip_high"),
    ],
)
def test_mistakes_are_named(folder, source, name, cause, shown):
    head = "from megatron_r1.config.algorithms import AlgorithmRules\n"
    (folder / "own.py").write_text(f"{head}{source}\ndef advantages(groups, rl): ...\n")
    with refused("rl.algorithm", cause, name, shown):
        parse_recipe({"rl": {"algorithm": name}})


@pytest.mark.parametrize("rule", ["critic", "teacher", "kl_in_reward"])
def test_rules_for_token_advantages_that_are_not_there_are_refused(folder, rule):
    head = "from megatron_r1.config.algorithms import AlgorithmRules\n"
    text = f"{head}RULES = AlgorithmRules({rule}=True)\ndef advantages(groups, rl): ...\n"
    (folder / f"half_{rule}.py").write_text(text)
    with refused("rl.algorithm", Cause.MISSING, "token_advantages"):
        algorithms.find_algorithm(f"half_{rule}:RULES")


def test_a_module_without_an_algorithm_is_refused(folder):
    text = "from megatron_r1.config.algorithms import AlgorithmRules\nRULES = AlgorithmRules()\n"
    (folder / "bare.py").write_text(text)
    assert RLConfig(algorithm="bare:RULES").group_size == 16
    with refused("rl.algorithm", Cause.EMPTY, "bare.py"):
        algorithms.find_algorithm("bare:RULES")


def test_a_module_with_advantages_and_response_rewards_is_refused(folder):
    (folder / "both.py").write_text(
        "from megatron_r1.config.algorithms import AlgorithmRules\n"
        "from megatron_r1.controller.advantages import response_rewards\n"
        "RULES = AlgorithmRules()\n"
        "def advantages(groups, rl): ...\n"
        "def token_advantages(rollout, settings): ...\n"
    )
    with refused("rl.algorithm", Cause.CONFLICT, "both.py", "response_rewards"):
        algorithms.find_algorithm("both:RULES")


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_an_advantage_that_is_not_finite_is_refused(folder, value):
    (folder / "divided.py").write_text(
        "from megatron_r1.config.algorithms import AlgorithmRules\n"
        "RULES = AlgorithmRules()\n"
        "def advantages(groups, rl):\n"
        f"    return [[{value} if r == 1.0 else 0.0 for r in g] for g in groups]\n"
    )
    find = algorithms.find_algorithm("divided:RULES").outcome_advantages
    with pytest.raises(RunError, match=r"divided:RULES .* (nan|inf) .* reward 1.0, in group 1"):
        find([[0.0, None], [0.5, 1.0]], RLConfig())
    ungraded = find([[0.0, None]], RLConfig())[0][1]
    assert math.isnan(ungraded)


def test_token_advantages_may_start_from_rewards(folder):
    (folder / "to_go.py").write_text(
        "from megatron_r1.config.algorithms import AlgorithmRules\n"
        "from megatron_r1.controller.advantages import response_rewards\n"
        "RULES = AlgorithmRules()\n"
        "def token_advantages(rollout, settings): ...\n"
    )
    algorithm = algorithms.find_algorithm("to_go:RULES")
    assert algorithm.outcome_advantages([[1.0, 0.25]], RLConfig()) == [[1.0, 0.25]]
