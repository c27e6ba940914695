"""Manifests, the choice of a checkpoint, and what the controller does about damage."""

import asyncio
import json
import shutil
import time
from pathlib import Path

import pytest
from blake3 import blake3
from refusals import refused

from megatron_r1.base.errors import Cause, TrainerError
from megatron_r1.config import CheckpointConfig
from megatron_r1.controller.checkpoint_series import CheckpointSeries
from megatron_r1.trainer.checkpoints import checkpoint_folders, manifest
from megatron_r1.trainer.operations import CheckpointOperations


def make(checkpoints: Path, step: int) -> Path:
    folder = checkpoint_folders.checkpoint_path(checkpoints, step)
    folder.mkdir(parents=True)
    (folder / "run_state.json").write_text(json.dumps({"step": step}))
    (folder / ".metadata").write_bytes(b"where everything lies" * 10)
    for name in ("__0_0.distcp", "__0_1.distcp", "__1_0.distcp"):
        (folder / name).write_bytes(name.encode() * (1000 + step))
    manifest.write_manifest(folder)
    return folder


def truncate(folder: Path) -> None:
    path = folder / "__0_1.distcp"
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path, offset: int = 5000) -> None:
    content = bytearray(path.read_bytes())
    content[offset % len(content)] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "truncated": (truncate, "__0_1.distcp has 12,"),
    "longer": (
        lambda f: (f / "__0_0.distcp").open("ab").write(b"x"),
        "__0_0.distcp has 12,0",
    ),
    "missing": (lambda f: (f / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "no metadata": (lambda f: (f / ".metadata").unlink(), ".metadata is missing"),
    "flipped": (lambda f: flip(f / "__1_0.distcp"), "__1_0.distcp does not have the checksum"),
    "flipped state": (lambda f: flip(f / "run_state.json", 9), "run_state.json does not have the"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (
        lambda f: (f / "manifest.json").write_text('{"format": 1, "fil'),
        "manifest.json is not readable",
    ),
    "manifest of something else": (
        lambda f: (f / "manifest.json").write_text("[1, 2]"),
        "manifest.json is not readable",
    ),
    "newer manifest": (
        lambda f: edit_manifest(f, lambda m: m.update(format=2)),
        "manifest.json has format 2",
    ),
    "edited manifest": (
        lambda f: edit_manifest(f, lambda m: m["files"].pop("__1_0.distcp")),
        "manifest.json has been changed",
    ),
    "half-written": (
        lambda f: [p.unlink() for p in f.iterdir() if "dist" not in p.name],
        "missing",
    ),
}


def edit_manifest(folder: Path, change) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


class Ranks:
    """Trainer ranks that verify as the real ones do, with nothing to train."""

    def __init__(self, verify="full", error=None):
        self.verify, self.error, self.calls, self.saves = verify, error, [], 0
        self.polls_until_done = 0

    async def call(self, operation, **arguments):
        self.calls.append(operation.__name__)
        if operation == CheckpointOperations.verify_checkpoint:
            return {"faults": manifest.manifest_faults(Path(arguments["folder"]), self.verify)}
        if operation == CheckpointOperations.load_checkpoint:
            return {"is_same_layout": True}
        if operation == CheckpointOperations.save_checkpoint:
            self.folder, self.state = Path(arguments["folder"]), arguments["state"]
            self.polls = 0
            return {}
        self.polls += 1
        done = arguments["wait"] or self.polls > self.polls_until_done
        if done and not self.error:
            make(self.folder.parent, checkpoint_folders.checkpoint_step(self.folder))
        return {"is_done": done, "error": self.error if done else None, "seconds": 2.5}


def open_and_verify(folder: Path, **settings) -> tuple[CheckpointSeries, list[str]]:
    messages: list[str] = []
    config = CheckpointConfig(**settings)
    series = CheckpointSeries(folder, config, messages.append)
    asyncio.run(series.verify(Ranks(config.verify)))
    return series, messages


def test_a_manifest_has_the_size_and_the_blake3_of_every_file(tmp_path):
    folder = make(tmp_path, 1)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "blake3": blake3(content).hexdigest()}
    assert manifest.manifest_faults(folder) == []


def test_files_are_hashed_in_pieces_as_in_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 100)
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 999)
    whole = blake3(path.read_bytes()).hexdigest()
    assert manifest.file_entry(path) == manifest.FileEntry(25_600, whole)


