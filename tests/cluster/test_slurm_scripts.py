"""The scripts of examples/slurm under a real Slurm: each runs a recipe to its end.

It does so also when it is requeued in the middle, runs out of time, or is asked to end.

The nodes are this machine's; engines share its memory, so weights travel through /dev/shm.
"""

import contextlib
import re
import subprocess
import sys
import time

import pytest
import slurm_cluster
from small_run import ROOT, SUMS, environment, metrics

from megatron_r1.engines.server.environment_variables import engine_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm_cluster.obstacle() is not None, reason=str(slurm_cluster.obstacle())),
]
SCRIPTS = ROOT / "examples" / "slurm"
STAGE = ROOT / "examples" / "deepseek_r1" / "stage.sbatch"
MINUTES = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=4) as cluster:
        yield cluster


@pytest.fixture
def submit(cluster, recipe, tmp_path):
    """Submits a script as a user would; the job's number. Output and run are in `tmp_path`."""
    jobs = []

    def submit(script, *options, sbatch=(), num_nodes="1", **variables):
        """num_nodes: of each pool."""
        text = (SCRIPTS / script).read_text()
        text = re.sub(r"(--nodes=)2\b", rf"\g<1>{num_nodes}", text) if "hetjob" in text else text
        (tmp_path / script).write_text(text)
        env = environment() | {
            "RECIPE": str(recipe),
            "RUN": str(tmp_path / "run"),
            "PYTHON": sys.executable,
            "RANKS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        remote = [] if script == "one_node.sbatch" else ["--rollout.hosts_address", "127.0.0.1"]
        jobs.append(
            cluster.submit(
                *(f"--output={tmp_path}/output", *sbatch, tmp_path / script, *remote, *options),
                env=env | variables,
                folder=ROOT,
            )
        )
        return jobs[-1]

    yield submit
    for job in jobs:
        cluster.run("scancel", job)
        cluster.wait(job, "CANCELLED", "COMPLETED", "FAILED", seconds=60)


def completed(cluster, job, tmp_path):
    state = cluster.wait(job, "COMPLETED", "FAILED", seconds=6 * MINUTES)
    assert state == "COMPLETED", (tmp_path / "output").read_text()[-3000:]
    assert (tmp_path / "run" / "hf" / "config.json").is_file()
    return [line["step"] for line in metrics(tmp_path / "run")]


def until_step(tmp_path, step, seconds=4 * MINUTES):
    file, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + seconds
    while not file.is_file() or len(file.read_text().splitlines()) < step:
        output = tmp_path / "output"
        said = output.read_text()[-3000:] if output.is_file() else ""
        assert time.monotonic() < deadline, f"step {step} not within {seconds} s:\n{said}"
        time.sleep(0.2)


def again_at_once(cluster, job):
    """Slurm lets a requeued job wait for two minutes, counted from when all of it has ended; nobody
    else is waiting here."""
    cluster.wait(job, "PENDING", "RUNNING", seconds=MINUTES)
    # A start in the second of the requeue is refused: "Job credential revoked", and the job fails.
    time.sleep(2.0)
    for _ in range(MINUTES):
        if cluster.field(job, "JobState") == "RUNNING":
            return
        with contextlib.suppress(AssertionError):  # it has started meanwhile
            cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(1.0)
    pytest.fail(f"job {job} did not start again: {cluster.run('scontrol', 'show', 'job', job)}")


def test_one_node_runs_out_of_time_and_goes_on(cluster, submit, tmp_path):
    job = submit("one_node.sbatch", "--run.steps", "200", RANKS="2")
    until_step(tmp_path, 2)
    # What Slurm does 900 seconds before the end of the job's time.
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    cluster.wait(job, "PENDING", seconds=2 * MINUTES)
    output = (tmp_path / "output").read_text()
    assert "stopped; the same command continues from here" in output
    assert not (tmp_path / "run" / "stop").exists()
    before = len(metrics(tmp_path / "run"))
    again_at_once(cluster, job)
    until_step(tmp_path, before + 2)
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED", seconds=MINUTES)
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 200
    assert cluster.field(job, "Restarts") == "1"
    assert "continuing after step" in (tmp_path / "output").read_text()


def test_a_mistake_fails_the_job_and_is_told(cluster, submit, tmp_path):
    job = submit("one_node.sbatch", "--parallel.tensor", "4")
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=2 * MINUTES) == "FAILED"
    assert "1 trainer ranks cannot be divided into groups of 4" in (tmp_path / "output").read_text()
    assert cluster.field(job, "Restarts") == "0"


