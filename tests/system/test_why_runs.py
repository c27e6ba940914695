"""`megatron-r1 why` on real runs: faults planted in their logs, checkpoints, settings or loss are
named; a run without one has none."""

import json
import math
import re
import shutil
import tempfile
from array import array
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import yaml
from command_line import run

from megatron_r1.base.files.framed_records import FramedFile, append_frame
from megatron_r1.controller.rollouts.sample_log import GroupRecord, decode, encode
from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint
from megatron_r1.trainer.checkpoints.manifest import write_manifest
from megatron_r1.why.all_checks import examine_step
from megatron_r1.why.comparison import EQUAL
from megatron_r1.why.policy import step_logprobs
from megatron_r1.why.policy.checkpoint_model import STATE_PREFIX
from megatron_r1.why.record.examinable_steps import open_run
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.record.step_reader import read_step
from megatron_r1.why.step_report import Report
from megatron_r1.why.update.recomputation import Recomputation

pytestmark = pytest.mark.more

STEP = 3
LITTLE = 10**9
"""Bytes that no whole model fits into: 2^26 logits alone take more."""
KEPT = (
    *("--rl.keep_sample_log", "true", "--checkpoint.keep_every", "1", "--rl.schedule", "[]"),
    *("--rl.kl_beta", "0.05", "--optimizer.warmup_updates", "2"),
)
HEAD = "output_layer.weight"
EXPERTS = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"


@pytest.fixture(scope="module")
def kept(base) -> Path:
    """A run of two engines that kept all of its steps; the reference is replaced after step 2."""
    more = ("--run.steps", "4", "--rollout.engines", "2", "--rl.reference_refresh", "4")
    done = run("rl", base / "rl.yaml", "--run.folder", str(base / "kept"), *KEPT, *more)
    assert done.returncode == 0, done.stderr + done.stdout
    return base / "kept"


@pytest.fixture
def copy(kept, tmp_path) -> Path:
    return copied(kept, tmp_path / "run")


def copied(source: Path, target: Path) -> Path:
    """A run's folder whose files may be changed; its checkpoints are links."""
    target.mkdir()
    for path in source.iterdir():
        if path.name == "checkpoints":
            (target / path.name).mkdir()
            for checkpoint in path.iterdir():
                (target / path.name / checkpoint.name).symlink_to(checkpoint)
        elif path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy(path, target)
    return target


def read(folder: Path, step: int = STEP) -> RecordedStep:
    return read_step(*open_run(folder), step)


def first(folder: Path, step: int = STEP, memory: int | None = None) -> tuple[str, str, Report]:
    """The first departure's quantity and its text, and all comparisons."""
    report = examine_step(read(folder, step), memory)
    assert report.first_departure is not None, [str(each) for each in report.comparisons]
    return report.first_departure.name, str(report.first_departure), report


def set_settings(folder: Path, **changes) -> None:
    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        settings[section][name] = value
    path.write_text(yaml.safe_dump(settings))


def set_logprobs(folder: Path, logprobs, engine: str | None = None) -> None:
    """Replace the engine's log-probabilities, of one engine or all, by those of each sequence in
    the order of groups and responses."""
    path = folder / "sample_log" / f"step_{STEP:08d}.log"
    records = [decode(payload) for payload in FramedFile.read(path, repair=False)]
    given = iter(logprobs)
    changed = {}
    groups = [each for each in records if isinstance(each, GroupRecord)]
    for record in sorted(groups, key=lambda each: each.prompt_index):
        responses = []
        for response in record.responses:
            floats = memoryview(array("f", np.asarray(next(given)).tolist()))
            is_meant = engine in (None, response.engine)
            responses.append(
                msgspec.structs.replace(response, logprobs=floats) if is_meant else response
            )
        changed[record.prompt_index] = msgspec.structs.replace(record, responses=tuple(responses))
    path.unlink()
    with open(path, "wb", buffering=0) as file:
        for record in records:
            own = changed[record.prompt_index] if isinstance(record, GroupRecord) else record
            append_frame(file.fileno(), encode(own))