def test_entries_that_are_known_are_not_read_again(tmp_path):
    folder = make(tmp_path, 1)
    manifest.write_manifest(
        folder, {"__0_0.distcp": manifest.FileEntry(12, "of what was in memory")}
    )
    assert manifest.manifest_faults(folder, "size") == [
        "__0_0.distcp has 12,012 bytes where 12 were written"
    ]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_file_is_one_rank_s_to_verify_and_bytes_are_spread(count):
    entries = {
        f"f{i}": manifest.FileEntry(size, "") for i, size in enumerate([90, 50, 30, 30, 5, 0])
    }
    shares = [manifest.files_to_verify(entries, index, count) for index in range(count)]
    assert sorted(name for share in shares for name in share) == sorted(entries)
    heaviest = max(sum(entries[n].num_bytes for n in share) for share in shares)
    assert heaviest == {1: 205, 2: 110, 5: 90}[count]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_it_is_used(tmp_path, kind):
    hurt, words = DAMAGE[kind]
    for step in (2, 4, 6):
        make(tmp_path, step)
    hurt(tmp_path / "step_00000006")
    series, messages = open_and_verify(tmp_path)
    assert series.latest_checkpoint == tmp_path / "step_00000004" and series.state() == {"step": 4}
    assert len(messages) == 2 and words in messages[0] and "DAMAGED" in messages[0]
    assert "step_00000006" in messages[0] and messages[1] == "continuing from step_00000004 instead"
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step_00000002", "step_00000004", "step_00000006.damaged"]


def test_the_last_good_one_may_be_several_back(tmp_path):
    for step in (1, 2, 3, 4, 5):
        make(tmp_path, step)
    truncate(tmp_path / "step_00000005")
    flip(tmp_path / "step_00000004/__0_0.distcp")
    (tmp_path / "step_00000003/manifest.json").unlink()
    flip(tmp_path / "step_00000002/__0_0.distcp")
    series, messages = open_and_verify(tmp_path)
    assert series.latest_checkpoint == tmp_path / "step_00000001"
    assert sum("DAMAGED" in line for line in messages) == 4


def test_with_nothing_but_damage_the_run_refuses_and_deletes_nothing(tmp_path):
    for step in (2, 4):
        make(tmp_path, step)
    truncate(tmp_path / "step_00000002")
    flip(tmp_path / "step_00000004/__0_0.distcp")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for _ in range(2):
        with refused("checkpoint", Cause.EMPTY) as error:
            open_and_verify(tmp_path)
        message = str(error.value)
        assert "step_00000004: __0_0.distcp does not have the checksum" in message
        assert "step_00000002: __0_1.distcp has 12," in message
        assert "Put a good copy" in message and "another run.folder" in message
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_nothing_is_renamed_before_a_good_one_is_found(tmp_path):
    for step in (2, 4, 6):
        flip(make(tmp_path, step) / "__0_0.distcp")
    with refused("checkpoint", Cause.EMPTY) as error:
        open_and_verify(tmp_path)
    for step in (2, 4, 6):
        assert f"step_{step:08d}: __0_0.distcp does not have the checksum" in str(error.value)
    assert len(checkpoint_folders.complete_checkpoints(tmp_path)) == 3


def test_what_was_set_aside_keeps_a_run_from_starting_over(tmp_path):
    for step in (2, 4):
        make(tmp_path, step)
    truncate(tmp_path / "step_00000004")
    open_and_verify(tmp_path)
    shutil.rmtree(tmp_path / "step_00000002")
    with refused("checkpoint", Cause.EMPTY, "step_00000004.damaged"):
        open_and_verify(tmp_path)


