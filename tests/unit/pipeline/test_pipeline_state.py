"""What is done, what is stale and why: a finished stage is never run twice, none is overwritten."""

import contextlib
import hashlib
import json
import shutil

import pytest
from pipeline_world import FUNCTIONS, RECIPE, World, recipe
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.base.files import file_blocks
from megatron_r1.pipeline import digests
from megatron_r1.pipeline.fingerprint import deciding_settings, input_digests
from megatron_r1.pipeline.pipeline_recipe import load_pipeline
from megatron_r1.pipeline.stages import PipelinePlan

ALL = ["corpus", "other", "both", "last"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return World(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a pipeline whose stages are done."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder):
        world = World(folder)
        assert world.run() == 0
    assert world.calls == ALL
    return folder


@pytest.fixture
def done(finished, world):
    """A copy of that folder, to start in."""
    shutil.copytree(finished, world.path, dirs_exist_ok=True)
    return world


@pytest.mark.more
def test_a_finished_pipeline_runs_nothing_again(done, capsys):
    files = {p: p.read_bytes() for p in sorted(done.out.rglob("*")) if p.parent.parent == done.out}
    assert done.run() == 0
    assert done.calls == ALL
    assert files == {path: path.read_bytes() for path in files}
    assert done.states(capsys) == dict.fromkeys(ALL, "done")


def test_provenance_names_everything_it_was_made_of(done):
    made = done.record("both")
    text = (done.out / "both/all.txt").read_bytes()
    assert text == b"a0\na1\na2\nb0\nb1\nx"
    assert made["outputs"] == {"all.txt": hashlib.sha256(text).hexdigest()[:16]}
    data = hashlib.sha256(b"a0\na1\na2\n").hexdigest()[:16]
    assert made["inputs"]["${corpus.data.jsonl}"] == data
    assert made["inputs"]["sources[2] extra.txt"] == hashlib.sha256(b"x\n").hexdigest()[:16]
    assert made["inputs"]["${other}/data.jsonl"] == hashlib.sha256(b"b0\nb1\n").hexdigest()[:16]
    assert "function tiny:join" in made["inputs"]
    assert made["upstream"] == ["corpus", "other"] and made["seed"] == 0
    assert {"megatron-r1", "torch", "megatron-core", "python"} <= set(made["versions"])
    assert made["told"]["sources"][0] == "out/corpus/data.jsonl"
    assert made["command"][1:] == [
        "-m",
        "megatron_r1.pipeline.function_stage",
        "out/recipes/both.yaml",
    ]
    assert made["seconds"] > 0 and made["started"] <= made["finished"]


def change_setting(world):
    world.write(RECIPE.replace("{lines: 2, word: b}", "{lines: 4, word: b}"))


def change_file(world):
    (world.path / "extra.txt").write_text("y\n")


def change_function(world):
    changed = FUNCTIONS.replace('"".join(f"{word}{i}', '"".join(f"{word}-{i}')
    assert changed != FUNCTIONS
    (world.path / "tiny.py").write_text(changed)


def change_output(world):
    with (world.out / "other/data.jsonl").open("a") as file:
        file.write("more\n")


def lose_output(world):
    (world.out / "both/all.txt").unlink()


def lose_file(world):
    (world.path / "extra.txt").unlink()


@pytest.mark.parametrize(
    "change, stale, thing",
    [
        (change_setting, "other both last", "arguments.lines: 2"),
        (change_file, "both last", "sources[2] extra.txt"),
        (lose_file, "both last", "sources[2] extra.txt"),
        (change_function, "corpus other both last", "tiny:count"),
        (change_output, "other both last", "data.jsonl"),
        (lose_output, "both last", "all.txt"),
    ],
)
def test_a_change_makes_stale_what_is_made_of_it(done, capsys, change, stale, thing):
    before = {path: path.read_bytes() for path in done.out.glob("*/*.*")}
    change(done)
    expected = {name: "stale" if name in stale.split() else "done" for name in ALL}
    assert done.states(capsys) == expected
    before = {path: path.read_bytes() for path in done.out.glob("*/*.*")}
    first = stale.split()[0]
    with refused("pipeline.rerun", Cause.CHANGED, f"{first}: ", thing, "--pipeline.rerun true"):
        done.load()
    assert done.calls == ALL
    assert before == {path: path.read_bytes() for path in done.out.glob("*/*.*")}


def test_a_comment_in_a_functions_module_changes_nothing(done, capsys):
    (done.path / "tiny.py").write_text(FUNCTIONS.replace("import json", "import json  # why"))
    assert done.states(capsys) == dict.fromkeys(ALL, "done")


def test_a_sampling_of_a_stage_s_model_is_none_of_its_outputs(done, capsys):
    (done.out / "both/sampled").mkdir()
    (done.out / "both/sampled/samples.jsonl").write_text("{}\n")
    assert done.states(capsys) == dict.fromkeys(ALL, "done")


@pytest.mark.more
def test_a_file_beside_the_recipe_is_an_input_as_others_are(world, capsys):
    world.write(RECIPE.replace("extra.txt", "${here}/extra.txt"))
    assert world.run() == 0
    assert world.states(capsys) == dict.fromkeys(ALL, "done")
    stale = {"corpus": "done", "other": "done", "both": "stale", "last": "stale"}
    for change in (change_file, lose_file):
        change(world)
        assert world.states(capsys) == stale
        with refused("pipeline.rerun", Cause.CHANGED, "both: sources[2] ${here}/extra.txt"):
            world.load()


@pytest.mark.more
def test_rerun_moves_aside_and_does_again_only_what_comes_out_otherwise(done, capsys):
    change_setting(done)
    assert done.run("--pipeline.rerun", "true") == 0
    assert done.calls == [*ALL, "other", "both", "last"]
    assert (done.out / "other.old-1/data.jsonl").read_text() == "b0\nb1\n"
    assert (done.out / "other/data.jsonl").read_text() == "b0\nb1\nb2\nb3\n"
    assert (done.out / "last/all.txt").read_text().count("b") == 4
    done.write(RECIPE)
    assert done.run("--pipeline.rerun", "true") == 0
    assert (done.out / "other.old-2/data.jsonl").read_text() == "b0\nb1\nb2\nb3\n"
    assert done.states(capsys) == dict.fromkeys(ALL, "done")


@pytest.mark.more
def test_what_comes_out_the_same_is_not_done_again_below(world, capsys):
    rounded = RECIPE.replace("extra.txt]}", "extra.txt], rounded: true}")
    world.write(rounded)
    assert world.run() == 0
    world.write(rounded.replace("{lines: 3}", "{lines: 4}"))  # 6 lines or 7: rounded the same
    assert world.states(capsys)["last"] == "stale"
    assert world.run("--pipeline.rerun", "true") == 0
    assert world.calls == [*ALL, "corpus", "both"]
    assert world.states(capsys) == dict.fromkeys(ALL, "done")


def test_a_file_that_is_not_read_decides_nothing(done, capsys):
    done.write(RECIPE.replace("word: b}", "word: b, remark: new}"))
    assert done.run("--pipeline.rerun", "true") == 0
    assert done.calls == [*ALL, "other"]
    assert done.states(capsys) == dict.fromkeys(ALL, "done")


def test_a_pipelines_folder_may_be_moved(done, capsys):
    done.out.rename(done.path / "elsewhere")
    states = done.states(capsys, "--pipeline.folder", "elsewhere")
    assert states == dict.fromkeys(ALL, "done")


@pytest.mark.more
def test_only_and_until(world, capsys):
    assert world.run("--pipeline.until", "both") == 0
    assert world.calls == ["corpus", "other", "both"]
    assert "last" not in capsys.readouterr().out
    assert world.run("--pipeline.status", "--pipeline.until", "both") == 0
    output = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in output[1:4]] == [["done", name] for name in ALL[:3]]
    assert world.states(capsys)["last"] == "pending"
    assert world.run("--pipeline.only", "last") == 0
    assert world.calls == ALL
    change_file(world)
    with refused("pipeline.only", Cause.MISSING, "both is stale"):
        world.load("--pipeline.only", "last", "--pipeline.rerun", "true")
    assert world.calls == ALL


@pytest.mark.more
def test_dry_prints_commands_that_do_the_same(world, capsys):
    import subprocess

    assert world.run("--pipeline.dry", "true") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line[0] == "#"] == [
        "# corpus", "# other", "# both, after corpus, other", "# last, after both",
    ]  # fmt: skip
    assert world.calls == []
    for name in ALL:
        (world.out / name).mkdir()
    subprocess.run(["bash", "-ec", "\n".join(lines)], check=True)
    assert (world.out / "last/all.txt").read_text() == "a0\na1\na2\nb0\nb1\nx"