def overwrite(folder: Path, step: int, key: str, change) -> None:
    """Change a tensor of a checkpoint as if the trainer had written it so, with the
    checksums of the changed files."""
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    if checkpoint.is_symlink():
        source = checkpoint.resolve()
        checkpoint.unlink()
        shutil.copytree(source, checkpoint)
    stored = DistributedCheckpoint(checkpoint)
    shape = stored.shapes[key]
    changed = change(stored.read(key, (0,) * len(shape), shape))
    for chunks in stored._chunks_by_start[key].values():
        for chunk in chunks:
            ranges = zip(chunk.starts, chunk.sizes, strict=True)
            values = changed[tuple(slice(at, at + size) for at, size in ranges)].contiguous()
            offset = stored._data_offset(key, chunk)
            with open(checkpoint / chunk.file, "r+b") as file:
                file.seek(offset)
                file.write(values.numpy().tobytes())
    write_manifest(checkpoint)


def test_nothing_departs_in_a_run_without_a_fault(kept):
    for step in (1, 3, 4):
        report = examine_step(read(kept, step))
        assert report.first_departure is None, str(report.first_departure)
        assert report.suspicions
    equal = {each.name for each in report.comparisons if each.status == "equal"}
    assert equal >= {
        *("tokens of the prompt", "settings of the engines", "engines' log-probabilities"),
        *("reference policy", "loss", "kl", "grad_norm", "change of the weights"),
        *("Adam's counter before", "exported model", "sum of the terms"),
        "gradient of each term",
    }


def test_the_command_prints_its_steps_and_writes_its_page(copy, tmp_path):
    done = run("why", str(copy), "--step", "4", "--json", str(tmp_path / "why.json"))
    assert done.returncode == 0, done.stderr
    assert "nothing departs" in done.stdout
    assert "steps with log and both checkpoints: 1-4" in done.stdout
    found = json.loads((tmp_path / "why.json").read_text())
    assert found["step"] == 4 and found["first"] is None
    assert [each["step"] for each in found["steps"]] == [1, 2, 3, 4]
    page = (copy / "why.html").read_text()
    assert "Nothing departs" in page and "<svg" in page
    assert run("why", str(copy), "--step", "9").returncode == 2


def test_an_engine_with_the_weights_of_the_version_before(copy):
    stale = Recomputation(read(copy)).policies.logprobs_after(STEP - 2)
    set_logprobs(copy, stale, engine="engine-1")
    name, text, report = first(copy)
    assert name == "engines' log-probabilities"
    assert "engine-1" in text and f"version {STEP - 2}" in text and "push" in text
    concerned = report.first_departure.affected_responses
    assert concerned
    assert {read(copy).responses[which].response.engine for which in concerned} == {"engine-1"}


def test_a_part_of_the_responses_is_recomputed_where_all_would_take_too_long(copy, monkeypatch):
    step = read(copy)
    recomputation = Recomputation(step)
    flops = recomputation.models.pass_flops
    stale = recomputation.policies.logprobs_after(STEP - 2)
    monkeypatch.setattr(step_logprobs, "LOGPROB_FLOPS", flops / 2.5)
    report = examine_step(step)
    assert report.first_departure is None, str(report.first_departure)
    engines = report.comparison("sampling", "engines' log-probabilities")
    num_computed = len(step.sequences[::3])
    assert engines.status == "equal" and f"of {num_computed} sequences" in engines.description
    trainer = report.comparison("log-probabilities", "old policy of the trainer")
    assert trainer.status == "not checked" and "only a part" in trainer.reason
    set_logprobs(copy, stale, engine="engine-1")
    name, text, _ = first(copy)
    assert name == "engines' log-probabilities"
    assert "engine-1" in text and f"version {STEP - 2}" in text