def test_every_node_trains_and_samples(cluster, submit, tmp_path):
    job = submit("colocated.sbatch", "--parallel.tensor", "2")
    assert completed(cluster, job, tmp_path) == [1, 2, 3]
    assert len(list((tmp_path / "run" / "logs").glob("engine-*.log"))) == 2
    assert list((tmp_path / "run" / "logs" / "ranks").rglob("stdout.log"))


def test_an_engine_is_shared_by_all_nodes(cluster, submit, tmp_path):
    job = submit("colocated.sbatch", "--rollout.data_parallel", "2", HOSTS_PER_ENGINE="2")
    assert completed(cluster, job, tmp_path) == [1, 2, 3]
    logs = {log.name for log in (tmp_path / "run" / "logs").glob("engine-*.log")}
    assert logs == {"engine-0.log", "engine-0-part-1.log"}


def test_pools_are_requeued_in_the_middle(cluster, submit, tmp_path):
    job = submit("pools.sbatch", "--run.steps", "40")
    until_step(tmp_path, 2)
    cluster.run("scontrol", "requeue", job)
    again_at_once(cluster, job)
    assert completed(cluster, job, tmp_path) == list(range(1, 41))
    assert "continuing after step" in (tmp_path / "output").read_text()


# A trainer that lasts until it is asked to end, and an engine host; each ends at once where it is
# called as the other.
STUBS = {
    "PYTHON": """#!/bin/bash
case "$*" in
    *torch.distributed.run*) until [ -e "$RUN/stop" ]; do sleep 0.2; done; exit 130 ;;
    *) exit 2 ;;
esac
""",
    "ENGINE_PYTHON": """#!/bin/bash
case "$*" in
    *megatron_r1.engines.fleet.host*) sleep 600 ;;
    *) exit 2 ;;
esac
""",
}