@pytest.mark.more
def test_a_stage_that_fails_says_why_and_is_tried_again(world, capsys):
    world.write(
        "pipeline: {folder: out}\nstages:\n"
        "  a: {verb: make, function: 'tiny:fail', arguments: {unless: thing.txt}}\n"
        "  b: {verb: make, function: 'tiny:join', arguments: {sources: [${a.half.txt}]}}\n"
    )
    assert world.run() == 1
    assert "RuntimeError: there is no such thing as thing.txt" in capsys.readouterr().err
    assert world.states(capsys) == {"a": "failed", "b": "pending"}
    (world.path / "thing.txt").write_text("")
    assert world.run() == 0
    assert world.states(capsys) == {"a": "done", "b": "done"}
    assert len(world.record("a")["attempts"]) == 2


def test_an_output_that_another_stage_needs_must_be_there(world, capsys):
    world.write(RECIPE.replace("${corpus.data.jsonl}", "${corpus.dat.jsonl}"))
    assert world.run() == 1
    assert "${corpus.dat.jsonl}" in capsys.readouterr().err
    assert world.calls == ["corpus"]


def test_a_folder_with_other_things_in_it_is_not_touched(world):
    (world.out / "both").mkdir(parents=True)
    (world.out / "both/precious.txt").write_text("mine")
    with refused("pipeline.folder", Cause.EXISTS, "out/both"):
        world.load()
    assert (world.out / "both/precious.txt").read_text() == "mine" and world.calls == []