def test_an_empty_run_begins_and_a_half_written_first_checkpoint_is_removed(tmp_path):
    series, messages = open_and_verify(tmp_path / "not there yet")
    assert series.latest_checkpoint is None and series.state() is None and messages == []
    make(tmp_path, 3).rename(tmp_path / ".step_00000003.partial")
    make(tmp_path, 2).rename(tmp_path / ".step_00000002.deleted")
    series, messages = open_and_verify(tmp_path)
    assert series.latest_checkpoint is None and list(tmp_path.iterdir()) == []
    assert messages == ["step_00000003 was still being written when the run ended; removed"]


def test_verify_size_and_none_trust_what_they_do_not_look_at(tmp_path):
    for step in (2, 4):
        make(tmp_path, step)
    flip(tmp_path / "step_00000004/__0_0.distcp")
    assert open_and_verify(tmp_path, verify="size")[0].latest_checkpoint.name == "step_00000004"
    truncate(tmp_path / "step_00000004")
    assert open_and_verify(tmp_path, verify="none")[0].latest_checkpoint.name == "step_00000004"
    (tmp_path / "step_00000004/run_state.json").write_text('{"st')
    assert open_and_verify(tmp_path, verify="none")[0].latest_checkpoint.name == "step_00000002"


def test_old_ones_go_only_when_the_new_one_is_whole(tmp_path):
    async def run():
        series = CheckpointSeries(tmp_path, CheckpointConfig(keep=2), print)
        ranks = Ranks()
        ranks.polls_until_done = 1
        for step in (1, 2, 3):
            began = time.perf_counter()
            await series.save(ranks, step, {"step": step})
            seconds = time.perf_counter() - began
            assert series.latest_checkpoint == (
                checkpoint_folders.checkpoint_path(tmp_path, step - 1) if step > 1 else None
            )
            assert await series.completed_metrics(ranks) == {}
            metrics = await series.completed_metrics(ranks)
            assert metrics["checkpoint/step"] == step and metrics["checkpoint/seconds"] == 2.5
            assert 0 < metrics["checkpoint/seconds_blocked"] <= seconds
            assert await series.completed_metrics(ranks) == {}
        ranks.error = "checkpoint step 4 could not be written (disk full)"
        await series.save(ranks, 4, {})
        with pytest.raises(TrainerError, match="disk full"):
            await series.finish(ranks)
        assert series.latest_checkpoint == checkpoint_folders.checkpoint_path(tmp_path, 3)

    asyncio.run(run())
    assert [f.name for f in checkpoint_folders.complete_checkpoints(tmp_path)] == [
        "step_00000002",
        "step_00000003",
    ]


def test_a_second_save_waits_for_the_first_and_a_failed_one_is_not_lost(tmp_path):
    async def run():
        series = CheckpointSeries(tmp_path, CheckpointConfig(), print)
        ranks = Ranks()
        ranks.polls_until_done = 100
        await series.save(ranks, 1, {})
        await series.save(ranks, 2, {})
        assert series.latest_checkpoint == checkpoint_folders.checkpoint_path(tmp_path, 1)
        ranks.error = "no space"
        with pytest.raises(TrainerError, match="no space"):
            await series.save(ranks, 3, {})
        calls = ["save_checkpoint", "checkpoint_progress"] * 2
        assert ranks.calls == calls, "the third save must not start"

    asyncio.run(run())


def test_synchronous_saving_knows_the_outcome_at_once(tmp_path):
    async def run():
        series = CheckpointSeries(tmp_path, CheckpointConfig(asynchronous=False), print)
        await series.save(Ranks(), 1, {})
        assert series.latest_checkpoint == checkpoint_folders.checkpoint_path(tmp_path, 1)
        with pytest.raises(TrainerError):
            await series.save(Ranks(error="no space"), 2, {})

    asyncio.run(run())


def test_damaged_checkpoints_are_not_counted_among_the_kept_and_never_deleted(tmp_path):
    for step in range(1, 6):
        make(tmp_path, step)
    truncate(tmp_path / "step_00000004")
    checkpoint_folders.prune(tmp_path, keep=2)
    names = [f.name for f in checkpoint_folders.complete_checkpoints(tmp_path)]
    assert names == ["step_00000003", "step_00000004", "step_00000005"]