@pytest.fixture
def waiting_pools(cluster, submit, tmp_path):
    """A job of two nodes and two, and the nodes' names, trainer's first; all come back."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = submit("pools.sbatch", num_nodes="2", **{name: str(tmp_path / name) for name in STUBS})
    cluster.wait(job, "RUNNING", seconds=MINUTES)
    until(lambda: len(steps(cluster)) == 2)
    yield job, *(nodes_of(cluster, job, pool) for pool in (0, 1))
    for node in cluster.run("sinfo", "-h", "-N", "-t", "down", "-o", "%N").split():
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")


def steps(cluster):
    """Nodes of each `srun` that runs."""
    told = cluster.run("squeue", "-s", "-h", "-o", "%i %N").splitlines()
    return sorted(line.split()[1] for line in told if ".batch" not in line)


def nodes_of(cluster, job, pool):
    told = dict(
        line.split() for line in cluster.run("squeue", "-h", "-j", job, "-o", "%i %N").splitlines()
    )
    return cluster.run("scontrol", "show", "hostnames", told[f"{job}+{pool}"]).split()


def until(condition, seconds=MINUTES):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def lose(cluster, node):
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")


def test_pools_run_out_of_time_and_are_requeued(cluster, waiting_pools):
    job, *_ = waiting_pools
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    cluster.wait(job, "PENDING", seconds=MINUTES)
    assert cluster.field(job, "Restarts") == "1"


def test_an_engine_node_that_dies_does_not_end_the_run(cluster, waiting_pools):
    job, _, engines = waiting_pools
    lose(cluster, engines[1])
    until(lambda: nodes_of(cluster, job, 1) == engines[:1])
    time.sleep(3.0)  # what Slurm would have ended by now
    assert cluster.field(job, "JobState") == "RUNNING"
    assert cluster.field(job, "Restarts") == "0"
    assert len(steps(cluster)) == 2, "the trainer, and the other engine node"


def test_a_trainer_node_that_dies_has_the_job_requeued(cluster, waiting_pools):
    job, trainers, _ = waiting_pools
    lose(cluster, trainers[1])
    cluster.wait(job, "PENDING", seconds=MINUTES)
    assert cluster.field(job, "Restarts") == "1"


@pytest.fixture
def stage(cluster, recipe, tmp_path):
    """Submits a stage of examples/deepseek_r1 and waits for its end; what it has said."""
    jobs = []

    def stage(verb, num_nodes, *options, **variables):
        env = environment() | {"RANKS": "1", "TRANSPORT": "shm", "GLOO_SOCKET_IFNAME": "lo"}
        # Of engines without a GPU, which this project's own launcher sets.
        env |= engine_environment("cpu", 1, 1) | {"VLLM_HOST_IP": "127.0.0.1"}
        jobs.append(
            cluster.submit(
                *(f"--output={tmp_path}/output", "--nodes", num_nodes, STAGE),
                *(sys.executable, "-m", "megatron_r1", verb, recipe, *options),
                *("--rollout.hosts_address", "127.0.0.1"),
                env=env | {"RUN": str(tmp_path / "run")} | variables,
                folder=ROOT,
            )
        )
        state = cluster.wait(jobs[-1], "COMPLETED", "FAILED", seconds=8 * MINUTES)
        said = (tmp_path / "output").read_text()
        assert state == "COMPLETED", said[-3000:]
        return said

    yield stage
    for job in jobs:
        cluster.run("scancel", job)
        cluster.wait(job, "CANCELLED", "COMPLETED", "FAILED", seconds=60)


def test_a_sampling_stage_has_its_engine_on_several_nodes(stage, tmp_path):
    anything = ("--sample.keep.min_accuracy", "0", "--sample.samples", "2")
    said = stage(
        *("sample", "2", *anything, "--rollout.data_parallel", "2"),
        *("--sample.filters", "{format: false, truncated: false, language: false}"),
        HOSTS_PER_ENGINE="2",
    )
    assert "the run is over" in said
    samples = list((tmp_path / "run" / "samples.jsonl").open())
    assert len(samples) == 2 * len(SUMS)
    logs = {log.name for log in (tmp_path / "run" / "logs").glob("engine-*.log")}
    assert logs == {"engine-0.log", "engine-0-part-1.log"}


def test_a_stage_serves_its_reward_model_on_nodes_of_its_own(stage, tmp_path):
    code = "import sys; from pathlib import Path; from reward_model_data import write_reward_model"
    model, system = tmp_path / "reward_model", ROOT / "tests" / "system"
    subprocess.run(
        [sys.executable, "-c", f"{code}; write_reward_model(Path(sys.argv[1]))", model],
        check=True,
        env=environment() | {"PYTHONPATH": str(system)},
    )
    stage(
        *("rl", "3", "--rewards.options.helpful.model", "helpful"),
        *("--rewards.weights", "{accuracy: 1.0, helpful: 1.0}"),
        SERVED=f"helpful={model}",
        SERVED_NODES="2",
        SERVED_OPTIONS="--enforce-eager --dtype float32",
        HOSTS_PER_ENGINE="1",
    )
    rewards = [line["helpful/mean"] for line in metrics(tmp_path / "run")]
    assert len(rewards) == 3 and all(0 < reward < 1 for reward in rewards)