@pytest.mark.more
def test_each_seed_has_a_graph_of_its_own(world):
    world.write(recipe("seeded"))
    assert world.run("--pipeline.seeds", "4,5") == 0
    for seed in (4, 5):
        text = (world.out / f"seed_{seed}/last/all.txt").read_text()
        assert text == f"s{seed}-0\ns{seed}-1"
    assert json.loads((world.out / "report.json").read_text())["seeds"] == [4, 5]
    assert world.run("--pipeline.seeds", "4,5,6") == 0
    assert world.calls == []  # they are noted next to each seed's stages
    assert (world.out / "calls.txt").read_text().split() == ["corpus", "last"] * 3


NAMED = recipe("named")


def test_what_a_stage_reads_without_saying_that_it_is_a_file(tmp_path, monkeypatch):
    """A folder and a file whose names look like words, and functions of the user's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "questions").write_text("{}")
    source = "def tidy(question, response): return response\ndef polite(text, truth): return 1\n"
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "p.yaml").write_text(NAMED)
    plan = PipelinePlan.from_recipe(
        load_pipeline(tmp_path / "p.yaml"), tmp_path / "p.yaml", tmp_path / "out", 0
    )

    def read():
        return input_digests(plan, plan.stages["answers"], ())

    before = read()
    functions = {"function mine:tidy", "function mine:polite"}
    assert set(before) == {"model.path base", "data.path questions"} | functions
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "questions").write_text("{} ")
    (tmp_path / "mine.py").write_text(source.replace("return 1", "return 0"))
    after = read()
    assert all(before[name] != after[name] for name in before)


TRAINED = recipe("trained")


def matter(tmp_path, finished, **overrides):
    (tmp_path / "p.yaml").write_text(TRAINED)
    recipe = load_pipeline(tmp_path / "p.yaml", overrides)
    plan = PipelinePlan.from_recipe(
        recipe, tmp_path / "p.yaml", tmp_path / "out", recipe.pipeline.seed
    )
    return deciding_settings(plan, plan.stages["base"], finished)


@pytest.mark.parametrize(
    "key, value, of_unfinished, of_finished",
    [
        ("optimizer.learning_rate", 1e-3, True, True),
        ("run.seed", 3, True, True),
        ("run.steps", 9, False, True),  # an unfinished run may go on for longer
        ("checkpoint.every", 3, False, False),
        ("parallel.processes", 2, False, False),
        ("optimizer.learning_rate", 3e-6, False, False),  # the default, said explicitly
    ],
)
def test_settings_that_only_say_where_or_how_often_do_not_matter(
    tmp_path, key, value, of_unfinished, of_finished
):
    for finished, expected in ((False, of_unfinished), (True, of_finished)):
        changed = matter(tmp_path, finished, **{f"stages.base.{key}": value})
        assert (changed != matter(tmp_path, finished)) == expected


@pytest.mark.parametrize("finished", [False, True])
def test_the_schedule_decides_what_a_finished_rl_run_has_learnt(tmp_path, finished):
    entry = {"from_step": 2, "optimizer.learning_rate": 1e-3}
    rl = {"stages.base.verb": "rl"}
    changed = matter(tmp_path, finished, **rl, **{"stages.base.rl.schedule": [entry]})
    assert (changed != matter(tmp_path, finished, **rl)) == finished


def test_a_large_file_counts_by_blocks_and_any_change_of_size(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(file_blocks, "BLOCK_BYTES", 16)
    path = tmp_path / "weights"
    content = bytes(i % 251 for i in range(5000))
    path.write_bytes(content)
    before = digests.digest_path(path)
    assert digests.digest_path(path) == before
    path.write_bytes(content + b"x")
    assert digests.digest_path(path) != before
    path.write_bytes(content[:-1] + b"x")
    assert digests.digest_path(path) != before


def test_a_folder_counts_by_names_and_contents(tmp_path):
    def folder(name, files):
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return digests.digest_path(tmp_path / name)

    first = folder("a", {"x": "1", "y/z": "2"})
    assert first == folder("b", {"y/z": "2", "x": "1", ".lock": "pid"})
    others = [folder("c", {"x": "1", "y/z": "3"}), folder("d", {"x": "1", "y/w": "2"})]
    assert len({first, *others}) == 3
    assert digests.digest_path(tmp_path / "none") == digests.MISSING
