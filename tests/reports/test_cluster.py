"""The scripts of examples/slurm where Slurm's own commands or variables are missing."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    "examples/slurm/colocated.sbatch",
    "examples/slurm/pools.sbatch",
    "examples/deepseek_r1/stage.sbatch",
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("scontrol", "nodes", "named"),
    [
        (None, "node[0-1]", "scontrol"),  # as in a container
        ("exit 1", "node[0-1]", "node[0-1]"),  # it cannot reach its controller
        ("true", "", "NODELIST"),  # not started by sbatch
        ("true", None, "NODELIST"),
    ],
)
def test_b66_a_job_without_a_first_node_stops_with_a_sentence(
    script, scontrol, nodes, named, tmp_path
):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "head", "grep", "mkdir", "rm", "touch", "cat", "env"):
        [found] = [p for p in ("/bin/" + name, "/usr/bin/" + name) if os.path.exists(p)][:1]
        (programs / name).symlink_to(found)
    (programs / "srun").write_text(f"#!/bin/bash\ntouch {tmp_path}/started\n")
    (programs / "srun").chmod(0o755)
    if scontrol is not None:
        (programs / "scontrol").write_text(f"#!/bin/bash\n{scontrol}\n")
        (programs / "scontrol").chmod(0o755)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {{folder: {tmp_path}/run}}\n")
    lists = {"SLURM_JOB_NODELIST": nodes, "SLURM_JOB_NODELIST_HET_GROUP_0": nodes}
    environment = {
        **{"PATH": str(programs), "RECIPE": str(recipe), "RUN": f"{tmp_path}/run"},
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "r1", "SLURM_JOB_NUM_NODES": "2"},
        **{"SLURM_JOB_NUM_NODES_HET_GROUP_0": "2", "SLURM_JOB_NUM_NODES_HET_GROUP_1": "2"},
        **{name: value for name, value in lists.items() if value is not None},
    }
    options = ["python", "-m", "megatron_r1", "rl", str(recipe)] if "stage" in script else []
    done = subprocess.run(
        ["/bin/bash", str(ROOT / script), *options],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and named in done.stderr and "sbatch" in done.stderr
    assert not (tmp_path / "started").exists()