def test_nothing_departs_in_a_run_whose_layers_are_read_one_by_one(kept):
    for step in (1, 4):
        report = examine_step(read(kept, step), LITTLE)
        assert report.first_departure is None, str(report.first_departure)
        by_name = {each.name: each for each in report.comparisons}
        names = ["engines' log-probabilities", "old policy of the trainer"]
        names += ["reference policy", "exported model"] if step == 4 else []
        whole = {each.name: each for each in examine_step(read(kept, step)).comparisons}
        for name in names:
            assert by_name[name].status == "equal"
            assert by_name[name].distance == pytest.approx(whole[name].distance, abs=1e-6)
        for name in ("loss", "change of the weights"):
            assert whole[name].status == "equal"
            assert by_name[name].status == "not checked"
            assert "the updates need 1.9 GB, 28 bytes a parameter" in by_name[name].reason
            assert "1.0 GB are free" in by_name[name].reason


def test_a_stale_engine_of_a_model_whose_layers_are_read_one_by_one(copy):
    stale = Recomputation(read(copy)).policies.logprobs_after(STEP - 2)
    set_logprobs(copy, stale, engine="engine-1")
    name, text, _ = first(copy, memory=LITTLE)
    assert name == "engines' log-probabilities"
    assert "engine-1" in text and f"version {STEP - 2}" in text and "push" in text
    done = run("why", str(copy), "--step", str(STEP), "--memory", str(LITTLE / 1e9))
    assert done.returncode == 1 and f"version {STEP - 2}" in done.stdout
    comparisons = examine_step(read(copy), LITTLE // 100).comparisons
    (unread,) = (each for each in comparisons if each.name == name)
    assert unread.status == "not checked" and "0.0 GB are free" in unread.reason
    assert unread.reason.startswith("the largest layer without its experts")


def plant_another_expert(folder: Path) -> None:
    """Have the log hold what engines compute with another expert 2 in layer 1."""
    made = Recomputation(read(folder)).policies
    other = made.models.model(read(folder).checkpoint_before)
    experts = next(m for n, m in other.named_modules() if n.endswith("layers.1.mlp.experts"))
    with torch.no_grad():
        experts.down_proj[2] *= -3.0
    set_logprobs(folder, made.logprobs_under(other))


def test_an_expert_of_a_model_whose_layers_are_read_one_by_one(copy):
    plant_another_expert(copy)
    name, text, _ = first(copy, memory=LITTLE)
    assert name == "engines' log-probabilities" and "expert 2 of model.layers.1" in text
    assert "not tried, as the model does not fit into memory: exchanged experts" in text


def rerun(folder: Path, expected_status: int) -> dict[tuple[str, str], dict]:
    """What `why --rerun engine,trainer` compares, by family and name."""
    found = folder.parent / "why.json"
    with tempfile.TemporaryDirectory() as scratch:  # short: an engine has its sockets there
        done = run(
            *("why", str(folder), "--step", str(STEP), "--rerun", "engine,trainer"),
            *("--json", str(found)),
            more={"TMPDIR": scratch},
        )
        assert done.returncode == expected_status, done.stdout + done.stderr
        assert not list(Path(scratch).glob("megatron-r1-why-*"))  # the export is removed
    report = json.loads(found.read_text())
    return {(each["family"], each["name"]): each for each in report["comparisons"]}


FRESH, LOGGED = "a fresh engine's log-probabilities", "engines' log-probabilities"


def test_a_fresh_engine_and_one_rank_tell_the_sides_of_a_departure_apart(copy):
    healthy = rerun(copy, 0)
    one_rank = healthy["log-probabilities", "one rank's log-probabilities"]
    for each in (healthy["sampling", FRESH], one_rank):
        assert each["status"] == EQUAL, each
        assert each["distance"] < 1e-5 and each["tolerance"] < 1e-4
    names = [name for _, name in healthy]
    assert names[names.index(LOGGED) + 1] == FRESH
    assert names[names.index("old policy of the trainer") + 1] == one_rank["name"]

    set_logprobs(
        copy, Recomputation(read(copy)).policies.logprobs_after(STEP - 2), engine="engine-1"
    )
    stale = rerun(copy, 1)
    logged, fresh = stale["sampling", LOGGED], stale["sampling", FRESH]
    assert logged["status"] == "departs" and fresh["status"] == EQUAL
    assert fresh["distance"] < 1e-5 < 1e-4 < logged["distance"]
    assert "a fresh engine agrees with transformers" in logged["reason"]
    assert "(the push)" in logged["reason"] and "the push to engine-1" in logged["remedy"]


@pytest.mark.slow
def test_another_temperature(copy):
    made = Recomputation(read(copy)).policies
    set_logprobs(copy, made.logprobs_at_temperatures([1.3])[0])
    name, text, _ = first(copy)
    assert name == "engines' log-probabilities" and "temperature 1.3" in text


@pytest.mark.slow
def test_a_distribution_over_a_part_of_the_vocabulary(copy):
    draw = np.random.default_rng(0)
    own = Recomputation(read(copy)).policies.old_logprobs
    set_logprobs(copy, [each + draw.uniform(0.02, 0.1, len(each)) for each in own])
    name, text, _ = first(copy)
    assert name == "engines' log-probabilities" and "rollout.top_p" in text


@pytest.mark.slow
def test_an_expert_that_an_engine_has_not(copy):
    plant_another_expert(copy)
    name, text, _ = first(copy)
    assert name == "engines' log-probabilities"
    assert "expert 2 of model.layers.1" in text


def test_an_engine_that_routes_without_the_bias(copy):
    # The checkpoint has the bias and the engine has not: what the run sampled with.
    bias = "decoder.layers.1.mlp.router.expert_bias"
    for step in (STEP - 1, STEP):
        overwrite(copy, step, bias, lambda each: torch.tensor([0.0, 0.0, 0.5, 0.5]))
    name, text, _ = first(copy)
    assert name == "engines' log-probabilities" and "correction bias" in text


def test_a_reference_that_was_not_refreshed(copy):
    before = DistributedCheckpoint(copy / "checkpoints" / "step_00000001")
    for key, shape in before.shapes.items():
        if key.startswith("reference."):
            old = before.read(key, (0,) * len(shape), shape)
            overwrite(copy, STEP - 1, key, lambda each, old=old: old)
    name, text, _ = first(copy)
    assert name == "reference policy" and "it was not refreshed" in text
    assert "rl.reference_refresh" in text


@pytest.mark.parametrize(
    ("step", "key", "change", "quantity", "words"),
    [
        pytest.param(
            *(3, HEAD, lambda each: each * math.nan, "numbers of the checkpoint after", HEAD),
            marks=pytest.mark.slow,
        ),
        (3, HEAD, lambda each: each * 1.01, "master weights after", HEAD),
        pytest.param(
            3,
            "decoder.layers.1.mlp.router.expert_bias",
            lambda each: each + 1.0,
            "size of the change",
            "mlp.router.expert_bias",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_changed_tensor(copy, step, key, change, quantity, words):
    overwrite(copy, step, key, change)
    name, text, _ = first(copy)
    assert name == quantity and words in text


@pytest.mark.slow
def test_moments_that_were_lost(copy):
    stored = DistributedCheckpoint(copy / "checkpoints" / f"step_{STEP - 1:08d}")
    for key in stored.shapes:
        if key.startswith((f"{STATE_PREFIX}exp_avg.", f"{STATE_PREFIX}exp_avg_sq.")):
            overwrite(copy, STEP - 1, key, torch.zeros_like)
    name, text, _ = first(copy)
    assert name == "Adam's moments before" and "are zero" in text


@pytest.mark.slow
def test_weights_that_stay(copy):
    source = copy / "checkpoints" / f"step_{STEP - 1:08d}"
    target = copy / "checkpoints" / f"step_{STEP:08d}"
    real = source.resolve()
    target.unlink()
    shutil.copytree(real, target)
    _, _, report = first(copy)
    departing = {each.name: each for each in report.comparisons if each.differs}
    assert "no weight changes" in str(departing["size of the change"])


@pytest.mark.parametrize(
    ("setting", "value", "quantity", "words"),
    [
        ("rl__advantage_std", "none", "loss", "advantages divided by the deviation of: group"),
        pytest.param(
            *("rl__loss_average", "token", "loss", "average sequence explains it"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("optimizer__weight_decay", 5.0, "loss", "optimizer.weight_decay 0.1"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_settings_that_were_not_those_of_the_run(copy, setting, value, quantity, words):
    set_settings(copy, **{setting: value})
    name, text, _ = first(copy)
    assert name == quantity and words in text


@pytest.mark.slow
def test_a_learning_rate_that_stays_in_warm_up(copy):
    path = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[STEP - 1]["learning_rate"] /= 10
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    name, text, _ = first(copy)
    assert name == "learning rate" and "warm-up" in text and "optimizer.learning_rate" in text


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("kl_sign", "KL with the wrong sign"),
        pytest.param("counts_prompts", "counts masked tokens", marks=pytest.mark.slow),
    ],
)
def test_a_fault_in_the_loss_of_a_real_run(base, tmp_path, fault, words):
    """The trainer minimises the wrong loss; the settings say grpo."""
    folder = base / f"wrong_{fault}"
    own = ("--rl.algorithm", "wrong_loss:RULES", "--rl.options.fault", fault)
    done = run("rl", base / "rl.yaml", "--run.folder", str(folder), *KEPT, *own, "--run.steps", "2")
    assert done.returncode == 0, done.stderr + done.stdout
    found = copied(folder, tmp_path / "run")
    set_settings(found, rl__algorithm="grpo", rl__options={})
    name, text, _ = first(found, 2)
    assert name == "loss" and words in text


def test_a_term_whose_gradient_has_the_wrong_sign(base, tmp_path):
    """The loss and its metrics are those of the settings; the gradient of KL is not."""
    folder = base / "wrong_slope"
    own = ("--rl.algorithm", "wrong_loss:RULES", "--rl.options.fault", "kl_slope")
    # More weight than the other runs': after one step KL's gradient would be near the rounding.
    own += ("--rl.kl_beta", "0.5")
    done = run("rl", base / "rl.yaml", "--run.folder", str(folder), *KEPT, *own, "--run.steps", "2")
    assert done.returncode == 0, done.stderr + done.stdout
    found = copied(folder, tmp_path / "run")
    set_settings(found, rl__algorithm="grpo", rl__options={})
    _, text, report = first(found, 2)
    (coefficient,) = re.findall(r"the KL term entered with (\S+) times its gradient", text)
    assert abs(float(coefficient) + 1) < 0.05
    assert "rl.kl_beta" in report.first_departure.remedy
    (terms,) = (each for each in report.comparisons if each.name == "gradient of each term")
    assert terms.differs and "the policy term entered" not in terms.reason


def test_a_run_with_adapters(base):
    """Of every linear layer, experts too, with a reference that is replaced on the way."""
    folder, alpha = base / "why_lora", 64.0
    lora = ["--model.lora.rank", "4", "--model.lora.alpha", str(alpha)]
    kept = ["--rl.keep_sample_log", "true", "--checkpoint.keep_every", "1", "--run.steps", "3"]
    changed = ["--rl.kl_beta", "0.05", "--rl.reference_refresh", "4"]
    done = run("rl", base / "rl.yaml", "--run.folder", folder, *lora, *kept, *changed)
    assert done.returncode == 0, done.stdout + done.stderr
    step = read_step(*open_run(folder), 3)
    report = examine_step(step)
    assert report.first_departure is None, str(report.first_departure)
    equal = {quantity.name for quantity in report.comparisons if quantity.status == EQUAL}
    needed = {"engines' log-probabilities", "old policy of the trainer", "reference policy"}
    updates = {"loss", "grad_norm", "gradient of each term"}
    updates |= {"change of the weights", "change of Adam's moments"}
    assert needed | updates <= equal
    other_scale = step.run_config.model.lora.model_copy(update={"alpha": alpha / 2})
    model = step.run_config.model.model_copy(update={"lora": other_scale})
    config = step.run_config.model_copy(update={"model": model})
    for memory in (None, LITTLE):
        report = examine_step(replace(step, run_config=config), memory)
        assert report.first_departure.name == "engines' log-probabilities"
        assert "adapters times 16 (alpha / √rank), not 8" in report.first_departure.reason
    report = examine_step(step, LITTLE)
    assert report.first_departure is None, str(report.first_departure)
    equal = {quantity.name for quantity in report.comparisons if quantity.status == EQUAL}
    assert needed <= equal and not updates & equal
