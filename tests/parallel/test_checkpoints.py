"""What the ranks write, survive and refuse; loading at other layouts is in test_trainer.py."""

import json
import math
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks
from trainer_steps import config

from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.memory import rank_memory
from megatron_r1.trainer.checkpoints import checkpoint_folders, manifest

HERE = Path(__file__).parent
# fp32 sums in another order, through two updates with a large learning rate.
TOLERANCE = 2e-4
MODEL = "deepseek-yarn-mtp"


def play(scene: str, oracle: Path, out: Path, grid: str = "tp2", world_size: int = 2) -> list[dict]:
    run_ranks(HERE, world_size, "checkpoint_steps.py", scene, str(oracle / MODEL), grid, str(out))
    return json.loads((out / f"{scene}.json").read_text())


@pytest.fixture(scope="module")
def straight(oracle, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A folder with the checkpoint of two ranks, and what they did after it."""
    out = tmp_path_factory.mktemp("checkpoints")
    return out, play("straight", oracle, out)


def same(continued: dict, uninterrupted: dict, where: str) -> None:
    assert continued["is_same_layout"] and uninterrupted["error"] is None
    assert continued["steps"] == uninterrupted["steps"], where
    assert continued["digest"] == uninterrupted["digest"], where


@pytest.mark.more
def test_a_continued_run_equals_an_uninterrupted_one_bit_for_bit(straight, oracle):
    out, expected = straight
    got = play("continued", oracle, out)
    for rank, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        same(mine, theirs, f"rank {rank}")
    draws = expected[0]["steps"][0]["draws"]
    assert len(set(draws)) == 3 and draws != expected[0]["steps"][1]["draws"]


def stored_bytes(folder: Path) -> int:
    """Of the optimizer's state in a checkpoint."""
    sizes = DistributedCheckpoint(folder).shapes
    return sum(4 * math.prod(s) for name, s in sizes.items() if name.startswith("optimizer.state."))


def test_ranks_gather_what_they_write(straight):
    out, written = straight
    assert sum(rank["gathered"] for rank in written) == stored_bytes(out / "step_00000002") > 1e5


def assert_planned(staged: list[int], oracle: Path, grid: str) -> None:
    """What ranks staged is what the plan counts for the rank of a stage that writes most."""
    settings, hf_config = config(str(oracle / MODEL), grid), read_hf_config(str(oracle / MODEL))

    def planned(kl_beta: float) -> list[int]:
        rl = settings.rl.model_copy(update={"kl_beta": kl_beta})
        job = PlannedJob(hf_config, settings.model_copy(update={"rl": rl}), 2, HARDWARE["H800"])
        return [rank.host["checkpoint being written"] for rank in rank_memory(job)]

    with_reference, without_reference = planned(0.1), planned(0.0)
    # One rank of each stage, or two ranks of one stage.
    most = staged if len(with_reference) == 2 else [max(staged)]
    for num_bytes, most_planned, too_few in zip(
        most, with_reference, without_reference, strict=True
    ):
        assert 0.95 * most_planned < num_bytes <= most_planned, grid
        assert num_bytes > too_few, "a plan that forgets the reference has to fail"


def test_ranks_stage_no_more_than_the_plan_counts(straight, oracle):
    _, written = straight
    assert_planned([rank["staged"] for rank in written], oracle, "tp2")


@pytest.mark.slow
def test_so_it_does_along_every_other_axis(oracle, tmp_path):
    grids = ["dp2", "ep2", "pp2", "pp2xvp2", "tp2xep2"]
    of_ranks = play("both", oracle, tmp_path, "+".join(grids))
    for rank, reports in enumerate(of_ranks):
        for grid in grids:
            same(reports[grid]["continued"], reports[grid]["straight"], f"{grid} rank {rank}")
    for grid in grids:
        assert_planned([reports[grid]["straight"]["staged"] for reports in of_ranks], oracle, grid)


@pytest.mark.parametrize(
    ("world_size", "grid"),
    [
        (1, "dp1"),
        pytest.param(2, "dp2", marks=pytest.mark.slow),
        pytest.param(4, "tp2xep2", marks=pytest.mark.slow),
        pytest.param(4, "pp2xvp2xdp2", marks=pytest.mark.slow),
    ],
)
def test_what_two_ranks_wrote_continues_on_one_and_on_four(straight, oracle, world_size, grid):
    out, written = straight
    got = play("continued", oracle, out, grid, world_size)
    assert len(got) == world_size and not any(mine["is_same_layout"] for mine in got)
    assert got[0]["steps"][0]["draws"] != written[0]["steps"][0]["draws"]
    asked, stored = [mine["asked"] for mine in got], stored_bytes(out / "step_00000002")
    assert sum(asked) > 0.99 * stored  # two tensor ranks had a row more of embedding and head
    # A replica holds its share of the state, and asks for parameters as wholes.
    assert max(asked) < 0.6 * stored or world_size == 1
    last_stage = next(mine for mine in got if "loss" in mine["steps"][0])
    for mine, theirs in zip(last_stage["steps"], written[0]["steps"], strict=True):
        for name in theirs.keys() - {"draws"}:
            assert mine[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=TOLERANCE), name


def test_every_file_of_every_rank_is_in_the_manifest_and_a_name_is_taken_once(straight):
    out, expected = straight
    folder = out / "step_00000002"
    assert manifest.manifest_faults(folder, "full") == []
    names = set(manifest.read_manifest(folder))
    assert names == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "run_state.json"} <= names
    for rank in expected:
        assert "is there already" in rank["again"][0]


@pytest.mark.more
def test_a_full_disk_of_one_rank_raises_on_all_and_leaves_nothing_behind(straight, oracle):
    out, _ = straight
    for rank in play("full", oracle, out):
        assert (
            "step_00000005 could not be written (rank 1: [Errno 27] File too large" in rank["error"]
        )
        assert "make room" in rank["error"]
        assert rank["next"] == rank["error"], "a failure must be reported by the next save"
        assert not [name for name in rank["left"] if "step_00000005" in name]
    assert checkpoint_folders.newest_usable(out, "full") == (out / "step_00000002", [])


@pytest.mark.slow  # of a run: tests/system/test_checkpoint_runs.py
def test_a_rank_killed_while_it_writes_leaves_the_last_good_one(straight, oracle):
    out, _ = straight
    with pytest.raises(pytest.fail.Exception):
        play("killed", oracle, out)
    assert (out / ".step_00000007.partial").is_dir() and not (out / "step_00000007").exists()
    assert checkpoint_folders.remove_partial(out) == ["step_00000007"]
    assert checkpoint_folders.newest_usable(out, "full") == (out / "step_00000002", [])
    report = out / "killed_0.json"
    assert not report.exists() or "lost each other" in json.loads(report.read_text())


@pytest.mark.more
def test_ranks_find_every_flipped_byte_and_a_reference_that_was_not_saved(straight, oracle):
    out, _ = straight
    folder = shutil.copytree(out / "step_00000002", out / "flipped")
    names = [name for name in manifest.read_manifest(folder) if name.endswith(".distcp")]
    for name in names:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    for rank in play("refused", oracle, out, "dp2"):
        expected = [f"{name} does not have the checksum it was written with" for name in names]
        assert rank["damage"] == sorted(expected)
        flipped = rank["refusals"]["flipped"]
        assert "is damaged: " in flipped and names[0] in flipped
        bare = rank["refusals"]["without_reference"]
        assert "without_reference has no reference policy: rl.kl_beta was 0 when" in bare
